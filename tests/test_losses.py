"""Losses against the papers' formulas, written here in float64 sequence by sequence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forge_hpc.config.algorithm import loss_facts
from forge_hpc.config.errors import UserError
from forge_hpc.config.registry import LOSSES as LOSS_PLACES
from forge_hpc.config.schema import AlgorithmConfig, Config, MismatchConfig
from forge_hpc.config.user_code import load_user_code
from forge_hpc.losses import (
    CISPOLoss,
    DAPOLoss,
    DPPOLoss,
    DrGRPOLoss,
    GMPOLoss,
    GRPOLoss,
    GSPOLoss,
    LossOutput,
    LUSPOLoss,
    MismatchCorrection,
    PolicyLoss,
    PPOLoss,
    ReinforceLoss,
    RLOOLoss,
    SAPOLoss,
    SFTLoss,
    SimpleGRPOLoss,
    ValueLoss,
    VESPOLoss,
    add_effective_sample_size,
    build_loss,
    step_normalizer,
)
from forge_hpc.losses.build import check_loss_fits
from forge_hpc.losses.kl import KL_ESTIMATORS, weighted
from forge_hpc.losses.reduction import Sequences
from forge_hpc.losses.top_entropy import entropy_threshold

# ---- sequences, and three ways to lay them out


@dataclasses.dataclass
class Sample:
    """A sequence: values of each of its tokens, of which some are trained."""

    logprobs: torch.Tensor
    old: torch.Tensor
    generator: torch.Tensor
    ref: torch.Tensor
    entropy: torch.Tensor
    mask: torch.Tensor
    advantage: float

    def trained(self, name: str) -> torch.Tensor:
        return getattr(self, name)[self.mask]


NAMES = {"logprobs": "logprobs", "old": "old_logprobs", "generator": "generator_logprobs", "ref": "ref_logprobs"}


def samples(num: int = 7, seed: int = 0, spread: float = 0.3) -> list[Sample]:
    """Sequences of different lengths with prompts before the answers, one of them without a trained token."""
    generator = torch.Generator().manual_seed(seed)

    def rand(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    found = []
    for i in range(num):
        length = int(torch.randint(3, 9, (), generator=generator))
        logprobs = -4 * rand(length)
        noise = [spread * (2 * rand(length) - 1) for _ in range(3)]
        mask = torch.arange(length) >= 1 + i % 3
        if i == 3:
            mask[:] = False
        advantage = float(2 * rand(1) - 1)
        leaf, entropy = logprobs.clone().requires_grad_(), rand(length).requires_grad_()
        found.append(Sample(leaf, *(logprobs + n for n in noise), entropy, mask, advantage))
    return found


def padded(group: Sequence[Sample], fill: float = 0.0) -> dict[str, torch.Tensor]:
    """A sequence a row."""
    width = max(len(s.mask) for s in group) + 2
    return _rows([[s] for s in group], width, fill)


def packed(group: Sequence[Sample], fill: float = 0.0) -> dict[str, torch.Tensor]:
    """Two rows of several sequences each, as the packer makes them: segments from 1, 0 for padding."""
    rows = [list(group[0::2]), list(group[1::2])]
    width = max(sum(len(s.mask) for s in row) for row in rows) + 3
    inputs = _rows(rows, width, fill)
    numbers = [[i for i, s in enumerate(row, 1) for _ in s.mask] for row in rows]
    inputs["segment_ids"] = torch.tensor([row + [0] * (width - len(row)) for row in numbers], dtype=torch.int32)
    return inputs


def _rows(rows: list[list[Sample]], width: int, fill: float) -> dict[str, torch.Tensor]:
    def lay(values: Callable[[Sample], torch.Tensor], empty: Any) -> torch.Tensor:
        laid = []
        for row in rows:
            flat = torch.cat([values(s) for s in row])
            laid.append(torch.cat([flat, torch.full((width - len(flat),), empty, dtype=flat.dtype)]))
        return torch.stack(laid)

    inputs = {argument: lay(lambda s, n=name: getattr(s, n), fill) for name, argument in NAMES.items()}
    inputs["entropy"] = lay(lambda s: s.entropy, fill)
    inputs["advantages"] = lay(lambda s: torch.full_like(s.old, s.advantage), fill)
    inputs["mask"] = lay(lambda s: s.mask, False)
    return inputs


def gradients(group: Sequence[Sample], loss: torch.Tensor) -> list[torch.Tensor]:
    """d loss / d log-probability, and d loss / d entropy, of every token."""
    leaves = [s.logprobs for s in group] + [s.entropy for s in group]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)]


# ---- the formulas

Term = Callable[[Sample], torch.Tensor]
"""A policy term for each trained token of a sequence."""


def ratio_of(s: Sample) -> torch.Tensor:
    return (s.trained("logprobs") - s.trained("old")).exp()


def clipped(ratio: torch.Tensor, advantage: float, low: float, high: float) -> torch.Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def ppo(low: float, high: float) -> Term:
    return lambda s: clipped(ratio_of(s), s.advantage, low, high)


def gspo(low: float, high: float) -> Term:
    def term(s: Sample) -> torch.Tensor:
        old, new = s.trained("old").sum(), s.trained("logprobs").sum()
        ratio = (new.exp() / old.exp()) ** (1 / len(s.trained("old")))
        return clipped(ratio, s.advantage, low, high).expand(len(s.trained("old")))

    return term


def sapo(tau_pos: float, tau_neg: float) -> Term:
    def term(s: Sample) -> torch.Tensor:
        tau = tau_pos if s.advantage > 0 else tau_neg
        return -s.advantage * 4 / tau / (1 + (-tau * (ratio_of(s) - 1)).exp())

    return term


def reinforce(low: float = 0.0, high: float = 0.0) -> Term:
    """With bounds of the ratio, where any is not 0."""

    def term(s: Sample) -> torch.Tensor:
        weight = ratio_of(s).detach().clamp(low, high) if high else 1.0
        return -weight * s.advantage * s.trained("logprobs")

    return term


def dual(low: float, high: float, dual_clip: float) -> Term:
    def term(s: Sample) -> torch.Tensor:
        worst = torch.full_like(s.trained("old"), -dual_clip * s.advantage)
        plain = clipped(ratio_of(s), s.advantage, low, high)
        return torch.minimum(plain, worst) if s.advantage < 0 else plain

    return term


def gmpo(log_clip: float) -> Term:
    def term(s: Sample) -> torch.Tensor:
        log = s.trained("logprobs") - s.trained("old")
        log = log.clamp(max=log_clip) if s.advantage > 0 else log.clamp(min=-log_clip)
        return (-s.advantage * log.exp().prod() ** (1 / len(log))).expand(len(log))

    return term


def vespo(k_pos: float, lambda_pos: float, k_neg: float, lambda_neg: float) -> Term:
    def term(s: Sample) -> torch.Tensor:
        w = ratio_of(s).detach().prod().clamp(1e-8, math.exp(20))
        k, lam = (k_pos, lambda_pos) if s.advantage >= 0 else (k_neg, lambda_neg)
        return -(w**k) * (lam * (1 - w)).exp() * s.advantage * s.trained("logprobs")

    return term


def dppo(low: float, high: float) -> Term:
    def term(s: Sample) -> torch.Tensor:
        moved = s.trained("logprobs").detach().exp() - s.trained("old").exp()
        kept = moved <= high if s.advantage > 0 else moved >= -low
        return -ratio_of(s) * s.advantage * kept

    return term


def simple(s: Sample) -> torch.Tensor:
    logprobs = s.trained("logprobs")
    return -(logprobs - logprobs.detach()).exp() * s.advantage


def reduce(group: Sequence[Sample], term: Term, normalization: str, max_tokens: int = 1) -> torch.Tensor:
    trained = [s for s in group if s.mask.any()]
    if normalization == "token":
        return sum(term(s).sum() for s in trained) / sum(int(s.mask.sum()) for s in trained)
    divisor = {"sequence": lambda s: int(s.mask.sum()), "constant": lambda s: max_tokens}[normalization]
    return sum(term(s).sum() / divisor(s) for s in trained) / len(trained)


def k3(s: Sample) -> torch.Tensor:
    d = s.trained("ref") - s.trained("logprobs")
    return d.exp() - d - 1


ALL = {"kl_coef": 0.1, "entropy_coef": 0.02}
VESPO = {"k_pos": 1.1, "lambda_pos": 0.7, "k_neg": 0.3, "lambda_neg": 1.3}
CASES: dict[str, tuple[PolicyLoss, Term, str]] = {
    "grpo": (GRPOLoss(0.1, 0.15, **ALL), ppo(0.1, 0.15), "token"),
    "grpo of the paper": (GRPOLoss(0.1, 0.15, normalization="sequence", **ALL), ppo(0.1, 0.15), "sequence"),
    "ppo": (PPOLoss(**ALL), ppo(0.2, 0.2), "token"),
    "dr_grpo": (DrGRPOLoss(max_tokens=11, **ALL), ppo(0.2, 0.2), "constant"),
    "dapo": (DAPOLoss(**ALL), ppo(0.2, 0.28), "token"),
    "cispo": (CISPOLoss(**ALL), reinforce(0.0, 5.0), "token"),
    "cispo, narrow": (CISPOLoss(0.1, 0.1, **ALL), reinforce(0.9, 1.1), "token"),
    "gspo": (GSPOLoss(**ALL), gspo(3e-4, 4e-4), "sequence"),
    "gspo, wide": (GSPOLoss(clip_low=0.1, clip_high=0.1, **ALL), gspo(0.1, 0.1), "sequence"),
    "two-sided clip": (GRPOLoss(dual_clip=1.3, **ALL), dual(0.2, 0.2, 1.3), "token"),
    "gmpo": (GMPOLoss(**ALL), gmpo(0.4), "sequence"),
    "gmpo, narrow": (GMPOLoss(log_clip=0.05, **ALL), gmpo(0.05), "sequence"),
    "luspo": (LUSPOLoss(max_tokens=11, **ALL), gspo(3e-4, 4e-4), "constant"),
    "vespo": (VESPOLoss(**ALL), vespo(2.0, 3.0, 3.0, 2.0), "token"),
    "vespo, other": (VESPOLoss(**VESPO, **ALL), vespo(**VESPO), "token"),
    "dppo": (DPPOLoss(**ALL), dppo(0.15, 0.15), "token"),
    "dppo, narrow": (DPPOLoss(0.01, 0.02, **ALL), dppo(0.01, 0.02), "token"),
    "sapo": (SAPOLoss(**ALL), sapo(1.0, 1.05), "sequence"),
    "sapo, narrow": (SAPOLoss(tau_pos=3.0, tau_neg=7.0, **ALL), sapo(3.0, 7.0), "sequence"),
    "rloo": (RLOOLoss(max_tokens=11, **ALL), reinforce(), "constant"),
    "reinforce": (ReinforceLoss(**ALL), reinforce(), "token"),
    "reinforce, clipped": (ReinforceLoss(clip_high=0.1, **ALL), reinforce(0.0, 1.1), "token"),
    "simple_grpo": (SimpleGRPOLoss(0.1, entropy_coef=0.02), simple, "sequence"),
}
LOSSES = {name: loss for name, (loss, _, _) in CASES.items()} | {
    "corrected": GRPOLoss(mismatch=MismatchCorrection(1.1, (0.8, 1.2), (0.9, 1.1)), **ALL),
    "corrected by the product": GSPOLoss(mismatch=MismatchCorrection(2.0, level="sequence", veto=0.5), **ALL),
    "off-policy sequences masked": PPOLoss(off_policy_mask_threshold=0.01, **ALL),
    "weighted KL": GRPOLoss(kl_weighted=True, old_kl_coef=0.1, **ALL),
    "corrected by sequence": DrGRPOLoss(mismatch=MismatchCorrection(1.1), max_tokens=11, **ALL),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("case", CASES)
def test_each_loss_equals_its_formula_with_gradients(case: str, spread: float, layout: Any) -> None:
    loss, term, normalization = CASES[case]
    group = samples(spread=spread)
    expected = (
        reduce(group, term, normalization, 11)
        + 0.1 * reduce(group, k3, normalization, 11)
        - 0.02 * reduce(group, lambda s: s.trained("entropy"), normalization, 11)
    )
    actual = loss(**layout(group)).loss
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(group, actual), gradients(group, expected))


@every_loss
def test_float32_is_close_to_float64(loss: Any) -> None:
    group = samples()
    exact = packed(group)
    single = {k: v.float() if v.is_floating_point() else v for k, v in exact.items()}
    actual, expected = loss(**single).loss, loss(**exact).loss
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(group, actual), gradients(group, expected), rtol=1e-4, atol=1e-6)


@every_loss
def test_shares_of_microbatches_add_up_to_the_step(loss: Any) -> None:
    group = samples(num=9)
    whole = loss(**packed(group))
    num_tokens = sum(int(s.mask.sum()) for s in group)
    normalizer = step_normalizer(loss, num_tokens, sum(bool(s.mask.any()) for s in group))
    layouts = (padded, packed, padded)  # an early one holds the sequence without a trained token alone
    cuts = (group[0:3], group[4:9], group[3:4])
    parts = [loss(**lay(cut), normalizer=normalizer) for lay, cut in zip(layouts, cuts, strict=True)]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    torch.testing.assert_close(gradients(group, sum(p.loss for p in parts)), gradients(group, whole.loss))
    sums = {name: sum(float(p.metrics[name]) for p in parts) for name in whole.metrics}
    expected = add_effective_sample_size({name: float(value) for name, value in whole.metrics.items()})
    assert add_effective_sample_size(sums) == pytest.approx(expected)


@every_loss
def test_what_stands_where_nothing_is_trained_never_matters(loss: Any) -> None:
    group, again = samples(), samples()
    for s in again:
        for name in ("old", "generator", "ref"):
            getattr(s, name)[~s.mask] = math.nan
        s.logprobs.data[~s.mask] = -math.inf
    expected, actual = loss(**packed(group)).loss, loss(**packed(again, fill=math.nan)).loss
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(again, actual), gradients(group, expected), rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("spread", [50.0, 1e4])
def test_ratios_without_bounds_stay_finite(loss: Any, spread: float) -> None:
    group = samples()
    for i, s in enumerate(group):
        for name in ("old", "generator", "ref"):
            setattr(s, name, s.logprobs.detach() + spread * (-1) ** (i + torch.arange(len(s.mask))))
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in packed(group).items()}
    output = loss(**inputs)
    assert output.loss.isfinite() and all(value.isfinite() for value in output.metrics.values())
    assert all(g.isfinite().all() for g in gradients(group, output.loss))


@every_loss
def test_an_empty_mask_gives_zero(loss: Any) -> None:
    group = samples()
    for s in group:
        s.mask[:] = False
    output = loss(**packed(group))
    assert output.loss.item() == 0 and not any(value.any() for value in output.metrics.values())
    assert not any(g.any() for g in gradients(group, output.loss))


@every_loss
@pytest.mark.parametrize("name", [*NAMES.values(), "advantages", "entropy"])
def test_a_value_that_is_not_finite_is_refused_by_name(loss: Any, name: str) -> None:
    for value in (math.nan, math.inf, -math.inf):
        inputs = {k: v.detach().clone() for k, v in padded(samples()).items()}
        inputs[name][0, int(inputs["mask"][0].nonzero()[0])] = value
        with pytest.raises(ValueError, match=f"^{name}: 1 of .* trained tokens are not finite"):
            loss(**inputs)


@every_loss
@pytest.mark.parametrize("shape", ["[B]", "[B, 1]"])
def test_advantages_of_padded_rows_are_broadcast(loss: Any, shape: str) -> None:
    inputs = padded(samples())
    expected = loss(**inputs).loss
    inputs["advantages"] = inputs["advantages"][:, 0] if shape == "[B]" else inputs["advantages"][:, :1]
    torch.testing.assert_close(loss(**inputs).loss, expected, rtol=0, atol=0)


# ---- single values


def one_token(ratio: float, advantage: float, loss: Any) -> tuple[torch.Tensor, LossOutput]:
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    output = loss(
        logprobs=logprobs,
        old_logprobs=torch.zeros(1, 1),
        advantages=torch.tensor([[advantage]]),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )
    output.loss.backward()
    return logprobs.grad, output


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "is_clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2 * 1.28, True),  # above: clipped at 1 + clip_high
        (0.5, 2.0, -1.0, False),  # the pessimistic side is the ratio itself
        (0.5, -2.0, 2 * 0.8, True),  # below: clipped at 1 - clip_low
        (1.5, -2.0, 3.0, False),
    ],
)
def test_dapo_clips_each_side_by_its_own_bound_and_takes_the_gradient_away(
    ratio: float, advantage: float, expected: float, is_clipped: bool
) -> None:
    gradient, output = one_token(ratio, advantage, DAPOLoss())
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert output.metrics["ratio/clip_fraction"].item() == is_clipped
    assert gradient.item() == pytest.approx(0.0 if is_clipped else expected, rel=1e-6)


def test_cispo_keeps_the_gradient_of_what_it_clips() -> None:
    gradient, output = one_token(8.0, 2.0, CISPOLoss())
    assert output.metrics["ratio/clip_fraction"].item() == 1
    assert gradient.item() == pytest.approx(-2 * 5)
    assert one_token(0.01, 2.0, CISPOLoss())[0].item() == pytest.approx(-2 * 0.01)  # no lower bound


def test_sapo_weakens_the_gradient_smoothly_on_both_sides() -> None:
    gradients = {ratio: -one_token(ratio, 1.0, SAPOLoss())[0].item() / ratio for ratio in (0.2, 1.0, 5.0, 9.0)}
    assert gradients[1.0] == pytest.approx(1)
    assert 1 > gradients[0.2] > gradients[5.0] > gradients[9.0] > 0
    weaker = one_token(3.0, -1.0, SAPOLoss())[0].item()
    assert 0 < weaker < -one_token(3.0, 1.0, SAPOLoss())[0].item()  # negative advantages have the narrower gate


def test_on_policy_all_losses_have_the_gradient_of_reinforce() -> None:
    group = samples()
    for s in group:
        s.old = s.logprobs.detach().clone()
    expected = gradients(group, ReinforceLoss()(**packed(group)).loss)
    for name in LOSS_PLACES:
        loss = build_loss(name, AlgorithmConfig(normalization="token", kl_coef=0.0))
        torch.testing.assert_close(gradients(group, loss(**packed(group)).loss), expected, msg=name)


def test_sft_is_the_mean_negative_log_likelihood_of_the_mask() -> None:
    group = samples()
    x = packed(group, fill=math.nan)
    loss = SFTLoss()(**x).loss
    torch.testing.assert_close(loss, -x["logprobs"][x["mask"]].mean())
    parts = [SFTLoss()(**padded(cut), normalizer=int(x["mask"].sum())).loss for cut in (group[:2], group[2:])]
    torch.testing.assert_close(sum(parts), loss)


def test_the_mean_over_a_sequence_has_the_right_gradient() -> None:
    inputs = packed(samples())
    sequences = Sequences(inputs["mask"], inputs["segment_ids"])
    values = inputs["logprobs"].detach().requires_grad_()
    assert torch.autograd.gradcheck(sequences.mean, (values,))
    assert int(sequences.num_trained) == 6


def test_segments_are_told_apart_by_their_numbers_in_any_order() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    values = torch.arange(8.0).view(2, 4)
    mean = Sequences(mask, torch.tensor([[4, 0, 4, 0], [4, 4, 4, 2]])).mean(values)
    assert mean.tolist() == [[1, 2, 1, 2], [5, 5, 5, 7]]
    with pytest.raises(ValueError, match="segment_ids go up to 5, in rows of 4 tokens"):
        Sequences(mask, torch.tensor([[5, 5, 5, 5], [0, 0, 0, 0]]))


# ---- KL


def test_k1_and_k3_are_unbiased_and_k2_and_k3_never_negative() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 8).log_softmax(-1)
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True)
    estimates = {name: kl(policy[drawn], reference[drawn]) for name, kl in KL_ESTIMATORS.items()}
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert estimates["k1"].mean().item() == pytest.approx(exact, rel=0.02)
    assert estimates["k3"].mean().item() == pytest.approx(exact, rel=0.02)
    assert (estimates["k2"] >= 0).all() and (estimates["k3"] >= 0).all()


def test_the_gradient_of_k2_is_that_of_the_kl_and_of_k1_none() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(8, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    for name, expected in (("k2", exact), ("k1", torch.zeros_like(exact))):
        expectation = (policy.exp().detach() * KL_ESTIMATORS[name](policy, reference)).sum()
        (actual,) = torch.autograd.grad(expectation, logits, retain_graph=True)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_the_estimator_that_is_named_is_the_one_in_the_loss(name: str) -> None:
    x = packed(samples())
    without, with_kl = (ReinforceLoss(kl_coef=coef, kl_estimator=name)(**x) for coef in (0.0, 0.5))
    d = (x["logprobs"] - x["ref_logprobs"])[x["mask"]]
    expected = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[name].mean()
    torch.testing.assert_close(with_kl.metrics["kl/mean"], expected.detach())
    torch.testing.assert_close(with_kl.loss - without.loss, 0.5 * expected)


def test_weighted_by_the_ratio_the_gradient_of_each_estimator_is_that_of_the_kl_for_an_older_policys_samples() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, dtype=torch.float64, requires_grad=True)
    old, reference = torch.randn(2, 8, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    for name in KL_ESTIMATORS:
        estimates = weighted(name, KL_ESTIMATORS[name](policy, reference), policy, old)
        expectation = (old.exp() * estimates).sum()
        torch.testing.assert_close(torch.autograd.grad(expectation, logits, retain_graph=True)[0], gradient, msg=name)
        if name != "k2":
            torch.testing.assert_close(expectation, exact)


@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("case", ["grpo", "gspo", "dr_grpo", "simple_grpo", "corrected"])
def test_the_weighted_kl_equals_its_formula_with_gradients(case: str, dtype: torch.dtype, layout: Any) -> None:
    group = samples(spread=1.0)

    def term(s: Sample) -> torch.Tensor:
        sampled_by = s.trained("generator")  # also where the clip's ratio is to the trainer before the step
        return (s.trained("logprobs") - sampled_by).exp() * k3(s)

    inputs = layout(group)
    inputs["mask"] = inputs["mask"].to(dtype)
    if case == "simple_grpo":
        plain, with_kl = SimpleGRPOLoss(0.0), SimpleGRPOLoss(0.1, kl_weighted=True)
    else:
        correction = MismatchCorrection(cap=1.5) if case == "corrected" else None
        kind = GRPOLoss if case == "corrected" else type(CASES[case][0])
        plain, with_kl = (
            kind(kl_coef=coef, kl_weighted=True, max_tokens=11, mismatch=correction) for coef in (0.0, 0.1)
        )
    expected = plain(**inputs).loss + 0.1 * reduce(group, term, with_kl.normalization, 11)
    output = with_kl(**inputs)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients(group, output.loss), gradients(group, expected))
    mean = reduce(group, term, "token" if with_kl.normalization == "token" else "sequence")
    torch.testing.assert_close(output.metrics["kl/mean"], mean.detach())


@pytest.mark.parametrize("name", ["grpo", "gspo", "dr_grpo", "dppo", "simple_grpo"])
def test_the_distance_to_the_policy_that_sampled_is_a_penalty_with_its_gradient(name: str) -> None:
    group = samples(spread=1.0)
    plain = type(CASES[name][0])(max_tokens=11) if name != "simple_grpo" else SimpleGRPOLoss(0.0)
    held = type(plain)(**{"beta": 0.0} if name == "simple_grpo" else {"max_tokens": 11}, old_kl_coef=0.3)

    def term(s: Sample) -> torch.Tensor:
        return (s.trained("logprobs") - s.trained("old")) ** 2 / 2

    output = held(**packed(group))
    expected = plain(**packed(group)).loss + 0.3 * reduce(group, term, plain.normalization, 11)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients(group, output.loss), gradients(group, expected))
    metric = reduce(group, term, "token" if plain.normalization == "token" else "sequence")
    torch.testing.assert_close(output.metrics["kl/old"], metric.detach())


# ---- the tokens of the largest entropy


def test_the_threshold_leaves_the_largest_entropies_of_all_documents_together() -> None:
    entropies = [np.array([9.0, 0.1, 0.4, 0.2]), np.array([9.0, 0.3, 9.0]), np.array([9.0, 9.0])]
    masks = [np.array([False, True, True, True]), np.array([0.0, 0.5, 0.0]), np.array([0, 0])]
    values = [0.4, 0.3, 0.2, 0.1]
    for quantile, num in ((1.0, 4), (0.999, 3), (0.7, 3), (0.5, 2), (0.34, 2), (0.3, 1), (1e-9, 1)):
        assert entropy_threshold(entropies, masks, quantile) == values[num - 1], quantile
    assert entropy_threshold([np.array([0.5, 0.5, 0.5])], [np.ones(3)], 0.1) == 0.5
    assert entropy_threshold(entropies[2:], masks[2:], 0.2) == 0


# ---- the mismatch between generator and trainer


def log_weights(group: Sequence[Sample]) -> list[torch.Tensor]:
    return [s.trained("old") - s.trained("generator") for s in group if s.mask.any()]


def test_truncated_importance_sampling_weighs_each_token_by_its_ratio_up_to_the_cap() -> None:
    group = samples(spread=1.0)
    trained = [s for s in group if s.mask.any()]
    weights = [w.exp().clamp(max=1.5) for w in log_weights(group)]
    terms = [reinforce()(s) * w for s, w in zip(trained, weights, strict=True)]
    output = ReinforceLoss(mismatch=MismatchCorrection(cap=1.5))(**packed(group))
    torch.testing.assert_close(output.loss, torch.cat(terms).mean())
    w = torch.cat(weights)
    metrics = add_effective_sample_size({name: float(v) for name, v in output.metrics.items()})
    assert metrics["mismatch/weight_mean"] == pytest.approx(w.mean().item())
    assert metrics["mismatch/ess"] == pytest.approx((w.sum() ** 2 / (len(w) * (w**2).sum())).item())
    assert metrics["mismatch/masked_fraction"] == 0


def test_tokens_and_sequences_outside_their_bounds_are_left_out() -> None:
    group = samples(num=12, spread=1.0)
    trained = [s for s in group if s.mask.any()]
    terms, num_masked = [], 0
    for s, log_w in zip(trained, log_weights(group), strict=True):
        inside = (log_w.exp() >= 0.5) & (log_w.exp() <= 2) & (0.8 <= log_w.mean().exp() <= 1.1)
        terms.append(reinforce()(s) * log_w.exp() * inside)
        num_masked += int((~inside).sum())
    correction = MismatchCorrection(token_bounds=(0.5, 2.0), sequence_bounds=(0.8, 1.1))
    output = ReinforceLoss(mismatch=correction)(**packed(group))
    assert 0 < num_masked < len(torch.cat(terms))
    torch.testing.assert_close(output.loss, torch.cat(terms).mean())
    assert output.metrics["mismatch/masked_fraction"].item() == pytest.approx(num_masked / len(torch.cat(terms)))


def test_a_sequence_is_weighted_by_its_product_and_left_out_where_that_or_one_token_is_out_of_bounds() -> None:
    group = samples(num=16, spread=0.5)
    trained = [s for s in group if s.mask.any()]
    log = log_weights(group)
    for correction, weigh in {
        MismatchCorrection(1.5, level="sequence"): lambda w: w.sum().exp().clamp(max=1.5),
        MismatchCorrection(level="sequence", product_bounds=(0.0, 2.0)): lambda w: w.sum().exp() * (w.sum().exp() <= 2),
        MismatchCorrection(product_bounds=(0.5, 2.0)): lambda w: w.exp() * (0.5 <= w.sum().exp() <= 2),
        MismatchCorrection(veto=0.5): lambda w: w.exp() * (w.exp() >= 0.5).all(),
    }.items():
        weights = [weigh(w).expand(len(w)) for w in log]
        terms = torch.cat([reinforce()(s) * w for s, w in zip(trained, weights, strict=True)])
        for layout in (padded, packed):
            output = ReinforceLoss(mismatch=correction)(**layout(group))
            torch.testing.assert_close(output.loss, terms.mean(), msg=str(correction))
        masked = (torch.cat(weights) == 0).double().mean().item()
        assert output.metrics["mismatch/masked_fraction"].item() == pytest.approx(masked)
        assert (0 < masked < 1) == (correction.cap is None)
    with pytest.raises(ValueError, match="level is 'geometric'"):
        MismatchCorrection(level="geometric")


def test_bad_sequences_that_the_policy_has_left_are_left_out() -> None:
    group = samples(num=16)
    terms, kept = [], []
    for s in group:
        if s.mask.any():
            is_kept = s.advantage >= 0 or (s.trained("generator") - s.trained("logprobs")).mean() <= 0.02
            kept.append(torch.full_like(s.trained("old"), is_kept))
            terms.append(reinforce()(s) * kept[-1])
    output = ReinforceLoss(off_policy_mask_threshold=0.02)(**packed(group))
    torch.testing.assert_close(output.loss, torch.cat(terms).mean())
    left_out = 1 - torch.cat(kept).mean().item()
    assert output.metrics["mismatch/off_policy_fraction"].item() == pytest.approx(left_out)
    assert 0 < left_out < 0.5
    assert ReinforceLoss(off_policy_mask_threshold=0.02).old_logprobs_from == "generator"


@pytest.mark.parametrize("name", ["grpo", "gspo", "rloo", "vespo"])
def test_tokens_have_weights_of_their_own(name: str) -> None:
    loss, term, normalization = CASES[name]
    loss = dataclasses.replace(loss, kl_coef=0.0, entropy_coef=0.0)
    group = samples()
    inputs = packed(group)
    weights = torch.rand(inputs["old_logprobs"].shape, dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for row, members in enumerate((group[0::2], group[1::2])):
        start = 0
        for s in members:
            own = weights[row, start : start + len(s.mask)][s.mask]
            start += len(s.mask)
            if len(own):
                divisor = {"token": 1, "sequence": len(own), "constant": 11}[normalization]
                expected = expected + (own * term(s)).sum() / divisor
    trained = [s for s in group if s.mask.any()]
    count = sum(int(s.mask.sum()) for s in trained) if normalization == "token" else len(trained)
    torch.testing.assert_close(loss(**inputs, weights=weights).loss, expected / count)
    ones = loss(**inputs, weights=torch.ones_like(weights)).loss
    torch.testing.assert_close(ones, loss(**inputs).loss, rtol=0, atol=0)


@every_loss
def test_a_mask_of_numbers_is_taken_like_one_of_truth_values(loss: Any) -> None:
    inputs = packed(samples())
    for dtype in (torch.float32, torch.int64):
        output = loss(**inputs | {"mask": inputs["mask"].to(dtype)})
        torch.testing.assert_close(output.loss, loss(**inputs).loss, rtol=0, atol=0)
    inputs |= {"values": inputs["logprobs"], "returns": inputs["old_logprobs"]}
    for single in (SFTLoss(), ValueLoss()):
        output = single(**inputs | {"mask": inputs["mask"].double()})
        torch.testing.assert_close(output.loss, single(**inputs).loss, rtol=0, atol=0)


def test_sft_tokens_have_weights_of_their_own() -> None:
    x = padded(samples())
    weights = torch.rand(x["mask"].shape, dtype=torch.float64)
    expected = -(weights * x["logprobs"])[x["mask"]].mean()
    torch.testing.assert_close(SFTLoss()(**x, weights=weights).loss, expected)


def test_a_two_sided_clip_lies_above_the_other() -> None:
    with pytest.raises(ValueError, match=r"dual_clip is 1.1, it must be above 1 \+ clip_high = 1.2"):
        PPOLoss(dual_clip=1.1)


def test_where_all_is_left_out_the_loss_and_the_effective_sample_size_are_zero() -> None:
    output = GRPOLoss(mismatch=MismatchCorrection(token_bounds=(100.0, 200.0)))(**packed(samples()))
    assert output.loss.item() == 0
    assert add_effective_sample_size({n: float(v) for n, v in output.metrics.items()})["mismatch/ess"] == 0


def test_a_correction_asks_for_the_trainers_log_probabilities() -> None:
    assert GRPOLoss().old_logprobs_from == "generator"
    assert GRPOLoss(mismatch=MismatchCorrection(2.0)).old_logprobs_from == "trainer"


@pytest.mark.parametrize(
    ("loss", "missing"),
    [
        (GRPOLoss(kl_coef=0.1), "ref_logprobs"),
        (GRPOLoss(entropy_coef=0.1), "entropy"),
        (GRPOLoss(mismatch=MismatchCorrection(2.0)), "generator_logprobs"),
    ],
)
def test_an_option_without_its_input_is_refused(loss: Any, missing: str) -> None:
    inputs = packed(samples())
    del inputs[missing]
    with pytest.raises(ValueError, match=f"needs {missing}"):
        loss(**inputs)


# ---- by name


def test_what_is_known_of_a_loss_without_torch_is_what_its_class_says() -> None:
    shared = {field.name for field in dataclasses.fields(PolicyLoss)}
    for name, place in LOSS_PLACES.items():
        kind, facts = load_user_code(place, "loss"), loss_facts(name)
        own = {field.name for field in dataclasses.fields(kind)} - shared
        assert (set(facts.options), facts.advantage, facts.kl_coef) == (own, kind.advantage, kind().kl_coef), name
    assert loss_facts("simple_grpo").kl_coef == 0.1 and loss_facts("sapo").options == ("tau_pos", "tau_neg")


def test_losses_are_found_by_name_with_their_own_defaults_and_what_the_configuration_says() -> None:
    for name, place in LOSS_PLACES.items():
        assert build_loss(name, AlgorithmConfig(), max_tokens=7) == load_user_code(place, "loss")(max_tokens=7)
    a = AlgorithmConfig(clip_high=0.3, kl_coef=0.1, kl_estimator="k2", entropy_coef=0.5, normalization="sequence")
    options = {"kl_coef": 0.1, "kl_estimator": "k2", "entropy_coef": 0.5, "normalization": "sequence"}
    assert build_loss("grpo", a) == GRPOLoss(0.2, 0.3, **options)
    a.mismatch = MismatchConfig(cap=2, token_bounds=[0.5, 5])
    expected = GRPOLoss(0.2, 0.3, **options, mismatch=MismatchCorrection(2, (0.5, 5)))
    assert build_loss("grpo", a) == expected
    assert build_loss("simple_grpo", AlgorithmConfig(kl_coef=0.3)) == SimpleGRPOLoss(0.3)
    assert build_loss("sapo", AlgorithmConfig(loss_args={"tau_pos": 2.0})) == SAPOLoss(tau_pos=2.0)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("grop", {}, "unknown loss 'grop'"),
        ("sft", {}, "unknown loss 'sft'"),
        ("sapo", {"clip_low": 0.1}, "algorithm.clip_low is not used by algorithm.loss=sapo"),
        ("sapo", {"loss_args": {"tau": 1.0}}, "algorithm.loss_args.tau is not used by"),
        ("sapo", {"loss_args": {"tau_pos": 0.0}}, "must be above 0"),
        ("nowhere.py:Loss", {}, "no such loss file"),
        ("no_such_module:Loss", {}, "no module 'no_such_module' for a loss"),
        ("forge_hpc.losses:NoLoss", {}, "has no function or class 'NoLoss'"),
        ("forge_hpc.losses:PolicyLoss", {}, "abstract method"),
        ("forge_hpc.losses:Tokens", {}, "missing 4 required positional arguments"),
        ("forge_hpc.losses:MismatchCorrection", {}, "cannot be called"),
    ],
)
def test_what_cannot_be_built_is_a_user_error(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        build_loss(name, AlgorithmConfig(**options))
    assert words in caught.value.message and caught.value.hint


OWN = """
from dataclasses import dataclass
import torch
from forge_hpc.losses import LossOutput, PolicyLoss, RLOOLoss

@dataclass(frozen=True)
class Scaled(PolicyLoss):
    scale: float = 1.0
    def term(self, x):
        return -self.scale * x.advantages * x.logprobs, {"mine": x.logprobs}

class Bare:
    def __init__(self, **options):
        self.options = options
    def __call__(self, *, logprobs, mask, normalizer, **rest):
        return LossOutput(-torch.where(mask, logprobs, 0).sum() / normalizer)

def function(*, logprobs, mask, normalizer=None, scale=1.0, **rest):
    return LossOutput(-scale * torch.where(mask, logprobs, 0).sum())

function.advantage = "batch_mean_std"

@dataclass(frozen=True)
class Leashed(Scaled):
    kl_coef: float = 0.05
    kl_estimator: str = "k2"
    entropy_coef: float = 0.01

def leashed(*, logprobs, ref_logprobs, kl_coef=0.05, **rest):
    return LossOutput((kl_coef * (logprobs - ref_logprobs)).sum())

class OneAction(RLOOLoss): ...

class Averaged(Scaled):
    def term(self, x):
        term, metrics = super().term(x)
        return term.mean(), metrics

class Confused(Scaled):
    advantage = "mean"
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "my_loss.py"
    file.write_text(OWN)
    return file


def test_a_loss_of_ones_own_is_a_class_or_a_function_in_a_file(own: Path) -> None:
    x = packed(samples())
    a = AlgorithmConfig(kl_coef=0.1, loss_args={"scale": 2.0})
    scaled = build_loss(f"{own}:Scaled", a)(**x)
    policy = ReinforceLoss()(**x).loss
    torch.testing.assert_close(scaled.loss, 2 * policy + 0.1 * scaled.metrics["kl/mean"])
    assert "mine" in scaled.metrics
    with pytest.raises(ValueError, match=r"^Averaged.term\(\) gives a term of shape \[\], and tokens have \["):
        build_loss(f"{own}:Averaged", a)(**x)
    function = build_loss(f"{own}:function", AlgorithmConfig(loss_args={"scale": 2.0}))
    torch.testing.assert_close(function(**x).loss, -2 * x["logprobs"][x["mask"]].sum())
    assert step_normalizer(function, 10, 3) == 10  # what says nothing is a mean over tokens
    bare = build_loss(f"{own}:Bare", AlgorithmConfig(clip_low=0.1), max_tokens=5)
    assert bare.options == {"clip_low": 0.1, "max_tokens": 5}


def test_the_defaults_of_a_loss_stand_where_the_configuration_says_nothing(own: Path) -> None:
    assert build_loss("simple_grpo", AlgorithmConfig()).kl_coef == 0.1
    mine = build_loss(f"{own}:Leashed", AlgorithmConfig())
    assert (mine.kl_coef, mine.kl_estimator, mine.entropy_coef) == (0.05, "k2", 0.01)
    mine = build_loss(f"{own}:Leashed", AlgorithmConfig(kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0))
    assert (mine.kl_coef, mine.kl_estimator, mine.entropy_coef) == (0.0, "k3", 0.0)


def test_no_penalty_is_no_demand_on_a_loss_that_knows_none(own: Path) -> None:
    build_loss(f"{own}:function", AlgorithmConfig(kl_coef=0.0, kl_estimator="k3", entropy_coef=0.0))
    for options in ({"kl_coef": 0.1}, {"entropy_coef": 0.1}, {"kl_estimator": "k2"}):
        with pytest.raises(UserError, match="is not used by"):
            build_loss(f"{own}:function", AlgorithmConfig(**options))


def test_a_loss_brings_its_advantage_with_it(own: Path) -> None:
    def advantage(loss: str, **options: Any) -> str:
        return check_loss_fits(Config(algorithm=AlgorithmConfig(loss=loss, **options)))

    assert advantage("grpo") == advantage("cispo") == advantage(f"{own}:Scaled") == "group_mean_std"
    assert advantage("dr_grpo") == "group_mean"
    assert advantage("rloo") == advantage(f"{own}:OneAction") == "leave_one_out"
    assert advantage("rloo", advantage="group_mean") == "group_mean"
    assert advantage(f"{own}:function") == "batch_mean_std"
    with pytest.raises(UserError, match="has the advantage 'mean'"):
        advantage(f"{own}:Confused")
    with pytest.raises(UserError, match="from which the advantage batch_mean_std learns"):
        advantage(f"{own}:function", dynamic_sampling=True)


@pytest.mark.parametrize("name", ["Leashed", "leashed"])
def test_a_kl_penalty_by_default_needs_the_reference_model(own: Path, name: str) -> None:
    cfg = Config(algorithm=AlgorithmConfig(loss=f"{own}:{name}"))
    with pytest.raises(UserError, match=r"kl_coef=0\.05, the default of algorithm\.loss=.*needs the reference model"):
        check_loss_fits(cfg)
    cfg.algorithm.kl_coef = 0.0
    check_loss_fits(cfg)
    cfg.algorithm.kl_coef, cfg.reference.enable = None, True
    check_loss_fits(cfg)


def test_an_installed_loss_is_found_by_its_module() -> None:
    assert build_loss("forge_hpc.losses.sapo:SAPOLoss", AlgorithmConfig()) == SAPOLoss()


@pytest.mark.parametrize("name", ["Scaled", "function"])
def test_an_option_that_ones_own_loss_has_no_parameter_for_is_refused(own: Path, name: str) -> None:
    for options in ({"clip_low": 0.1}, {"loss_args": {"clip": 0.1}}):
        with pytest.raises(UserError, match="is not used by"):
            build_loss(f"{own}:{name}", AlgorithmConfig(**options))


@pytest.mark.parametrize("option", [{"normalization": "tokens"}, {"kl_estimator": "k4"}])
def test_a_loss_refuses_names_that_it_does_not_know(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="it must be one of"):
        GRPOLoss(**option)
