"""A reward model: its run, its export in transformers' hands, and another run that it rewards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import DEMO, PROJECT, read, run_local, small_run, unexplained_metrics
from test_end_to_end import check_same

from forge_hpc.config import UserError, load_config, read_config, validate
from forge_hpc.config.needs import ModelNeed
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import SamplingConfig
from forge_hpc.data.builtin import addition_pairs, char_tokenizer, write_tiny_qwen3
from forge_hpc.data.hub import resolve_model
from forge_hpc.data.pairs import PairRenderer, at_its_end
from forge_hpc.losses.bradley_terry import BradleyTerryLoss
from forge_hpc.training.frozen import FrozenModel
from forge_hpc.training.offline import export_checkpoint

pytestmark = pytest.mark.timeout(900)
CONFIG, GRPO = PROJECT / "configs/reward_model/demo.yaml", PROJECT / "configs/reward_model/grpo.yaml"
REWARDS = 'reward=[{{name: exact, weight: 0}}, {{name: model, weight: 2, path: "{}"}}]'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a reward model."""
    run_dir = tmp_path_factory.mktemp("reward-model") / "run"
    overrides = ["model.path=builtin:qwen3-tiny", "trainer.training.steps=12", "trainer.lr_scheduler.warmup_steps=0"]
    overrides += ["trainer.training.global_batch_size=16", "evaluation.interval=6", "evaluation.num_prompts=40"]
    done = run_local(run_dir, overrides, config=CONFIG)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


@pytest.mark.parametrize("center", [0.0, 0.01])
def test_the_loss_equals_its_formula(center: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((2, 12), generator=generator, dtype=torch.float64, requires_grad=True)
    side, mask = torch.zeros(2, 12, dtype=torch.float64), torch.zeros(2, 12, dtype=torch.bool)
    groups = torch.tensor([[1] * 6 + [2] * 6, [1] * 8 + [0] * 4])
    places = [(0, 2, 5), (0, 8, 11), (1, 3, 7)]
    for row, better, worse in places:
        mask[row, [better, worse]] = True
        side[row, better], side[row, worse] = 1, -1
    pairs = [(values[row, better], values[row, worse]) for row, better, worse in places]
    expected = torch.stack([-torch.log(torch.sigmoid(b - w)) + center * (b + w) ** 2 for b, w in pairs]).mean()
    output = BradleyTerryLoss(center)(values=values, side=side, mask=mask, group_ids=groups, normalizer=3)
    torch.testing.assert_close(output.loss, expected)
    ours, theirs = (torch.autograd.grad(value, values, retain_graph=True)[0] for value in (output.loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert output.metrics["preference/accuracy"].item() == pytest.approx(np.mean([float(b > w) for b, w in pairs]))


@pytest.mark.slow
def test_its_run_learns_from_pairs_and_says_how_well(trained: Path) -> None:
    assert not unexplained_metrics(trained)
    assert read(trained)[0]["loss"] == pytest.approx(np.log(2))
    figures = read(trained, "evaluations.jsonl")
    assert [line["step"] for line in figures] == [0, 6, 12]
    assert figures[0]["loss"] == pytest.approx(np.log(2)) and figures[-1]["loss"] < figures[0]["loss"]
    assert figures[0]["preference/accuracy"] == 0 < figures[-1]["preference/accuracy"]


@pytest.mark.slow
def test_transformers_and_a_frozen_model_give_an_answer_what_its_export_says(
    trained: Path, process_group: None
) -> None:
    from transformers import AutoModelForSequenceClassification

    from forge_hpc.rewards.model import ModelReward

    export, tokenizer = trained / "export", char_tokenizer()
    config = load_config(CONFIG, ["trainer.training.seq_len=64"])
    need = ModelNeed(trained=False, head="value", path=str(export))
    frozen = FrozenModel(config, export, need, SamplingConfig())
    example = addition_pairs("test")[0]
    pair = PairRenderer(tokenizer, config.data, "rejected")(example)
    values = [value[-1] for value in frozen.values([at_its_end(document) for document in pair])]
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    with torch.no_grad():
        theirs = [model(torch.tensor([d.token_ids.tolist()])).logits.item() for d in pair]
    np.testing.assert_allclose(values, theirs, atol=1e-5)
    assert values[0] != pytest.approx(values[1], abs=1e-3)
    outside = ModelReward(str(export))(example["prompt"], example["chosen"], "")
    assert outside == pytest.approx(values[0], abs=1e-5)
    plain = write_tiny_qwen3(trained / "plain", 0)
    with pytest.raises(UserError, match="has no value head"):
        FrozenModel(config, plain, need, SamplingConfig())


@pytest.mark.slow
def test_a_checkpoint_of_it_is_exported_as_the_run_itself_does(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints/step-00000012/trainer"
    config = read_config(trained / "config.yaml")
    started_from = resolve_model(config.model.path, config.seed, trained / "model")
    export_checkpoint(config, started_from, checkpoint, tmp_path / "export")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (trained / "export" / name).read_bytes()


@pytest.fixture(scope="module")
def rewarded(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a policy that it rewards."""
    return run_rewarded(trained, tmp_path_factory.mktemp("rewarded"))


def run_rewarded(trained: Path, directory: Path) -> Path:
    overrides = [o for o in small_run(directory, 3, "checkpoint.interval=0") if not o.startswith("reward=")]
    overrides += [REWARDS.format(trained / "export"), "rollout.prompts_per_step=8"]
    overrides += ["algorithm.sft={coef: 0.1, documents: 4}"]  # examples beside the episodes, too
    overrides += ["logging.num_rollouts_per_step=8", "logging.num_groups_per_step=8"]
    done = run_local(directory / "run", overrides, config=GRPO)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "run"


@pytest.mark.slow
def test_two_synchronous_runs_that_it_rewards_repeat_each_other(trained: Path, rewarded: Path, tmp_path: Path) -> None:
    again = run_rewarded(trained, tmp_path)
    check_same(rewarded, again)
    keys = ("step", "position", "completion", "reward", "rewards")
    ours, theirs = ([[r[key] for key in keys] for r in read(run, "rollouts.jsonl")] for run in (rewarded, again))
    assert ours == theirs and len(ours) > 32


@pytest.mark.slow
def test_a_run_that_it_rewards_adds_its_value_to_each_episode(rewarded: Path) -> None:
    run_dir = rewarded
    assert not unexplained_metrics(run_dir)
    rollouts = read(run_dir, "rollouts.jsonl")
    assert len({record["rewards"]["model"] for record in rollouts}) > 8
    for record in rollouts:
        assert record["reward"] == pytest.approx(2 * record["rewards"]["model"], rel=1e-5)
    assert all(record["reward/mean"] == pytest.approx(2 * record["reward/model"], rel=1e-4) for record in read(run_dir))
    assert [p.name for p in run_dir.glob("logs/*/frozen-0.log")]
    assert all(record["sft/loss"] > 1 for record in read(run_dir))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["reward=[{name: exact}, {name: model}]"], "the reward `model` has no path"),
        (["reward=[{name: exact, path: x}]"], r"reward.0.path is of the reward `model`"),
        (["reward=[{name: model, path: 'builtin:qwen3-tiny'}]"], "takes the first reward for what is right"),
        ([REWARDS.format("builtin:qwen3-tiny"), "algorithm.dynamic_sampling=true"], "dynamic_sampling asks whether"),
        ([REWARDS.format("builtin:qwen3-tiny"), "recipe=sft"], "is for what the policy samples, and recipe=sft"),
        ([REWARDS.format("./nowhere")], "the model 'reward_model' of the recipe: no such directory"),
    ],
    ids=["no path", "another's path", "nothing that is right", "dynamic sampling", "sft", "no such directory"],
)
def test_what_a_reward_model_cannot_be_is_said_before_the_queue(overrides: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        validate(load_config(DEMO, ["model.path=builtin:qwen3-tiny", *overrides]))


def test_the_model_of_the_reward_is_one_of_the_runs_models() -> None:
    config = load_config(GRPO)
    validate(config)
    assert needs_of(config).models["reward_model"] == ModelNeed(False, "builtin:qwen3-tiny", "value")
