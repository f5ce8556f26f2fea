"""The embedded task, reading data, rendering, and streams that go on exactly where they stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_hpc.checkpoint.episodes import dump_groups, load_groups
from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.data.builtin import addition_examples, char_tokenizer
from forge_hpc.data.hub import load_tokenizer, resolve_model
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.order import LoadedSource
from forge_hpc.data.prompts import DocumentStream, PromptStream, evaluation_documents, evaluation_prompts
from forge_hpc.data.render import PromptRenderer, sft_document
from forge_hpc.data.source import load_eval_examples, load_examples
from forge_hpc.data.types import Group


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return char_tokenizer()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a hub."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def config(**data: Any) -> Config:
    return Config(data=DataConfig(**({"chat_template": False} | data)))


def sums(examples: Any) -> set[tuple[int, int]]:
    """Operands, whatever their order."""
    return {(min(e["a"], e["b"]), max(e["a"], e["b"])) for e in examples}


# --- the embedded task


def test_held_out_sums_are_in_no_training_split_in_either_order():
    test = addition_examples("test", seed=1)
    assert len({e["question"] for e in test}) == 500
    for split in ("train", "sft"):
        examples = addition_examples(split, seed=2)
        assert not sums(examples) & sums(test)
        assert not {e["question"] for e in examples} & {e["question"] for e in test}


def test_the_held_out_sums_do_not_depend_on_the_seed():
    assert addition_examples("test", seed=1) == addition_examples("test", seed=2)
    assert addition_examples("train", seed=1) == addition_examples("train", seed=2)


def test_answers_are_right_except_the_pupils():
    for split in ("train", "test"):
        for e in addition_examples(split):
            assert e["question"] == f"{str(e['a'])[::-1]}+{str(e['b'])[::-1]}="
            assert e["answer"] == str(e["a"] + e["b"])[::-1]
    pupil = addition_examples("sft", seed=3)
    right = np.mean([e["answer"] == str(e["a"] + e["b"])[::-1] for e in pupil])
    assert 0.3 < right < 0.45
    no_carry = [e for e in pupil if e["a"] % 10 + e["b"] % 10 < 10 and e["a"] // 10 + e["b"] // 10 < 10]
    assert all(e["answer"] == str(e["a"] + e["b"])[::-1] for e in no_carry)


def test_the_pupils_slips_follow_the_seed():
    assert addition_examples("sft", seed=1) == addition_examples("sft", seed=1)
    assert addition_examples("sft", seed=1) != addition_examples("sft", seed=2)


# --- the embedded model


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_the_builtin_model_is_written_once_and_follows_the_seed(tmp_path: Path):
    first = resolve_model("builtin:qwen3-tiny", 1, tmp_path / "a")
    again = resolve_model("builtin:qwen3-tiny", 1, tmp_path / "b")
    other = resolve_model("builtin:qwen3-tiny", 2, tmp_path / "a")
    assert digest(first) == digest(again) != digest(other)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["qwen3-tiny-seed1", "qwen3-tiny-seed2"]
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("builtin:qwen3-tiny", 1, tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before


def test_the_builtin_model_and_tokenizer_load_in_transformers(tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    directory = resolve_model("builtin:qwen3-tiny", 1, tmp_path)
    tokenizer = load_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    text = "72+85=58\n Any ~ASCII~ text.  Spaces, too"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), model.config.vocab_size)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("builtin:gpt5", "unknown model"),
        ("./no/such/directory", "no such model directory"),
        ("someone/some-model", "cannot be reached"),
    ],
)
def test_a_model_that_is_not_there_is_the_users_error(path: str, message: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=message) as error:
        resolve_model(path, 0, tmp_path)
    assert error.value.hint


def test_a_model_directory_is_checked(tmp_path: Path):
    directory = resolve_model("builtin:qwen3-tiny", 1, tmp_path)
    assert resolve_model(str(directory), 0, tmp_path) == directory
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="bytes"):
        resolve_model(str(directory), 0, tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no weights"):
        resolve_model(str(directory), 0, tmp_path)


# --- sources


def write_jsonl(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_jsonl_is_read_with_the_fields_named(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", {"q": "1+1?", "a": 2, "level": "easy"}, "", {"q": "é?", "a": "ü"})
    examples = load_examples(DataConfig(path=path, prompt_field="q", target_field="a"), "train", 0)
    assert [e["q"] for e in examples] == ["1+1?", "é?"]
    assert examples[0]["level"] == "easy"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "x"', "line 2: not JSON"),
        ("[1, 2]", "line 2: not a JSON object"),
        ({"question": "x"}, "line 2: no field 'answer'"),
        ({"question": ["x"], "answer": "y"}, "line 2: the field 'question' is neither a string nor"),
        ({"question": "x", "answer": None}, "line 2: the field 'answer'"),
    ],
)
def test_a_broken_line_is_named_by_its_number(line: Any, message: str, tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", {"question": "x", "answer": "y"}, line)
    with pytest.raises(UserError, match=message) as error:
        load_examples(DataConfig(path=path), "train", 0)
    assert path in error.value.message
    assert error.value.hint


def test_bytes_that_are_not_utf8_are_a_broken_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"question": "\xff\xfe", "answer": "y"}\n')
    with pytest.raises(UserError, match="line 1: not JSON"):
        load_examples(DataConfig(path=str(path)), "train", 0)


def test_missing_empty_and_unknown_data_are_the_users_errors(tmp_path: Path):
    empty = write_jsonl(tmp_path / "empty.jsonl", "", "")
    for path, message in [
        (str(tmp_path / "none.jsonl"), "no such data file"),
        (empty, "no examples"),
        ("builtin:poetry", "unknown data"),
        (str(tmp_path), "cannot load|no examples"),
        ("someone/some-data", "cannot be reached|cannot load"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            load_examples(DataConfig(path=path), "train", 0)
        assert error.value.hint
    with pytest.raises(UserError, match="no split 'validation'"):
        load_examples(DataConfig(), "validation", 0)


def test_a_directory_of_jsonl_files_has_splits(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", {"question": "a", "answer": "b"})
    write_jsonl(tmp_path / "test.jsonl", {"question": "c", "answer": "d"})
    data = DataConfig(path=str(tmp_path))
    assert load_examples(data, "train", 0)[0]["question"] == "a"
    assert next(iter(load_eval_examples(data, 0)))["question"] == "c"


def test_one_file_is_never_trained_on_and_held_out_at_once(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", {"question": "a", "answer": "b"})
    other = write_jsonl(tmp_path / "b.jsonl", {"question": "c", "answer": "d"})
    with pytest.raises(UserError, match="no held-out prompts"):
        load_eval_examples(DataConfig(path=path), 0)
    for streaming in (False, True):
        held_out = load_eval_examples(DataConfig(path=path, eval_path=other, streaming=streaming), 0)
        assert [example["question"] for example in held_out] == ["c"]


def test_datasets_loads_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text('question,answer\n"How many?","So 3.\n#### 3"\n')
    examples = load_examples(DataConfig(path=str(tmp_path / "data")), "train", 0)
    assert len(examples) == 1
    assert examples[0]["answer"].endswith("#### 3")
    with pytest.raises(UserError, match="no field 'problem'"):
        load_examples(DataConfig(path=str(tmp_path / "data"), prompt_field="problem"), "train", 0)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_csv_and_parquet_files_are_read_whatever_the_split(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / f"sums.{suffix}"
    data = datasets.Dataset.from_list([{"question": "1+1=", "answer": "2"}])
    (data.to_csv if suffix == "csv" else data.to_parquet)(str(file))
    for streaming in (False, True):
        cfg = config(path=str(file), split="anything", streaming=streaming)
        assert next(open_sources(cfg)[0][0]).example["question"] == "1+1="
    with pytest.raises(UserError, match="holds one split"):
        load_eval_examples(cfg.data, 0)
    with pytest.raises(UserError, match="no such data file"):
        load_examples(DataConfig(path=str(tmp_path / f"none.{suffix}")), "train", 0)


# --- rendering


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_prompts_are_rendered_through_the_chat_template():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = DataConfig(system_prompt="Be brief.")
    prompt = PromptRenderer(tokenizer, data)({"question": "1+1?", "answer": 2, "level": "easy"}, 7)
    assert prompt.text == "<system>Be brief.<user>1+1?<assistant>"
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert (prompt.position, prompt.target, prompt.fields) == (7, "2", {"level": "easy"})


def test_raw_prompts_stay_as_they_are(tokenizer: Any):
    data = DataConfig(chat_template=False)
    assert PromptRenderer(tokenizer, data)({"question": "72+85=", "answer": "58"}, 0).text == "72+85="


def test_a_chat_template_that_is_missing_is_the_users_error(tokenizer: Any):
    with pytest.raises(UserError, match="no chat template"):
        PromptRenderer(tokenizer, DataConfig())
    with pytest.raises(UserError, match="system_prompt"):
        PromptRenderer(tokenizer, DataConfig(chat_template=False, system_prompt="x"))


# --- streams


def prompt_stream(examples: list[dict[str, Any]], tokenizer: Any, cfg: Config, seed: int) -> PromptStream:
    cfg = replace(cfg, seed=seed)
    return PromptStream([(LoadedSource(examples, cfg.data, [seed, 0]), 1.0)], tokenizer, cfg)


def examples(count: int) -> list[dict[str, Any]]:
    return [{"question": "x" * (i + 1), "answer": str(i)} for i in range(count)]


def targets(prompts: list[Any]) -> list[int]:
    return [int(prompt.target) for prompt in prompts]


def test_every_epoch_is_a_new_permutation_of_all_examples(tokenizer: Any):
    stream = prompt_stream(examples(20), tokenizer, config(), seed=1)
    first, second = targets(stream.take(20)), targets(stream.take(20))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(range(20))
    assert first == targets(prompt_stream(examples(20), tokenizer, config(), seed=1).take(20))
    assert first != targets(prompt_stream(examples(20), tokenizer, config(), seed=2).take(20))


def test_an_unshuffled_stream_follows_the_data(tokenizer: Any):
    stream = prompt_stream(examples(3), tokenizer, config(shuffle=False), seed=1)
    assert targets(stream.take(7)) == [0, 1, 2, 0, 1, 2, 0]


def test_a_stream_goes_on_exactly_where_another_stopped(tokenizer: Any):
    cfg = config()
    cfg.rollout.max_prompt_tokens = 15
    for stop in (0, 1, 19, 20, 33):
        stream = prompt_stream(examples(20), tokenizer, cfg, seed=1)
        stream.take(stop)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = prompt_stream(examples(20), tokenizer, cfg, seed=1).load_state_dict(state)
        assert stream.take(30) == resumed.take(30)
        assert stream.state_dict() == resumed.state_dict()


def test_a_position_in_other_data_is_refused(tokenizer: Any):
    state = prompt_stream(examples(20), tokenizer, config(), seed=1).state_dict()
    for stream in (
        prompt_stream(examples(21), tokenizer, config(), seed=1),
        prompt_stream(examples(20), tokenizer, config(), seed=2),
    ):
        with pytest.raises(UserError, match="saved position"):
            stream.load_state_dict(state)


def test_prompts_that_are_too_long_are_left_out_and_counted(tokenizer: Any):
    cfg = config()
    cfg.rollout.max_prompt_tokens = 15
    stream = prompt_stream(examples(20), tokenizer, cfg, seed=1)
    prompts = stream.take(15)
    assert sorted(targets(prompts)) == list(range(15))
    assert [prompt.position for prompt in prompts] == list(range(15))
    stream.take(15)
    assert stream.num_too_long in range(5, 11)
    cfg.rollout.max_prompt_tokens = 0
    with pytest.raises(UserError, match=r"every example is longer than rollout\.max_prompt_tokens=0"):
        stream = prompt_stream(examples(20), tokenizer, cfg, seed=1)
        next(stream)


# --- bad examples


def table(path: Path, rows: list[dict[str, Any]]) -> str:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_examples_are_left_out_counted_and_the_first_is_named(
    streaming: bool, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = [*examples(20), {"question": None, "answer": "x"}, {"question": "x", "answer": None}, *examples(20)]
    rows[5] = {"question": " ", "answer": "5"}
    path = table(tmp_path / "a.parquet", rows)
    cfg = config(path=path, streaming=streaming, shuffle=False)

    def stream() -> PromptStream:
        return PromptStream(open_sources(cfg), tokenizer, cfg)

    prompts = stream()
    assert targets(prompts.take(24)) == [*range(5), *range(6, 20), *range(5)]
    assert prompts.num_bad == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}, example 5: the prompt is empty: the example is left out; further ones are only counted"
    ]
    caplog.clear()
    resumed = stream().load_state_dict(json.loads(json.dumps(prompts.state_dict())))
    assert prompts.take(60) == resumed.take(60)
    assert prompts.num_bad == resumed.num_bad == 7
    assert not caplog.records


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_are_mostly_bad_end_the_run_with_what_is_bad(streaming: bool, tokenizer: Any, tmp_path: Path):
    rows = [{"question": "x", "answer": None if i % 5 else "y"} for i in range(300)]
    cfg = config(path=table(tmp_path / "a.parquet", rows), streaming=streaming)
    message = r"of the first \d+ examples are bad: .*a\.parquet, example \d+: the field 'answer' is no string or number"
    with pytest.raises(UserError, match=message) as error:
        PromptStream(open_sources(cfg), tokenizer, cfg).take(60)
    assert error.value.hint


def test_what_only_rendering_shows_to_be_bad_is_left_out_too():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}" + (
        "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    asked, said = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
    odd = [[asked], [asked, said | {"tool_calls": [{"name": "f"}]}], [asked, {"role": "tool", "content": "x"}, said]]
    chats = [{"messages": messages} for messages in ([asked, said], *odd, [asked, said], [asked, said])]
    cfg = config(prompt_field="messages", target_field=None, shuffle=False, chat_template=True)

    def documents(given: list[dict[str, Any]]) -> DocumentStream:
        return DocumentStream([(LoadedSource(given, cfg.data, [1, 0]), 1.0)], tokenizer, cfg)

    stream = documents(chats)
    assert len(stream.take(6)) == 6
    assert stream.num_bad == 6 and stream.state_dict()["bad"] == [[12, 6]]
    for example, reason in zip(chats[1:4], ("no turn of the assistant", "holds tool_calls", "no tools"), strict=True):
        with pytest.raises(UserError, match=f"every example is bad, or longer .*data, example 0: .*{reason}"):
            cfg.data.path = "data"
            documents([example]).take(1)
    held_out = evaluation_documents(chats, tokenizer, cfg, 5)
    assert len(held_out) == 3
    with pytest.raises(UserError, match=r"every held-out example is bad, or .*held-out example 0: .*no turn"):
        evaluation_documents(chats[1:2], tokenizer, cfg, 5)


def test_an_empty_answer_is_nothing_to_learn(tokenizer: Any):
    cfg = config()
    rows = [{"question": "x", "answer": ""}, *examples(3)]
    stream = DocumentStream([(LoadedSource(rows, cfg.data, [1, 0]), 1.0)], tokenizer, cfg)
    stream.take(6)
    assert stream.num_bad == 2


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_every_field_of_a_parquet_file_is_carried_and_comes_back_from_a_checkpoint(
    streaming: bool, tokenizer: Any, tmp_path: Path
):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "seconds": pa.array([1], pa.timestamp("s")),
        "nanoseconds": pa.array([1], pa.timestamp("ns", "Europe/Berlin")),
        "offset": pa.array([1], pa.timestamp("us", "+05:30")),
        "duration": pa.array([1], pa.duration("ns")),
        "day": pa.array([1], pa.date32()),
        "time": pa.array([1], pa.time64("us")),
        "price": pa.array([Decimal("1.10")]),
        "bytes": pa.array([b"\xff"]),
        "nested": pa.array([[{"when": datetime(2026, 1, 1)}]]),
        "null": pa.array([None], pa.timestamp("s")),
    }
    parquet.write_table(pa.table({"question": ["x"], "answer": ["y"], **columns}), tmp_path / "a.parquet")
    cfg = config(path=str(tmp_path / "a.parquet"), streaming=streaming)
    prompt = next(PromptStream(open_sources(cfg), tokenizer, cfg))
    assert prompt.fields.keys() == columns.keys()
    [loaded] = load_groups(dump_groups([Group(prompt, [])]))
    assert loaded.prompt == prompt
    assert [type(value) for value in loaded.prompt.fields.values()] == [type(v) for v in prompt.fields.values()]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("streaming", [False, True])
def test_images_stay_as_they_are_stored(streaming: bool, tokenizer: Any, tmp_path: Path):
    import datasets

    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    row = {"question": "x", "answer": "y", "image": {"bytes": b"no image", "path": None}}
    datasets.Dataset.from_list([row], features=features).to_parquet(str(tmp_path / "a.parquet"))
    cfg = config(path=str(tmp_path / "a.parquet"), streaming=streaming)
    assert next(PromptStream(open_sources(cfg), tokenizer, cfg)).fields["image"]["bytes"] == b"no image"


def test_a_field_that_no_checkpoint_can_hold_is_named(tokenizer: Any):
    cfg = config()
    stream = prompt_stream([{"question": "x", "answer": "y", "odd": object()}], tokenizer, cfg, seed=1)
    with pytest.raises(UserError, match="a field holds object"):
        next(stream)


DAMAGES = {
    "cut.parquet": lambda whole: whole[: len(whole) // 2],
    "torn.parquet": lambda whole: whole[: len(whole) // 2] + b"\x55" * 999 + whole[len(whole) // 2 + 999 :],
    "nothing.parquet": lambda whole: b"",
    "nothing.csv": lambda whole: b"",
    "wide.csv": lambda whole: b"question,answer\n" + b"a,b\n" * 20_000 + b"a,b,c,d\n",
    "latin.csv": lambda whole: b"question,answer\n" + b"a,b\n" * 20_000 + b"\xff,b\n",
    "parquet.csv": lambda whole: whole,
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_named(name: str, streaming: bool, tokenizer: Any, tmp_path: Path):
    rng = np.random.default_rng(0)
    rows = [{"question": rng.bytes(20).hex(), "answer": str(i)} for i in range(2000)]
    whole = Path(table(tmp_path / "whole.parquet", rows)).read_bytes()
    (tmp_path / name).write_bytes(DAMAGES[name](whole))
    cfg = config(path=str(tmp_path / name), streaming=streaming)
    with pytest.raises(UserError) as error:
        PromptStream(open_sources(cfg), tokenizer, cfg).take(30_000)
    assert f"cannot read {tmp_path / name}: " in error.value.message and "\n" not in error.value.message
    assert "download it again" in (error.value.hint or "")


@pytest.mark.usefixtures("cache")
def test_a_damaged_file_of_held_out_examples_is_named_while_it_is_streamed(tokenizer: Any, tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(DAMAGES["wide.csv"](b""))
    cfg = config(eval_path=str(tmp_path / "a.csv"), streaming=True)
    with pytest.raises(UserError, match=r"cannot read .*a\.csv"):
        evaluation_prompts(load_eval_examples(cfg.data, 0), tokenizer, cfg, 30_000)


def test_evaluation_takes_the_first_prompts_that_fit(tokenizer: Any):
    cfg = config()
    cfg.rollout.max_prompt_tokens = 5
    assert targets(evaluation_prompts(examples(20), tokenizer, cfg, 3)) == [0, 1, 2]
    assert targets(evaluation_prompts(examples(20), tokenizer, cfg, 10)) == [0, 1, 2, 3, 4]


def test_sft_learns_the_answer_and_the_end(tokenizer: Any):
    prompt = next(prompt_stream([{"question": "72+85=", "answer": "58"}], tokenizer, config(), seed=0))
    document = sft_document(prompt, tokenizer)
    assert tokenizer.decode(document.token_ids) == "72+85=58<eos>"
    assert document.token_ids[document.loss_mask].tolist() == [*tokenizer.encode("58"), tokenizer.eos_token_id]
    assert document.generator_logprobs is None


def test_a_document_stream_resumes_and_leaves_out_what_fits_no_row(tokenizer: Any):
    def stream(seq_len: int = 12) -> DocumentStream:
        cfg = config()
        cfg.trainer.training.seq_len = seq_len
        cfg.rollout.max_prompt_tokens = 1  # of no concern to SFT
        return DocumentStream([(LoadedSource(examples(20), cfg.data, [1, 0]), 1.0)], tokenizer, cfg)

    one, other = stream(), stream()
    taken = one.take(25)
    assert max(len(document.token_ids) for document in taken) == 12
    assert one.num_too_long > 0
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [d.token_ids.tolist() for d in one.take(30)] == [d.token_ids.tolist() for d in other.take(30)]
    with pytest.raises(UserError, match=r"every example is longer than trainer\.training\.seq_len=2"):
        stream(seq_len=2).take(1)


def test_evaluation_documents_are_the_first_that_fit(tokenizer: Any):
    cfg = config()
    cfg.trainer.training.seq_len = 8
    documents = evaluation_documents(examples(20), tokenizer, cfg, 3)
    assert [tokenizer.decode(d.token_ids[d.loss_mask]) for d in documents] == ["0<eos>", "1<eos>", "2<eos>"]
    assert len(evaluation_documents(examples(20), tokenizer, cfg, 10)) == 6
    cfg.trainer.training.seq_len = 2
    with pytest.raises(UserError, match="every held-out example is longer"):
        evaluation_documents(examples(20), tokenizer, cfg, 3)


def test_the_demo_trains_on_no_held_out_prompt(tokenizer: Any):
    demo = DataConfig(chat_template=False)
    held_out = {e["question"] for e in load_eval_examples(demo, 5)}
    for split in ("train", "sft"):
        cfg = Config(data=replace(demo, split=split))
        cfg.seed = 5
        stream = PromptStream(open_sources(cfg), tokenizer, cfg)
        assert not held_out & {prompt.text for prompt in stream.take(8000)}
