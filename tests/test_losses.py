"""Losses against values worked out by hand or in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import AlgorithmConfig
from forge_hpc.losses import GRPOLoss, ReinforceLoss, SFTLoss, build_loss
from forge_hpc.losses.base import kl_k3

LOSSES = [GRPOLoss(kl_coef=0.1, entropy_coef=0.01), ReinforceLoss(kl_coef=0.1, entropy_coef=0.01), SFTLoss()]


def inputs(batch: int = 3, length: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    logprobs = -torch.rand(batch, length) * 4
    return {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": logprobs.detach() + 0.3 * torch.randn(batch, length),
        "advantages": torch.randn(batch, 1).expand(batch, length).contiguous(),
        "mask": torch.rand(batch, length) > 0.3,
        "ref_logprobs": logprobs.detach() + 0.2 * torch.randn(batch, length),
        "entropy": torch.rand(batch, length).requires_grad_(),
    }


def one_token(ratio: float, advantage: float, loss: GRPOLoss) -> Any:
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    return logprobs, loss(
        logprobs=logprobs,
        old_logprobs=torch.zeros(1, 1),
        advantages=torch.tensor([[advantage]]),
        mask=torch.ones(1, 1, dtype=torch.bool),
    )


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
def test_grpo_clips_each_side_by_its_own_bound(
    ratio: float, advantage: float, expected: float, is_clipped: bool
) -> None:
    logprobs, output = one_token(ratio, advantage, GRPOLoss(clip_low=0.2, clip_high=0.28))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert output.metrics["ratio/clip_fraction"].item() == is_clipped
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0.0 if is_clipped else expected, rel=1e-6)


def test_grpo_equals_its_formula_in_float64_with_gradients() -> None:
    x = inputs()
    loss = GRPOLoss(clip_low=0.1, clip_high=0.3, kl_coef=0.05, entropy_coef=0.02)(**x).loss
    loss.backward()
    lp = x["logprobs"].detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b, t in x["mask"].nonzero().tolist():
        ratio = (lp[b, t] - x["old_logprobs"][b, t].double()).exp()
        a = x["advantages"][b, t].double()
        d = x["ref_logprobs"][b, t].double() - lp[b, t]
        total = total - torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a) + 0.05 * (d.exp() - d - 1)
        total = total - 0.02 * x["entropy"][b, t].detach().double()
    expected = total / x["mask"].sum()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x["logprobs"].grad, lp.grad.float() if lp.grad is not None else None)


def test_on_policy_grpo_and_reinforce_have_the_same_gradient() -> None:
    gradients = []
    for loss in (GRPOLoss(), ReinforceLoss()):
        x = inputs()
        x["old_logprobs"] = x["logprobs"].detach().clone()
        loss(**x).loss.backward()
        gradients.append(x["logprobs"].grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_sft_is_the_mean_negative_log_likelihood_of_the_mask() -> None:
    x = inputs()
    assert SFTLoss()(**x).loss.item() == pytest.approx(-x["logprobs"][x["mask"]].mean().item(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_shares_of_microbatches_add_up_to_the_step(loss: Any) -> None:
    x = inputs(batch=6)
    whole = loss(**x)
    normalizer = int(x["mask"].sum())
    parts = [loss(**{k: v[i : i + 2] for k, v in x.items()}, normalizer=normalizer) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), value)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_packed_and_padded_rows_give_the_same_value(loss: Any) -> None:
    padded = inputs(batch=3, length=5)
    packed = {k: v.detach().reshape(1, 15) for k, v in padded.items()}
    torch.testing.assert_close(loss(**packed).loss, loss(**padded).loss.detach())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_extreme_and_masked_values_stay_finite(loss: Any) -> None:
    x = inputs()
    x["old_logprobs"] = x["logprobs"].detach() + torch.tensor([50.0, -50.0, 0.0]).repeat(5)[:15].view(3, 5)
    x["ref_logprobs"] = x["old_logprobs"]
    x["mask"][0] = False
    x["old_logprobs"][0] = float("nan")
    output = loss(**x)
    output.loss.backward()
    assert output.loss.isfinite() and x["logprobs"].grad is not None and x["logprobs"].grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_an_empty_mask_gives_zero(loss: Any) -> None:
    x = inputs()
    x["mask"] = torch.zeros_like(x["mask"])
    output = loss(**x)
    output.loss.backward()
    assert output.loss.item() == 0 and not x["logprobs"].grad.any()


def test_k3_estimates_the_kl_divergence_and_is_never_negative() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 8).log_softmax(-1)
    samples = torch.multinomial(policy.exp(), 200_000, replacement=True)
    estimates = kl_k3(policy[samples], reference[samples])
    exact = (policy.exp() * (policy - reference)).sum()
    assert (estimates >= 0).all()
    assert estimates.mean().item() == pytest.approx(exact.item(), rel=0.02)


def test_losses_are_found_by_name_with_their_coefficients() -> None:
    cfg = AlgorithmConfig(clip_high=0.3, kl_coef=0.1)
    assert build_loss("grpo", cfg) == GRPOLoss(0.2, 0.3, 0.1, 0.0)
    with pytest.raises(UserError, match="unknown loss 'ppo'"):
        build_loss("ppo", cfg)
