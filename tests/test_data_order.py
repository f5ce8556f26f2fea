"""Mixtures, streams too large to hold, and the curriculum: which prompt comes next, and that it does after a resume."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_hpc.config import load_config
from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, CurriculumConfig, DataConfig, SourceConfig
from forge_hpc.config.validate import validate
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import PromptStream
from forge_hpc.data.types import Completion, Episode, Group, Prompt

TOKENIZER = char_tokenizer()


def config(**data: Any) -> Config:
    return Config(data=DataConfig(**({"chat_template": False} | data)))


def stream(cfg: Config) -> PromptStream:
    return PromptStream(open_sources(cfg), TOKENIZER, cfg)


def write(path: Path, count: int, name: str = "", longest: int = 1) -> str:
    """A JSONL file of ``count`` examples, numbered in the target."""
    lines = ({"question": "x" * (1 + i % longest), "answer": f"{name}{i}"} for i in range(count))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def targets(prompts: list[Prompt]) -> list[str]:
    return [prompt.target for prompt in prompts]


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def assert_goes_on_exactly(cfg: Config, stops: tuple[int, ...], num: int = 40) -> None:
    for stop in stops:
        one = stream(cfg)
        one.take(stop)
        other = stream(cfg).load_state_dict(through_json(one.state_dict()))
        assert one.take(num) == other.take(num)
        assert through_json(one.state_dict()) == through_json(other.state_dict())


# --- mixtures


def mixture(tmp_path: Path, **data: Any) -> Config:
    sources = [
        SourceConfig(path=write(tmp_path / "a.jsonl", 30, "a"), weight=3),
        SourceConfig(path=write(tmp_path / "b.jsonl", 1000, "b", longest=2), weight=1),
    ]
    return config(sources=sources, **data)


def test_weights_are_the_shares_of_the_prompts_even_where_many_are_too_long(tmp_path: Path):
    cfg = mixture(tmp_path)
    cfg.rollout.max_prompt_tokens = 1  # half of b
    prompts = stream(cfg).take(2000)
    shares = Counter(target[0] for target in targets(prompts))
    assert shares["a"] / 2000 == pytest.approx(0.75, abs=0.03)
    assert [prompt.position for prompt in prompts] == list(range(2000))


def test_each_source_of_a_mixture_keeps_its_own_epochs(tmp_path: Path):
    mixed = targets(stream(mixture(tmp_path)).take(200))
    ours = [target for target in mixed if target[0] == "a"]
    assert len(ours) > 90
    for epoch in range(3):
        assert sorted(ours[30 * epoch : 30 * (epoch + 1)]) == sorted(f"a{i}" for i in range(30))
    assert len(set(mixed) - set(ours)) == len(mixed) - len(ours)  # b is in its first epoch


def test_a_mixture_follows_the_seed_and_goes_on_exactly(tmp_path: Path):
    cfg = mixture(tmp_path)
    first = targets(stream(cfg).take(50))
    assert first == targets(stream(cfg).take(50))
    cfg.seed += 1
    assert first != targets(stream(cfg).take(50))
    assert_goes_on_exactly(cfg, (0, 1, 47, 133))


def test_a_source_has_its_own_fields_and_what_it_leaves_out_from_data(tmp_path: Path):
    (tmp_path / "own.jsonl").write_text('{"q": "1", "a": 2}\n')
    cfg = config(
        name="main",
        target_field=None,
        sources=[
            SourceConfig(path=str(tmp_path / "own.jsonl"), prompt_field="q", target_field="a"),
            SourceConfig(path="builtin:addition", split="test", weight=2),
        ],
    )
    (own, _), (other, weight) = open_sources(cfg)
    assert (own.data.prompt_field, own.data.target_field, own.data.name) == ("q", "a", None)
    assert (other.data.split, other.data.target_field, weight) == ("test", None, 2)
    assert {prompt.target for prompt in stream(cfg).take(20)} == {"2", ""}


def test_a_source_that_is_empty_or_has_no_weight_is_named(tmp_path: Path):
    cfg = mixture(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"no examples in .*a\.jsonl"):
        stream(cfg)
    for weight in (0, -1):
        cfg = mixture(tmp_path)
        cfg.data.sources[1].weight = weight
        with pytest.raises(UserError, match=r"data\.sources\.1\.weight .*b\.jsonl"):
            stream(cfg)
        with pytest.raises(UserError, match=r"data\.sources\.1\.weight must be greater than 0"):
            validate(cfg)


def test_a_source_in_which_nothing_fits_is_named(tmp_path: Path):
    cfg = mixture(tmp_path)
    cfg.data.sources.append(SourceConfig(path="builtin:addition"))
    cfg.rollout.max_prompt_tokens = 2
    with pytest.raises(UserError, match="builtin:addition: every example is longer"):
        stream(cfg).take(50)


def test_mixtures_are_written_in_yaml_and_checked_before_queueing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a.jsonl", 3)
    text = "data:\n  sources:\n    - {path: a.jsonl, weight: 2}\n    - {path: openai/gsm8k, name: main}\n"
    (tmp_path / "c.yaml").write_text(text)
    monkeypatch.chdir("/")
    cfg = load_config(tmp_path / "c.yaml", ["data.sources.1.weight=0.5"])
    assert [(source.path, source.weight) for source in cfg.data.sources] == [
        (str(tmp_path / "a.jsonl"), 2),
        ("openai/gsm8k", 0.5),
    ]
    validate(cfg)
    for overrides, message in (
        (["evaluation.num_prompts=5"], "data.sources are trained on"),
        (["data.sources.0.prompt_field=q"], r"a\.jsonl:1: no field 'q'"),
        (["data.sources.0.path=nowhere.jsonl"], r"data\.sources\.0\.path: no such file"),
        (["data.sources=[{weight: 1}]"], r"data\.sources\.0 has no path"),
        (["data.curriculum.low=1.0", "data.curriculum.high=0"], r"data\.curriculum\.low"),
        (["data.curriculum.bounds=[0.5, 0.1]"], r"data\.curriculum\.bounds is \[0\.5, 0\.1\]"),
        (["data.curriculum.rests=[1, 0]"], r"data\.curriculum\.bounds is \[\]"),
        (["data.curriculum.bounds=[0.5]", "data.curriculum.rests=[1]"], "1 bounds make 2 buckets"),
        (["recipe=sft", "data.curriculum.enable=true"], "recipe=sft has none"),
        (["recipe=sft", "data.target_field=null", "data.chat_template=false"], "chats are learned"),
    ):
        with pytest.raises(UserError, match=message):
            validate(load_config(tmp_path / "c.yaml", overrides))


# --- streaming


def streamed(path: str, **data: Any) -> Config:
    return config(path=path, streaming=True, **({"shuffle_buffer": 8} | data))


@pytest.fixture(params=["jsonl", "parquet"])
def large(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of 30 examples."""
    path = write(tmp_path / "large.jsonl", 30)
    if request.param == "jsonl":
        return path
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "large.parquet"), batch_size=7)
    return str(tmp_path / "large.parquet")


def test_a_stream_is_shuffled_within_blocks_and_anew_each_epoch(large: str):
    taken = [int(target) for target in targets(stream(streamed(large)).take(60))]
    epochs = taken[:30], taken[30:]
    for epoch in epochs:
        blocks = [sorted(epoch[start : start + 8]) for start in range(0, 30, 8)]
        assert blocks == [list(range(start, min(start + 8, 30))) for start in range(0, 30, 8)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


def test_an_unshuffled_stream_follows_the_file(large: str):
    taken = targets(stream(streamed(large, shuffle=False)).take(70))
    assert taken == [str(i) for i in (*range(30), *range(30), *range(10))]


def test_a_stream_goes_on_exactly_where_another_stopped(large: str):
    assert_goes_on_exactly(streamed(large), (0, 1, 8, 29, 30, 31, 75))


def test_a_stream_is_one_source_of_a_mixture(tmp_path: Path):
    cfg = mixture(tmp_path, streaming=True, shuffle_buffer=8)
    assert {target[0] for target in targets(stream(cfg).take(50))} == {"a", "b"}
    assert_goes_on_exactly(cfg, (3, 100))


def test_a_position_in_a_jsonl_file_is_reached_without_reading_what_comes_before(tmp_path: Path):
    cfg = streamed(write(tmp_path / "a.jsonl", 1000), shuffle_buffer=10)
    one = stream(cfg)
    one.take(905)
    text = (tmp_path / "a.jsonl").read_bytes()
    broken = len(b"".join(text.splitlines(keepends=True)[:900]))
    (tmp_path / "a.jsonl").write_bytes(b"?" * broken + text[broken:])
    other = stream(cfg).load_state_dict(one.state_dict())
    assert one.take(50) == other.take(50)


def test_a_position_in_another_stream_is_refused(tmp_path: Path):
    state = stream(streamed(write(tmp_path / "a.jsonl", 30))).state_dict()
    with pytest.raises(UserError, match="saved position in the data has path"):
        stream(streamed(write(tmp_path / "b.jsonl", 30))).load_state_dict(state)


def test_broken_lines_of_a_stream_are_left_out_and_the_first_is_named(tmp_path: Path, caplog: Any):
    path = write(tmp_path / "a.jsonl", 20)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"question": "x"}\n{"question"\n')
    prompts = stream(streamed(path))
    assert len(set(targets(prompts.take(20)))) == 20
    prompts.take(10)
    assert prompts.num_bad == 2 and prompts.metrics() == {"prompts/too_long": 0, "prompts/bad": 2}
    [record] = caplog.records
    assert re.search(r"a\.jsonl, line 2[12]: (no field 'answer' \(there is: question\)|not JSON)", record.getMessage())
    assert_goes_on_exactly(streamed(path), (0, 5, 21, 30))


def test_an_empty_stream_says_so(tmp_path: Path):
    path = str(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"a\.jsonl has no examples"):
        stream(streamed(path)).take(1)


def test_a_field_that_is_missing_is_named_with_the_fields_that_there_are(large: str):
    with pytest.raises(UserError, match=r"no field 'problem' \(there is: question, answer\)"):
        stream(streamed(large, prompt_field="problem")).take(1)


# --- curriculum

STEPS, PROMPTS_PER_STEP, NUM_EXAMPLES = 24, 4, 20


def curriculum(path: str, max_staleness: int = 0, **data: Any) -> Config:
    cfg = config(path=path, curriculum=CurriculumConfig(enable=True, low=0.1, high=0.9, rest_epochs=1), **data)
    cfg.rollout.prompts_per_step, cfg.rollout.max_staleness = PROMPTS_PER_STEP, max_staleness
    return cfg


def rewarded(prompt: Prompt, step: int) -> Group:
    """Examples below 5 are always too easy, those above 14 too hard at first."""
    number = int(prompt.target)
    reward = 1.0 if number < 5 else 0.0 if number > 14 and step < 10 else 0.5
    completion = Completion(0, "", [1], [0.0], "stop", (0, 0))
    return Group(prompt, [Episode(prompt, completion, reward)])


def run(cfg: Config, prompts: PromptStream, first: int = 1, ahead: int = 0) -> tuple[list[list[str]], dict[int, Any]]:
    """Steps as a recipe takes them: drawn up to ``ahead`` steps before they are trained. Returns the targets drawn for
    each step, and the state saved after it."""
    batches, taken, saved = {}, [], {}
    step_drawn = first - 1
    for step in range(first, STEPS + 1):
        while step_drawn < min(step + ahead, STEPS):
            step_drawn += 1
            batches[step_drawn] = prompts.draw(PROMPTS_PER_STEP)
        taken.append(targets(batches[step]))
        prompts.report([rewarded(prompt, step) for prompt in batches[step]])
        saved[step] = through_json(prompts.state_after(batches[step][-1].position))
    return taken, saved


def test_prompts_that_are_too_easy_or_too_hard_rest_and_come_back(tmp_path: Path):
    cfg = curriculum(write(tmp_path / "a.jsonl", NUM_EXAMPLES))
    taken = [int(target) for batch in run(cfg, stream(cfg))[0] for target in batch]
    first, rest = taken[:NUM_EXAMPLES], taken[NUM_EXAMPLES:]
    assert sorted(first) == list(range(NUM_EXAMPLES))  # before anything is known
    counts = Counter(rest)
    easy, fit = (np.mean([counts[i] for i in numbers]) for numbers in (range(5), range(5, 15)))
    assert sorted(rest[:10]) == list(range(5, 15))  # the second epoch: those that fit
    assert sorted(rest[10:30]) == list(range(20))  # the third: the others have rested for one epoch
    assert 0 < easy <= 0.6 * fit
    assert counts[19] > counts[0]  # no longer too hard


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_stream_that_drew_ahead_tells_where_it_stood_at_the_end_of_a_step(tmp_path: Path, dynamic: bool):
    cfg = config(path=write(tmp_path / "a.jsonl", 20))
    cfg.rollout.prompts_per_step, cfg.algorithm.dynamic_sampling = 4, dynamic
    prompts = stream(cfg).load_state_dict(stream(cfg).state_dict())
    drawn = prompts.draw(8) + prompts.draw(4)  # of three steps
    end = 4 if dynamic else 3  # with dynamic sampling a step ends where it is complete
    resumed = stream(cfg).load_state_dict(through_json(prompts.state_after(end)))
    assert resumed.draw(11 - end) == drawn[end + 1 :]
    again = stream(cfg).load_state_dict(resumed.state_after(7))  # the steps after a resume end where they would have
    assert again.take(4) == drawn[8:]
    with pytest.raises(KeyError):  # it was saved, and is forgotten
        prompts.state_after(end - 1)
    if not dynamic:
        with pytest.raises(KeyError):
            prompts.state_after(5)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("max_staleness", "ahead"), [(0, 0), (2, 0), (2, 2)])
def test_a_curriculum_goes_on_exactly_from_every_step(tmp_path: Path, max_staleness: int, ahead: int, streaming: bool):
    cfg = curriculum(write(tmp_path / "a.jsonl", NUM_EXAMPLES), max_staleness, streaming=streaming, shuffle_buffer=6)
    taken, saved = run(cfg, stream(cfg), ahead=ahead)
    for step, state in saved.items():
        resumed, states = run(cfg, stream(cfg).load_state_dict(state), first=step + 1, ahead=ahead)
        assert resumed == taken[step:], f"resumed after step {step}"
        assert all(states[later] == saved[later] for later in states)


def buckets(path: str, bounds: list[float], rests: list[int]) -> Config:
    cfg = curriculum(path)
    cfg.data.curriculum.bounds, cfg.data.curriculum.rests = bounds, rests
    return cfg


def test_two_bounds_are_the_buckets_of_too_hard_and_too_easy(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", NUM_EXAMPLES)
    plain, cut = curriculum(path), buckets(path, [0.1, 0.9], [1, 0, 1])
    assert run(cut, stream(cut))[0] == run(plain, stream(plain))[0]


def test_prompts_of_a_bucket_rest_as_long_as_it_says_by_the_running_mean_of_their_groups(tmp_path: Path):
    cfg = buckets(write(tmp_path / "a.jsonl", NUM_EXAMPLES), [0.1, 0.3, 0.5], [5, 1, 0, 2])
    prompts = stream(cfg)
    taken, saved = run(cfg, prompts)
    counts = Counter(int(target) for batch in taken for target in batch)
    fit, easy, hard = (np.mean([counts[i] for i in numbers]) for numbers in (range(5, 15), range(5), range(15, 20)))
    assert fit > 2 * easy > 0 and easy > hard > 0
    means = {index: mean for _, index, mean in saved[STEPS]["curriculum"]["means"]}
    assert set(means.values()) >= {0.5, 1.0} and len(means) == NUM_EXAMPLES
    assert {0.25} == {mean for mean in means.values() if mean not in (0.0, 0.5, 1.0)}  # 0, and then 0.5
    for step in (1, 7, 15):
        resumed, states = run(cfg, stream(cfg).load_state_dict(saved[step]), first=step + 1)
        assert resumed == taken[step:] and states[STEPS] == saved[STEPS]


def test_how_far_generation_runs_ahead_does_not_change_what_is_drawn(tmp_path: Path):
    cfg = curriculum(write(tmp_path / "a.jsonl", NUM_EXAMPLES), max_staleness=2)
    assert run(cfg, stream(cfg), ahead=0)[0] == run(cfg, stream(cfg), ahead=2)[0]
    synchronous = curriculum(cfg.data.path)
    assert run(cfg, stream(cfg))[0] != run(synchronous, stream(synchronous))[0]  # rewards count two steps earlier


def test_without_a_curriculum_rewards_change_nothing(tmp_path: Path):
    cfg = curriculum(write(tmp_path / "a.jsonl", NUM_EXAMPLES))
    cfg.data.curriculum.enable = False
    taken, saved = run(cfg, stream(cfg))
    assert [target for batch in taken for target in batch] == targets(stream(cfg).take(STEPS * PROMPTS_PER_STEP))
    assert saved[STEPS]["curriculum"] == {"origins": [], "rewards": [], "wakes": []}


def test_a_source_whose_prompts_all_rest_runs_on_until_they_wake(tmp_path: Path):
    cfg = curriculum(write(tmp_path / "a.jsonl", 5))  # all too easy
    prompts = stream(cfg)
    taken = [target for batch in run(cfg, prompts)[0] for target in batch]
    assert len(prompts.state_dict()["curriculum"]["wakes"]) == 5
    assert len(taken) == STEPS * PROMPTS_PER_STEP
    assert min(Counter(taken).values()) > 10 and len(set(taken)) == 5
