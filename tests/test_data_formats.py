"""One example means the same, whatever format it was written in: a table over values and formats."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig, SourceConfig
from forge_hpc.config.validate import validate
from forge_hpc.data.bad import BadExample
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream, PromptStream, evaluation_prompts
from forge_hpc.data.source import load_eval_examples, load_examples
from forge_hpc.data.types import Prompt

Row = dict[str, Any]
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2?"}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def jsonl(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_jsonl(directory: Path, rows: list[Row]) -> Path:
    (directory / "a.jsonl").write_text(jsonl(rows))
    return directory / "a.jsonl"


def write_array(directory: Path, rows: list[Row]) -> Path:
    (directory / "a.json").write_text(json.dumps(rows, indent=1))
    return directory / "a.json"


def write_csv(directory: Path, rows: list[Row]) -> Path:
    """Lists and objects as JSON text: CSV has nothing else for them."""
    with (directory / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()})
    return directory / "a.csv"


def write_splits(directory: Path, rows: list[Row]) -> Path:
    (directory / "split").mkdir()
    (directory / "split" / "train.jsonl").write_text(jsonl(rows))
    return directory / "split"


def write_shards(directory: Path, rows: list[Row]) -> Path:
    """As ``hf download`` leaves a dataset: its files in a folder, whose names tell the split; one is compressed."""
    (directory / "data").mkdir()
    (directory / "data" / "train-00000-of-00002.jsonl").write_text(jsonl(rows[:1]))
    with gzip.open(directory / "data" / "train-00001-of-00002.jsonl.gz", "wt") as file:
        file.write(jsonl(rows[1:]))
    (directory / "data" / "test-00000-of-00001.json").write_text(json.dumps(rows))
    return directory


def write_csv_directory(directory: Path, rows: list[Row]) -> Path:
    (directory / "data").mkdir()
    write_csv(directory, rows).rename(directory / "data" / "train.csv")
    return directory


def write_parquet(directory: Path, rows: list[Row]) -> Path:
    """Columns have types here: for values of several kinds they hold JSON text."""
    import datasets

    if len({type(row["answer"]) for row in rows}) > 1:
        rows = [row | {"answer": json.dumps(row["answer"])} for row in rows]
    datasets.Dataset.from_list(rows).to_parquet(str(directory / "a.parquet"))
    return directory / "a.parquet"


FORMATS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "JSONL": write_jsonl,
    "JSON array": write_array,
    "CSV": write_csv,
    "directory of splits": write_splits,
    "directory of shards": write_shards,
    "directory with CSV": write_csv_directory,
    "Parquet": write_parquet,
}
VALUES: dict[str, tuple[list[Any], list[str]]] = {
    "texts that look like numbers": (["073", "1.10"], ["073", "1.10"]),
    "texts that look like nothing": (["None", "NA", "null", "nan"], ["None", "NA", "null", "nan"]),
    "texts that look like days": (["2024-01-01", "2024-01-02"], ["2024-01-01", "2024-01-02"]),
    "texts that look like moments": (["2024-01-01 10:00:00"], ["2024-01-01 10:00:00"]),
    "numbers": ([12, 7], ["12", "7"]),
    "large numbers": ([2**53 + 1, 2**62], [str(2**53 + 1), str(2**62)]),
    "fractions": ([0.5, 1e-05], ["0.5", "1e-05"]),
    "truths": ([True, False], ["True", "False"]),
}
MIXED: dict[str, tuple[list[Any], list[str]]] = {
    "texts and numbers": (["12", 12, "x"], ["12", "12", "x"]),
    "numbers beyond 64 bits": ([2**63, 12345678901234567890123], [str(2**63), "12345678901234567890123"]),
    "whole numbers and fractions": ([1, 1.5], ["1", "1.5"]),
}


def stream(path: Path, streaming: bool, **data: Any) -> PromptStream:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    cfg = Config(data=DataConfig(path=str(path), streaming=streaming, shuffle=False, **data))
    validate_data(cfg)
    return PromptStream(open_sources(cfg), tokenizer, cfg)


def validate_data(cfg: Config) -> None:
    """What the submission checks must not refuse what the run would take."""
    cfg.evaluation.num_prompts = 0
    validate(cfg)


def read_prompts(path: Path, count: int, streaming: bool, **data: Any) -> list[Prompt]:
    return stream(path, streaming, **data).take(count)


@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("values", [*VALUES, *MIXED])
def test_a_target_is_the_same_text_in_every_format(values: str, kind: str, streaming: bool, tmp_path: Path) -> None:
    if values in MIXED and kind == "Parquet":
        pytest.skip("a column has one type")
    written, targets = (VALUES | MIXED)[values]
    rows = [{"question": f"Q{i}", "answer": value, "level": "a"} for i, value in enumerate(written)]
    prompts = read_prompts(FORMATS[kind](tmp_path, rows), len(rows), streaming)
    assert [prompt.question for prompt in prompts] == [row["question"] for row in rows]
    assert [prompt.target for prompt in prompts] == targets
    assert [prompt.fields for prompt in prompts] == [{"level": "a"}] * len(rows)


@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", FORMATS)
def test_chats_and_texts_in_one_column_are_read_in_every_format(kind: str, streaming: bool, tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    rows: list[Row] = [
        {"question": "1?", "answer": "2"},
        {"question": ASKED, "answer": "3"},
        {"question": [*ASKED, said, {"role": "user", "content": "5?"}], "answer": "6"},
    ]
    if kind == "Parquet":  # null for what the other messages do not have
        rows = rows[1:]
    prompts = read_prompts(FORMATS[kind](tmp_path, rows), len(rows), streaming)
    assert [prompt.text for prompt in prompts][-2:] == [
        "<system>Be brief.<user>2?<assistant>",
        "<system>Be brief.<user>2?<assistant>4<user>5?<assistant>",
    ]
    assert [prompt.target for prompt in prompts] == [row["answer"] for row in rows]


@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_field_that_only_some_lines_have_costs_nothing(kind: str, streaming: bool, tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "1", "hint": "x"}, {"question": "b", "answer": "2"}]
    prompts = read_prompts(FORMATS[kind](tmp_path, rows), 2, streaming)
    assert [prompt.target for prompt in prompts] == ["1", "2"]
    assert [prompt.fields.get("hint") for prompt in prompts] == ["x", None]


@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streamed"])
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "CSV" not in kind])
def test_nested_fields_can_be_named_in_every_format(kind: str, streaming: bool, tmp_path: Path) -> None:
    rows = [
        {"data": {"prompt": ASKED}, "answer": "-", "reward_model": {"ground_truth": str(i), "style": "rule"}}
        for i in range(2)
    ]
    names = {"prompt_field": "data.prompt", "target_field": "reward_model.ground_truth"}
    prompts = read_prompts(FORMATS[kind](tmp_path, rows), 2, streaming, **names)
    assert [prompt.target for prompt in prompts] == ["0", "1"]
    assert prompts[1].fields["reward_model"] == {"ground_truth": "1", "style": "rule"}


def test_a_name_with_a_dot_is_first_a_name(tmp_path: Path) -> None:
    rows = [{"question": "a", "x.y": "1", "x": {"y": "2"}, "answer": {"y": "3"}}]
    path = write_jsonl(tmp_path, rows)
    assert read_prompts(path, 1, False, target_field="x.y")[0].target == "1"
    for name, message in [
        ("x.z", r"no field 'x\.z'"),
        ("question.y", r"no field 'question\.y'"),
        ("answer", r"'answer' holds y: name one as answer\.NAME"),
    ]:
        with pytest.raises(UserError, match=message):
            load_examples(DataConfig(path=str(path), target_field=name), "train", 0)
    cfg = Config(data=DataConfig(path=str(path), target_field="x.z"))
    with pytest.raises(UserError, match=r"a\.jsonl:1: no field 'x\.z'"):
        validate_data(cfg)


@pytest.mark.parametrize("kind", FORMATS)
def test_conversational_prompts_and_completions_are_taken_in_every_format(kind: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "answer": "", "completion": [said]}
        for i, said in enumerate([{"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}])
    ]
    path = FORMATS[kind](tmp_path, rows)
    names = {"prompt_field": "prompt", "target_field": "completion"}
    prompts = read_prompts(path, 2, False, **names)
    assert [(prompt.text, prompt.target) for prompt in prompts] == [
        ("<user>0?<assistant>", "A"),
        ("<user>1?<assistant>", "B"),
    ]
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    cfg = Config(data=DataConfig(path=str(path), shuffle=False, **names))
    document = DocumentStream(open_sources(cfg), tokenizer, cfg).take(2)[1]
    assert tokenizer.decode(document.token_ids) == "<user>1?<assistant>B<eos>"
    assert tokenizer.decode(document.token_ids[document.loss_mask]) == "B<eos>"


def test_days_and_exact_numbers_of_parquet_are_targets(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    values = [
        (pa.array([date(2024, 1, 1)]), "2024-01-01"),
        (pa.array([datetime(2024, 1, 1, 10)], pa.timestamp("s")), "2024-01-01T10:00:00"),
        (pa.array([Decimal("1.10")]), "1.10"),
        (pa.array([7, None], pa.int64()), "7"),
        (pa.array([float("nan"), 2.5]), "2.5"),
    ]
    for number, (column, target) in enumerate(values):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pa.table({"question": ["x"] * len(column), "answer": column}), path)
        assert read_prompts(path, 1, False)[0].target == target


def test_an_empty_cell_is_no_target_and_changes_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer,note\na,12,\nb,,NA\nc,13\nd,14,x\n")
    prompts = stream(tmp_path / "a.csv", False)
    assert [(p.target, p.fields["note"]) for p in prompts.take(3)] == [("12", None), ("13", None), ("14", "x")]
    assert prompts.num_bad == 1
    [_, bad, *_] = load_examples(DataConfig(path=str(tmp_path / "a.csv")), "train", 0)
    assert isinstance(bad, BadExample) and bad.message.startswith(f"{tmp_path / 'a.csv'}, row 2: the field 'answer'")


def test_cells_beyond_the_header_are_not_taken_for_the_names_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\na,1,x\nb,2,y\n")
    with pytest.raises(UserError, match=r"a\.csv: its rows have more cells than its header"):
        load_examples(DataConfig(path=str(tmp_path / "a.csv")), "train", 0)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_over_any_format_goes_on_exactly_where_another_stopped(kind: str, tmp_path: Path) -> None:
    rows = [{"question": f"Q{i}", "answer": str(i)} for i in range(7)]
    path = FORMATS[kind](tmp_path, rows)

    def opened() -> PromptStream:
        cfg = Config(data=DataConfig(path=str(path), streaming=True, shuffle_buffer=2, chat_template=False))
        return PromptStream(open_sources(cfg), char_tokenizer(), cfg)

    for stop in (0, 1, 3, 7, 11):
        one = opened()
        taken = one.take(stop)
        assert len({prompt.target for prompt in taken[:7]}) == min(stop, 7)
        other = opened().load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert one.take(9) == other.take(9)


def test_sources_and_held_out_examples_are_read_by_the_same_meaning(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "073"}, {"question": "b", "answer": 5}]
    path = write_csv(tmp_path, rows)
    tokenizer = char_tokenizer()
    for streaming in (False, True):
        cfg = Config(data=DataConfig(eval_path=str(path), streaming=streaming, chat_template=False, shuffle=False))
        cfg.data.sources = [SourceConfig(path=str(path))]
        assert [p.target for p in PromptStream(open_sources(cfg), tokenizer, cfg).take(2)] == ["073", "5"]
        held_out = evaluation_prompts(load_eval_examples(cfg.data, 0), tokenizer, cfg, 2)
        assert [prompt.target for prompt in held_out] == ["073", "5"]
        (tmp_path / str(streaming)).mkdir()
        cfg.data.eval_path = str(write_shards(tmp_path / str(streaming), rows))
        held_out = evaluation_prompts(load_eval_examples(cfg.data, 0), tokenizer, cfg, 2)
        assert [prompt.target for prompt in held_out] == ["073", "5"]


@pytest.mark.parametrize("kind", ["directory of splits", "directory of shards", "directory with CSV"])
def test_parts_of_splits_are_read_by_the_same_meaning(kind: str, tmp_path: Path) -> None:
    path = FORMATS[kind](tmp_path, [{"question": "a", "answer": f"0{i}"} for i in range(10)])
    for split, answers in [("train[:20%]", ["00", "01"]), ("train[8:]+train[-1:]", ["08", "09", "09"])]:
        found = load_examples(DataConfig(path=str(path), split=split), split, 0)
        assert [example["answer"] for example in found if not isinstance(example, BadExample)] == answers


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = write_shards(tmp_path, [{"question": "a", "answer": "1"}] * 2)
    with pytest.raises(UserError, match=r"split dev\).*dev.*train") as error:
        load_examples(DataConfig(path=str(path)), "dev", 0)
    assert error.value.hint


def test_json_of_a_column_of_a_table_stays_what_it_was(tmp_path: Path) -> None:
    """As ``datasets`` writes a mixed column: its feature says that the text is JSON."""
    import datasets

    features = datasets.Features(
        {"question": datasets.Json(), "answer": datasets.Value("string"), "more": datasets.List(datasets.Json())}
    )
    rows = [{"question": ASKED, "answer": "1", "more": [1, "x"]}, {"question": "1?", "answer": "2", "more": []}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    for streaming in (False, True):
        prompts = read_prompts(tmp_path / "a.parquet", 2, streaming)
        assert [prompt.text for prompt in prompts] == [
            "<system>Be brief.<user>2?<assistant>",
            "<user>1?<assistant>",
        ]
        assert prompts[0].fields == {"more": [1, "x"]}
