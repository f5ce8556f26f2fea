"""Whole SFT runs on this machine: validation, export, and a resume that goes on exactly."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import read, run_local, start_local, status, unexplained_metrics, wait_for
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from forge_hpc.config import read_config
from forge_hpc.data.builtin import char_tokenizer, write_tiny_qwen3
from forge_hpc.data.hub import load_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream, evaluation_documents
from forge_hpc.data.source import load_eval_examples
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
STEPS = 24


def sft_run(directory: Path) -> list[str]:
    """Overrides of the demo's configuration: chats from a file, held-out ones from another."""
    chat = [{"role": "user", "content": "1+{}="}, {"role": "assistant", "content": "{}"}]
    for name, numbers in (("train", range(100, 160)), ("test", range(160, 170))):
        chats = ([m | {"content": m["content"].format(i)} for m in chat * 2] for i in numbers)
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in chats))
    return [
        "recipe=sft",
        "model.path=" + str(chat_model(directory)),
        f"data.path={directory}/train.jsonl",
        f"data.eval_path={directory}/test.jsonl",
        "data.prompt_field=messages",
        "data.target_field=null",
        "data.chat_template=true",
        f"trainer.training.steps={STEPS}",
        "trainer.training.global_batch_size=16",
        "trainer.lr_scheduler.warmup_steps=0",
        "checkpoint.interval=4",
        "evaluation.interval=8",
        "evaluation.num_prompts=10",
    ]


def chat_model(directory: Path, end: str = "<eos>") -> Path:
    """The embedded model with a chat template, in which ``end`` ends each turn."""
    path = write_tiny_qwen3(directory / "model", seed=1)
    tokenizer = char_tokenizer()
    if end != "<eos>":
        tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}" + end + "{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer.save_pretrained(path)
    return path


def test_what_has_learned_chats_stops_at_the_end_of_its_turn(tmp_path: Path) -> None:
    run_dir, overrides = tmp_path / "run", sft_run(tmp_path)
    chat_model(tmp_path, end="<|im_end|>")
    again = run_local(run_dir, [*overrides, "evaluation.num_prompts=0", "trainer.training.steps=60"])
    assert again.returncode == 0, again.stdout + again.stderr
    tokenizer = load_tokenizer(run_dir / "export")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    assert model.generation_config.eos_token_id == [end, tokenizer.eos_token_id]
    chat = [{"role": "user", "content": "1+123="}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    [tokens] = model.generate(**prompt, max_new_tokens=50, do_sample=False)
    assert len(tokens) < len(prompt["input_ids"][0]) + 10 and tokens[-1] == end


def interrupted(run_dir: Path, overrides: list[str], step: int) -> int:
    """Start a run, and stop it once it has done ``step`` steps; how many it has."""
    run = start_local(run_dir, overrides)
    try:
        wait_for(lambda: len(read(run_dir)) >= step or run.poll() is not None, f"step {step}")
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=120)
    finally:
        run.kill()
    assert status(run_dir)["state"] == "cancelled", out + err
    assert step <= len(read(run_dir)) == status(run_dir)["step"] < STEPS
    return len(read(run_dir))


def test_a_run_stopped_on_one_rank_and_again_on_two_validates_goes_on_with_one_and_exports(tmp_path: Path) -> None:
    """What nodes with another number of GPUs are to a run: ranks, each with its shards of what others have saved."""
    run_dir, overrides = tmp_path / "run", sft_run(tmp_path)
    first = interrupted(run_dir, overrides, 4)
    second = interrupted(run_dir, [*overrides, "trainer.processes_per_node=2"], first + 4)
    again = run_local(run_dir, overrides)
    assert again.returncode == 0, again.stdout + again.stderr
    for start, (step, ranks) in enumerate(((0, 1), (first, 2), (second, 1))):
        logs = run_dir / f"logs/local.{start}"
        assert {path.stem for path in logs.glob("trainer-*.log")} == {f"trainer-{rank}" for rank in range(ranks)}
        assert step == 0 or f"resuming after step {step} from" in (logs / "controller.log").read_text()
    changed = [record["changes"] for record in read(run_dir, "starts.jsonl") if record["event"] == "changed"]
    assert changed == [
        ["trainer.processes_per_node: null -> 2 (may change the last bit)"],
        ["trainer.processes_per_node: 2 -> null (may change the last bit)"],
    ]

    assert not unexplained_metrics(run_dir)
    metrics, evaluations, weights = in_one_process(run_dir, tmp_path)
    assert [record["step"] for record in read(run_dir)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(read(run_dir), metrics, strict=True):
        assert ours["tokens/trained"] == theirs["tokens/trained"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    ours = {record["step"]: record["loss"] for record in read(run_dir, "evaluations.jsonl")}
    assert ours == pytest.approx(evaluations, rel=1e-4)
    assert ours[STEPS] < ours[0] - 0.5
    exported = load_file(run_dir / "export/model.safetensors")
    for name, weight in exported.items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-3)
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (run_dir / "export").iterdir()}


def in_one_process(run_dir: Path, tmp_path: Path) -> tuple[list[dict], dict[int, float], dict[str, torch.Tensor]]:
    """The run's steps without interruption, actors or files: metrics, validation losses by step, final weights."""
    config = read_config(run_dir / "config.yaml")
    tokenizer = load_tokenizer(config.model.path)
    init_distributed(tmp_path / "store", rank=0, world_size=1, local_rank=0)
    try:
        engine = TrainEngine(config, Path(config.model.path))
        documents = DocumentStream(open_sources(config), tokenizer, config)
        held_out = evaluation_documents(load_eval_examples(config.data, config.seed), tokenizer, config, 10)
        metrics, losses = [], {0: engine.eval_loss(held_out)}
        for step in range(1, STEPS + 1):
            metrics.append(engine.train_step(documents.take(16)))
            if step % 8 == 0:
                losses[step] = engine.eval_loss(held_out)
        return metrics, losses, engine.hf_state_dict()
    finally:
        dist.destroy_process_group()
