"""DPO, IPO and KTO against their formulas in float64, and generalised advantages against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forge_hpc.losses.dpo import DPOLoss, IPOLoss
from forge_hpc.losses.kto import KTOLoss
from forge_hpc.recipes.ppo import gae


@pytest.mark.parametrize("loss", [DPOLoss(beta=0.3), IPOLoss(beta=0.3)], ids=["dpo", "ipo"])
def test_a_loss_on_pairs_equals_its_formula(loss: DPOLoss) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [[(3, 5), (4, 4)], [(6, 2)]]  # two pairs in a row, one in the other, and padding
    shape = (2, 20)
    logprobs, ref = (-3 * torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    logprobs.requires_grad_()
    side = torch.zeros(shape, dtype=torch.float64)
    segments, groups = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    losses, right = [], 0
    for row, pairs in enumerate(lengths):
        start = segment = 0
        for group, pair in enumerate(pairs, 1):
            margin: torch.Tensor | float = 0.0
            for sign, length in zip((1, -1), pair, strict=True):
                slots = slice(start, start := start + length)
                segment += 1
                side[row, slots], segments[row, slots], groups[row, slots] = sign, segment, group
                ratio = (logprobs - ref)[row, slots]
                margin = margin + sign * (ratio.mean() if isinstance(loss, IPOLoss) else ratio.sum())
            right += int(margin > 0)
            is_ipo = isinstance(loss, IPOLoss)
            losses.append((margin - 1 / 0.6) ** 2 if is_ipo else -torch.log(torch.sigmoid(0.3 * margin)))
    expected = torch.stack(losses).mean()
    inputs = {"logprobs": logprobs, "ref_logprobs": ref, "side": side, "segment_ids": segments, "group_ids": groups}
    output = loss(**inputs, mask=segments > 0, normalizer=3)
    numbers = loss(**inputs, mask=(segments > 0).float(), normalizer=3)  # a mask of numbers
    torch.testing.assert_close(numbers.loss, output.loss, rtol=0, atol=0)
    torch.testing.assert_close(output.loss, expected)
    ours, theirs = (torch.autograd.grad(value, logprobs, retain_graph=True)[0] for value in (output.loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert output.metrics["dpo/accuracy"].item() == pytest.approx(right / 3)


def test_the_loss_on_labels_equals_its_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    logprobs, ref = (-3 * torch.rand((2, 10), generator=generator, dtype=torch.float64) for _ in range(2))
    logprobs.requires_grad_()
    segments, side = torch.zeros((2, 10), dtype=torch.int32), torch.zeros((2, 10), dtype=torch.float64)
    losses, right = [], 0
    for row, slots, sign in ((0, slice(0, 4), 1), (0, slice(4, 9), -1), (1, slice(0, 7), -1)):
        segments[row, slots], side[row, slots] = slots.start + 1, sign
        distance = (logprobs - ref)[row, slots].sum() - 0.4
        losses.append((2.0 if sign > 0 else 0.5) * (1 - torch.sigmoid(0.3 * sign * distance)))
        right += int(sign * distance > 0)
    expected = torch.stack(losses).mean()
    output = KTOLoss(0.3, 2.0, 0.5)(
        logprobs=logprobs,
        ref_logprobs=ref,
        side=side,
        kl=torch.full_like(side, 0.4),
        mask=segments > 0,
        segment_ids=segments,
        normalizer=3,
    )
    torch.testing.assert_close(output.loss, expected)
    ours, theirs = (torch.autograd.grad(value, logprobs, retain_graph=True)[0] for value in (output.loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert output.metrics["kto/accuracy"].item() == pytest.approx(right / 3)


def test_generalised_advantages_are_discounted_sums_of_the_errors_of_the_critic() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=6), rng.normal(size=6)
    gamma, lam = 0.9, 0.8
    deltas = rewards + gamma * np.append(values[1:], 0) - values
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 6)) for t in range(6)]
    advantages, returns = gae(rewards, values, gamma, lam)
    np.testing.assert_allclose(advantages, expected)
    np.testing.assert_allclose(returns, expected + values)
    plain, _ = gae(rewards, values, 1.0, 1.0)
    np.testing.assert_allclose(plain, np.cumsum(rewards[::-1])[::-1] - values)
