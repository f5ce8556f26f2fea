"""Losses beside TRL's own code, on the same tensors in float64: ``make peers``.

TRL is installed without its dependencies into a folder of its own: what it imports stands in this environment.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from forge_hpc.advantages import gdpo
from forge_hpc.losses import CISPOLoss, DAPOLoss, DrGRPOLoss, GRPOLoss, PolicyLoss, ReinforceLoss, SAPOLoss
from forge_hpc.losses.bradley_terry import BradleyTerryLoss
from forge_hpc.losses.dpo import DPOLoss, IPOLoss
from forge_hpc.losses.kto import KTOLoss
from forge_hpc.losses.top_entropy import entropy_threshold
from forge_hpc.recipes.distillation import advantages_of

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]
TRL = "trl==1.16.0"
NEAR = {"rtol": 0, "atol": 1e-6}
NUM, LENGTH, BETA = 6, 12, 0.3  # documents, tokens that are predicted


@pytest.fixture(scope="module", autouse=True)
def trl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("trl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    missing = [name for name in ("accelerate",) if importlib.util.find_spec(name) is None]
    subprocess.run([*pip, TRL, *missing], check=True, timeout=600)
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))


def trainer(**options: Any) -> Any:
    """What TRL's methods ask of the trainer that they belong to, with one process."""
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x, device=torch.device("cpu"))
    model = SimpleNamespace(training=False)
    plain = {"aux_loss_enabled": False, "precompute_ref_logps": True, "_tp_size": 1, "_total_train_tokens": 0}
    return SimpleNamespace(
        model=model, accelerator=same, _metrics=defaultdict(lambda: defaultdict(list)), **plain, **options
    )


def model_of(logprobs: torch.Tensor, mask: torch.Tensor) -> Any:
    """A model whose output is these log-probabilities, [N, T], where tokens are trained."""
    none = torch.zeros_like(logprobs)
    outputs = SimpleNamespace(log_probs=logprobs * mask, entropy=none, mean_logits=none, is_top1=none.bool())
    return lambda **unused: outputs


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Documents as padded rows, [N, T]: of pairs the better ones first, as TRL has them."""
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = (-3 * torch.rand((NUM, LENGTH), generator=generator, dtype=torch.float64) for _ in range(2))
    starts = torch.tensor([2, 4, 3, 5, 1, 6])[:, None]
    ends = torch.tensor([9, 12, 7, 10, 12, 8])[:, None]
    places = torch.arange(LENGTH)[None]
    side = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=torch.float64)[:, None].expand(NUM, LENGTH)
    mask = (places >= starts) & (places < ends)
    return {"logprobs": logprobs.requires_grad_(), "ref_logprobs": ref, "mask": mask, "side": side}


def in_pairs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with both documents of a pair in one row, as they are packed."""
    rows = {name: torch.cat(tensor.chunk(2), dim=1) for name, tensor in batch.items()}
    segments = torch.cat([torch.zeros(NUM // 2, LENGTH), torch.ones(NUM // 2, LENGTH)], dim=1).int()
    return rows | {"segment_ids": segments, "group_ids": torch.zeros_like(segments)}


def check(ours: torch.Tensor, theirs: torch.Tensor, inputs: torch.Tensor) -> None:
    """The same loss, and the same gradient."""
    torch.testing.assert_close(ours, theirs, **NEAR)
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True)[0] for loss in (ours, theirs)]
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(*gradients, **NEAR)


@pytest.mark.parametrize(("kind", "loss"), [("sigmoid", DPOLoss(BETA)), ("ipo", IPOLoss(BETA))])
def test_dpo_and_ipo(kind: str, loss: DPOLoss, batch: dict[str, torch.Tensor]) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    own = trainer(
        beta=BETA,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
    )
    mask = batch["mask"]
    better, worse = (batch["ref_logprobs"] * mask).sum(1).chunk(2)
    inputs = {"completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)), "ref_chosen_logps": better}
    inputs |= {"ref_rejected_logps": worse, "input_ids": torch.zeros(NUM, LENGTH + 1, dtype=torch.long)}
    theirs = DPOTrainer._compute_loss(own, model_of(batch["logprobs"], mask), inputs, False)
    ours = loss(**in_pairs(batch), normalizer=NUM // 2).loss
    check(ours, theirs, batch["logprobs"])


@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_kto(kl: float, batch: dict[str, torch.Tensor]) -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    own = trainer(
        beta=BETA,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=1.5,
        undesirable_weight=0.5,
        args=SimpleNamespace(),
    )
    own._compute_kl_logps = lambda model, batch: torch.full((NUM,), kl, dtype=torch.float64)
    mask = batch["mask"]
    whole = torch.nn.functional.pad(mask.long(), (1, 0))
    inputs = {"label": batch["side"][:, 0] > 0, "completion_mask": whole, "attention_mask": torch.ones_like(whole)}
    inputs |= {"input_ids": torch.zeros_like(whole), "ref_logps": (batch["ref_logprobs"] * mask).sum(1)}
    inputs |= {"ref_KL_logps": torch.zeros(NUM, dtype=torch.float64)}
    theirs = KTOTrainer._compute_loss(own, model_of(batch["logprobs"], mask), inputs, False)
    z = torch.full((NUM, LENGTH), kl, dtype=torch.float64)
    ours = KTOLoss(BETA, 1.5, 0.5)(**batch, kl=z, normalizer=NUM).loss
    check(ours, theirs.mean(), batch["logprobs"])


LIKE_TRL: dict[str, Callable[..., PolicyLoss]] = {
    "grpo": partial(GRPOLoss, normalization="sequence"),
    "dapo": partial(DAPOLoss, clip_high=0.2),
    "dr_grpo": DrGRPOLoss,
    "cispo": partial(CISPOLoss, clip_low=1.0, clip_high=0.2),
    "sapo": SAPOLoss,
}
"""Our loss for a ``loss_type`` of theirs."""


@pytest.mark.parametrize("quantile", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", LIKE_TRL)
def test_the_tokens_in_doubt_and_the_weighted_kl(
    kind: str, weighted: bool, quantile: float, batch: dict[str, torch.Tensor]
) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    logprobs, mask = batch["logprobs"], batch["mask"]
    generator = torch.Generator().manual_seed(3)
    entropies = torch.rand((NUM, LENGTH), generator=generator).double()  # TRL finds the quantile in float32
    old = logprobs.detach() + 0.3 * torch.randn((NUM, LENGTH), generator=generator, dtype=torch.float64)
    advantages = torch.randn(NUM, generator=generator, dtype=torch.float64)
    options = {"delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "steps_per_generation": 1}
    own = trainer(
        args=SimpleNamespace(use_bias_correction_kl=weighted, **options),
        top_entropy_quantile=quantile,
        beta=BETA,
        loss_type=kind,
        epsilon_low=0.2,
        epsilon_high=1.2 if kind == "cispo" else 0.2,  # there the bound itself
        importance_sampling_level="token",
        off_policy_mask_threshold=None,
        use_vllm=False,
        max_completion_length=LENGTH,
        _entropy_bonus_enabled=False,
    )
    own.accelerator.pad_across_processes = lambda x, **unused: x
    own.accelerator.reduce = lambda x, **unused: x
    own.accelerator.num_processes = 1
    own.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, own)
    own._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, entropies, None)
    inputs = {
        "prompt_ids": torch.zeros(NUM, 1),
        "prompt_mask": torch.ones(NUM, 1),
        "completion_ids": torch.zeros_like(old),
    }
    inputs |= {"completion_mask": mask.double(), "advantages": advantages, "num_items_in_batch": mask.sum()}
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": batch["ref_logprobs"]}
    theirs = GRPOTrainer._compute_loss(own, own.model, inputs)
    least = entropy_threshold([*entropies.numpy()], [*mask.numpy()], quantile)
    ours = LIKE_TRL[kind](kl_coef=BETA, kl_weighted=weighted, max_tokens=LENGTH)(
        logprobs=logprobs,
        old_logprobs=old,
        ref_logprobs=batch["ref_logprobs"],
        advantages=advantages,
        mask=mask.double(),
        weights=(entropies >= least).double(),
    )
    assert int(((entropies >= least) & mask).sum()) == pytest.approx(quantile * int(mask.sum()), abs=1)
    check(ours.loss, theirs, logprobs)


def test_rewards_compared_apart() -> None:
    """TRL's lines of ``normalize_then_sum``. They add 1e-4 to every std and take the sample's: rewards are so large
    that 1e-4 does not matter, and advantages are compared by the std that each has."""
    from trl.trainer import grpo_trainer

    size, num_groups, weights = 5, 4, [1.0, 0.5, -0.2]
    rewards = 1e6 * torch.randn((num_groups * size, 3), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tree = ast.parse(Path(grpo_trainer.__file__).read_text())
    branches = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "normalize_then_sum" in ast.dump(node.test)
    ]
    [lines] = [node.body for node in branches]
    own = SimpleNamespace(reward_funcs=weights, reward_weights=torch.tensor(weights, dtype=torch.float64))
    given = {"self": own, "rewards_per_func": rewards, "num_generations": size, "device": torch.device("cpu")}
    given |= {"unscorable_mask": torch.zeros(len(rewards), dtype=torch.bool)}
    found = vars(grpo_trainer) | given
    exec(compile(ast.Module(lines, []), "trl", "exec"), found)
    groups = [
        {str(k): (weight, rewards[i : i + size, k].tolist()) for k, weight in enumerate(weights)}
        for i in range(0, len(rewards), size)
    ]
    ours, theirs = torch.from_numpy(np.concatenate(gdpo(groups))).double(), found["advantages"]
    torch.testing.assert_close(ours / ours.std(), theirs / theirs.std(), **NEAR)
    assert float(ours.std(correction=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward_models(center: float, batch: dict[str, torch.Tensor]) -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    values = torch.randn((NUM, 1), generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    own = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
    theirs = RewardTrainer.compute_loss(own, lambda **unused: SimpleNamespace(logits=values), {})
    last = torch.zeros(NUM, LENGTH, dtype=torch.bool)
    last[:, -1] = True
    rows = in_pairs({"values": values.expand(NUM, LENGTH), "mask": last, "side": batch["side"]})
    check(BradleyTerryLoss(center)(**rows, normalizer=NUM // 2).loss, theirs, values)


@pytest.mark.parametrize("which", ["gkd", "distillation"])
def test_the_reverse_kl_of_distillation_in_expectation(which: str) -> None:
    """What a student learns of sampled tokens, over all tokens with their probabilities, is TRL's divergence of the
    whole distributions (beta=1), and its gradient."""
    vocabulary, width, places = 11, 5, 7
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, places, width), (vocabulary, width)] * 2
    hidden, head, taught, teacher_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    hidden.requires_grad_()
    student, teacher = hidden @ head.T, taught @ teacher_head.T
    if which == "gkd":
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        theirs = GKDTrainer.generalized_jsd_loss(student, teacher, beta=1.0, num_items_in_batch=places)
    else:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        mask = torch.ones(1, places)
        theirs, *_ = _chunked_divergence_loss(hidden, taught, head, teacher_head, mask, beta=1.0)
        theirs = theirs.double()  # it is summed in float32, whatever comes in
    logprobs, of_teacher = student.log_softmax(-1)[0], teacher.log_softmax(-1)[0]  # [places, vocabulary]
    sampled = logprobs.detach()
    advantages = torch.from_numpy(advantages_of([of_teacher.numpy()], sampled.numpy(), clip=100.0))
    probabilities = sampled.exp()
    torch.testing.assert_close(-(probabilities * advantages).sum() / places, theirs.detach(), **NEAR)
    expected = ReinforceLoss()(
        logprobs=logprobs,
        old_logprobs=sampled,
        advantages=probabilities * advantages,
        mask=torch.ones_like(sampled, dtype=torch.bool),
        normalizer=places,
    ).loss
    ours, trls = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (expected, theirs))
    torch.testing.assert_close(ours, trls, **NEAR)
