"""Data of pairs: which formats there are, what is left out, and a run of offline DPO that goes on exactly."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import PROJECT, read, run_local, start_local, status, unexplained_metrics, wait_for

from forge_hpc.config import Config, UserError, load_config, validate
from forge_hpc.config.recipes import load_recipe
from forge_hpc.config.schema import DataConfig
from forge_hpc.data.bad import BadExample
from forge_hpc.data.builtin import addition_examples, addition_pairs, char_tokenizer
from forge_hpc.data.order import LoadedSource
from forge_hpc.data.pairs import LabelRenderer, PairRenderer, exchanged
from forge_hpc.data.prompts import DocumentStream, evaluation_documents

PLAIN = DataConfig(prompt_field="prompt", target_field="chosen", chat_template=False)
CHAT = DataConfig(prompt_field="prompt", target_field="chosen")
USER = {"role": "user", "content": "1+1="}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chat_tokenizer() -> Any:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<eos>{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}a:{% endif %}"
    return tokenizer


def config_of(**data: Any) -> Config:
    config = Config(recipe="dpo", data=DataConfig(**(vars(PLAIN) | data)))
    config.trainer.training.seq_len = 16
    return config


def stream_of(examples: list[dict[str, Any]], config: Config) -> DocumentStream:
    source = LoadedSource(examples, config.data, [0, 0])
    return DocumentStream([(source, 1.0)], char_tokenizer(), config, load_recipe(config).renderer)


def test_a_pair_is_two_documents_of_one_group_the_better_one_first() -> None:
    tokenizer = char_tokenizer()
    better, worse = PairRenderer(tokenizer, PLAIN, "rejected")({"prompt": "1+1=", "chosen": "2", "rejected": "30"})
    assert [tokenizer.decode(d.token_ids) for d in (better, worse)] == ["1+1=2<eos>", "1+1=30<eos>"]
    assert [tokenizer.decode(d.token_ids[d.loss_mask]) for d in (better, worse)] == ["2<eos>", "30<eos>"]
    assert (better.columns, worse.columns, better.group == worse.group) == ({"side": 1.0}, {"side": -1.0}, True)


@pytest.mark.parametrize(
    "example",
    [
        {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        {"prompt": [USER], "chosen": [said("2")], "rejected": [said("3")]},
        {"prompt": "anything", "chosen": [USER, said("2")], "rejected": [USER, said("3")]},
        {"prompt": [USER], "chosen": [said("2")], "rejected": "3"},
    ],
    ids=["text", "messages", "whole chats", "both"],
)
def test_chats_come_as_text_as_messages_or_whole(example: dict[str, Any]) -> None:
    tokenizer = chat_tokenizer()
    pair = PairRenderer(tokenizer, CHAT, "rejected")(example)
    assert [tokenizer.decode(d.token_ids) for d in pair] == ["u:1+1=<eos>a:2<eos>", "u:1+1=<eos>a:3<eos>"]
    assert [tokenizer.decode(d.token_ids[d.loss_mask]) for d in pair] == ["2<eos>", "3<eos>"]


@pytest.mark.parametrize(
    ("example", "why"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "2"}, "the two answers are equal"),
        ({"prompt": "", "chosen": [USER, said("2")], "rejected": [USER, said("2")]}, "the two answers are equal"),
        ({"prompt": "", "chosen": [USER, said("2")], "rejected": [USER, USER, said("2")]}, "do not part at a turn"),
        ({"prompt": "1+1=", "chosen": "2"}, "no field 'rejected'"),
        ({"prompt": "1+1=", "chosen": "2", "rejected": ""}, "is empty"),
    ],
    ids=["equal", "equal chats", "other questions", "missing", "empty"],
)
def test_a_pair_that_says_nothing_is_named(example: dict[str, Any], why: str) -> None:
    with pytest.raises(BadExample, match=f"^data.jsonl, example 7: .*{why}") as refused:
        PairRenderer(chat_tokenizer(), CHAT, "rejected")(example, "data.jsonl, example 7")
    assert "no field" not in why or "recipe_args.rejected" in str(refused.value.hint)


def test_pairs_with_equal_answers_and_those_longer_than_a_row_are_left_out_whole_and_counted() -> None:
    good = [{"prompt": f"{i}=", "chosen": "1", "rejected": "2"} for i in range(8)]
    equal, long = good[0] | {"rejected": "1"}, good[0] | {"rejected": "2" * 12}
    stream = stream_of([*good, equal, long], config_of(shuffle=False))
    first, second = stream.take(16), stream.take(4)
    assert [document.columns["side"] for document in first + second] == [1.0, -1.0] * 10
    assert len({document.group for document in first}) == 8
    assert stream.metrics() == {"examples/too_long": 2, "examples/bad": 1}
    again = stream_of([*good, equal, long], config_of(shuffle=False)).load_state_dict(stream.state_dict())
    for ours, theirs in zip(stream.take(6), again.take(6), strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist() and ours.group == theirs.group


def test_data_of_which_most_pairs_are_equal_end_the_run_with_one_line() -> None:
    stream = stream_of([{"prompt": "1=", "chosen": "1", "rejected": "1"}] * 80, config_of())
    with pytest.raises(UserError, match=r"51 of the first 51 examples are bad: .*the two answers are equal"):
        for _ in range(100):
            next(stream)


def test_an_evaluation_takes_so_many_pairs_and_no_half_ones() -> None:
    config = config_of()
    config.trainer.training.seq_len = 32
    render = load_recipe(config).renderer
    held_out = evaluation_documents(addition_pairs("test"), char_tokenizer(), config, 5, render)
    assert [document.columns["side"] for document in held_out] == [1.0, -1.0] * 5
    assert [document.group for document in held_out] == [i // 2 for i in range(10)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_embedded_pairs_are_the_demos_sums_with_a_right_and_a_wrong_answer(split: str) -> None:
    pairs, sums = addition_pairs(split), addition_examples(split)
    assert [(p["prompt"], p["chosen"]) for p in pairs] == [(s["question"], s["answer"]) for s in sums]
    assert all(p["chosen"] != p["rejected"] for p in pairs)


def test_the_two_answers_need_two_fields() -> None:
    with pytest.raises(UserError, match=r"data\.target_field is rejected"):
        validate(load_config(PROJECT / "configs/dpo/demo.yaml", ["data.target_field=rejected"]))
    whole_chats = ["model.path=builtin:qwen3-tiny", "data.prompt_field=chosen"]
    with pytest.raises(UserError, match="no prompts to answer at the end"):
        validate(load_config(PROJECT / "configs/dpo/demo.yaml", whole_chats))
    validate(load_config(PROJECT / "configs/dpo/demo.yaml", [*whole_chats, "reward=[]"]))


def test_an_answer_with_a_label_has_its_side_and_another_word_for_one_is_named() -> None:
    data = DataConfig(prompt_field="prompt", target_field="answer", chat_template=False)
    render = LabelRenderer(char_tokenizer(), data, "label")
    for label, side in ((True, 1.0), ("true", 1.0), (1, 1.0), (False, -1.0), (0.0, -1.0), ("False", -1.0)):
        [document] = render({"prompt": "1+1=", "answer": "2", "label": label})
        assert (document.columns, document.group) == ({"side": side}, None)
    with pytest.raises(BadExample, match="the label is 'good'"):
        render({"prompt": "1+1=", "answer": "2", "label": "good"})
    with pytest.raises(BadExample, match="no field 'label'"):
        render({"prompt": "1+1=", "answer": "2"})


def test_the_divergence_of_kto_is_asked_of_prompts_with_the_answers_of_each_other() -> None:
    tokenizer = char_tokenizer()
    render = LabelRenderer(tokenizer, replace(PLAIN, target_field="answer"), "label")
    examples = [{"prompt": f"{i}=", "answer": str(i) * i, "label": True} for i in (1, 2, 3)]
    others = exchanged([render(example)[0] for example in examples], 6)
    assert [tokenizer.decode(d.token_ids) for d in others] == ["1=333<eos>", "2=1<eos>", "3=22<eos>"]
    assert [tokenizer.decode(d.token_ids[d.loss_mask]) for d in others] == ["333<eos>", "1<eos>", "22<eos>"]
    assert len(exchanged([render(example)[0] for example in examples], 5)) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_pairs_that_was_interrupted_goes_on_exactly(tmp_path: Path) -> None:
    overrides = [
        "model.path=builtin:qwen3-tiny",
        "trainer.training.steps=24",
        "trainer.training.global_batch_size=16",
        "checkpoint.interval=4",
        "evaluation.interval=8",
        "evaluation.num_prompts=8",
        "reward=[]",
    ]
    config, stopped, whole = PROJECT / "configs/dpo/demo.yaml", tmp_path / "stopped", tmp_path / "whole"
    run = start_local(stopped, overrides, config)
    try:
        wait_for(lambda: len(read(stopped)) >= 3 or run.poll() is not None, "the third step")
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=120)
    finally:
        run.kill()
    assert 3 <= status(stopped)["step"] < 24
    for directory in (stopped, whole):
        done = run_local(directory, overrides, config=config)
        assert done.returncode == 0, done.stdout + done.stderr
    assert not unexplained_metrics(whole)
    losses = [[record["loss"] for record in read(directory)] for directory in (stopped, whole)]
    assert losses[0] == losses[1] and losses[0][0] == pytest.approx(np.log(2), abs=1e-6)
    figures = [read(directory, "evaluations.jsonl") for directory in (stopped, whole)]
    assert [f["dpo/margin"] for f in figures[0]] == [f["dpo/margin"] for f in figures[1]]
    assert [f["step"] for f in figures[1]] == [0, 8, 16, 24]
    assert figures[1][0]["dpo/margin"] == 0 and max(record["dpo/margin"] for record in read(whole)) > 0.1
    exports = [(directory / "export/model.safetensors").read_bytes() for directory in (stopped, whole)]
    assert exports[0] == exports[1]
    assert json.loads((whole / "export/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
