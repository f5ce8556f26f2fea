"""Loading: files, bases, overrides, what is said about mistakes, and the way back to a file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from forge_hpc.config import (
    EXIT_USAGE,
    Config,
    UserError,
    all_keys,
    diff_config,
    load_config,
    print_error,
    read_config,
    safe_changes,
    save_config,
)

CONFIGS = Path(__file__).parent.parent / "configs"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refused(*args: object) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(*args)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message
    return caught.value


def test_no_file_gives_the_defaults_of_the_schema():
    assert load_config(None) == Config()


def test_overrides_stand_over_the_file_and_the_file_over_its_base(tmp_path):
    write(tmp_path / "base.yaml", "name: base\nseed: 1\ntrainer: {training: {steps: 5, seq_len: 64}}\n")
    (tmp_path / "sub").mkdir()
    child = write(tmp_path / "sub" / "child.yaml", "base: ../base.yaml\nseed: 2\ntrainer: {training: {steps: 6}}\n")
    cfg = load_config(child, ["trainer.training.steps=7"])
    training = cfg.trainer.training
    assert (cfg.name, cfg.seed, training.steps, training.seq_len) == ("base", 2, 7, 64)


def test_bases_in_a_circle_are_refused(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "circle" in refused(tmp_path / "a.yaml").message


def test_a_section_without_lines_changes_nothing(tmp_path):
    assert load_config(write(tmp_path / "c.yaml", "trainer:\nreward: [{name: math}]\n")).trainer == Config().trainer


@pytest.mark.parametrize(
    ("text", "place", "key", "near"),
    [
        (
            "name: x\ntrainer:\n  optimizer:\n    learning_rte: 1\n",
            ":4",
            "trainer.optimizer.learning_rte",
            "known keys of trainer.optimizer: name, lr, beta1",
        ),
        ("trainer:\n  frobnicate: 1\n", ":2", "trainer.frobnicate", "known keys of trainer: processes_per_node,"),
        ("trainer:\n  optimzer:\n    lr: 1\n", ":3", "trainer.optimzer", "trainer.optimizer?"),
        ("lr: 1\n", ":1", "lr", "trainer.optimizer.lr?"),
        ("reward:\n  - name: exact\n    weigth: 1\n", ":3", "reward.0.weigth", "reward.0.weight?"),
    ],
)
def test_an_unknown_key_is_named_with_file_line_and_nearest_key(tmp_path, text, place, key, near):
    error = refused(write(tmp_path / "c.yaml", text))
    assert error.message == f"{tmp_path / 'c.yaml'}{place}: unknown key {key}"
    assert near in (error.hint or "")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.training.steps=abc", "trainer.training.steps must be a whole number, not 'abc'"),
        ("seed=1.5", "seed must be a whole number, not '1.5'"),
        ("seed=true", "seed must be a whole number, not 'true'"),
        ("trainer.optimizer.lr=true", "trainer.optimizer.lr must be a number, not 'true'"),
        ("trainer.optimizer.lr=", "trainer.optimizer.lr must be a number, not null"),
        ("seed='7'", "seed must be a whole number, not '7'"),
        ("logging.tensorboard=3", "logging.tensorboard must be true or false, not '3'"),
        ("cluster.rollout_nodes=[1]", "cluster.rollout_nodes must be a whole number or null, not a list"),
        ("name={a: 1}", "name must be text, not a mapping"),
        ("slurm.setup=module load x", "slurm.setup must be a list of texts, not 'module load x'"),
        ("slurm.extra=3", "slurm.extra must be a mapping, not '3'"),
        ("trainer=3", "trainer must be a mapping, not '3'"),
        ("reward=exact", "reward is a list"),
        ("reward.3.weight=1", "reward has 1 items, none with index 3"),
        ("reward.0.weight=much", "reward.0.weight must be a number, not 'much'"),
        ("nonsense", "not an override: 'nonsense'"),
        ("a..b=1", "not an override: 'a..b=1'"),
        ("seed=[1", "broken YAML"),
        ("seed=${nowhere}", "nowhere"),
        ("data.chat_template_args={a: 1, a: 2}", "data.chat_template_args.a is given twice"),
    ],
)
def test_a_wrong_value_gets_one_line_with_key_value_and_expected_type(override, message):
    assert message in refused(None, [override]).message


def test_a_wrong_type_in_a_file_is_named_with_its_line(tmp_path):
    error = refused(write(tmp_path / "c.yaml", "name: x\n\nseed: many\n"))
    assert error.message == f"{tmp_path / 'c.yaml'}:3: seed must be a whole number, not 'many'"


def test_broken_yaml_is_named_with_file_and_line(tmp_path):
    assert f"{tmp_path / 'c.yaml'}:2: broken YAML" in refused(write(tmp_path / "c.yaml", "name: a\n: : [\n")).message
    assert "c.yaml:2: broken YAML" in refused(write(tmp_path / "c.yaml", "name: a\n\tseed: 1\n")).message
    assert "c.yaml:1: a configuration is a mapping" in refused(write(tmp_path / "c.yaml", "- a\n")).message
    assert "c.yaml:2: seed is given twice" in refused(write(tmp_path / "c.yaml", "seed: 1\nseed: 2\n")).message
    assert "broken YAML" in refused(write(tmp_path / "c.yaml", "name: a\x00b\n")).message
    (tmp_path / "c.yaml").write_bytes(b"name: \xff\xfe\n")
    assert "cannot read" in refused(tmp_path / "c.yaml").message


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    write(tmp_path / "demo.yaml", "")
    error = refused(tmp_path / "dmo.yaml")
    assert error.message == f"no such configuration file: {tmp_path / 'dmo.yaml'}"
    assert error.hint == f"did you mean {tmp_path / 'demo.yaml'}?"
    assert "cannot read" in refused(tmp_path).message


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("slurm.time=24:00:00", "slurm.time", "24:00:00"),  # YAML 1.1 would read 86400
        ("slurm.account=0123", "slurm.account", "0123"),
        ("slurm.mem=0", "slurm.mem", "0"),
        ("name=no", "name", "no"),
        ("name=2026-01-01", "name", "2026-01-01"),
        ("slurm.extra={deadline: 12:00:00, comment: on}", "slurm.extra", {"deadline": "12:00:00", "comment": "on"}),
        ("slurm.extra.gres=gpu:8", "slurm.extra", {"gres": "gpu:8"}),
        ("reward.0.args={eps: 1e-6}", "reward.0.args", {"eps": 1e-6}),
        ("trainer.optimizer.lr=1e-6", "trainer.optimizer.lr", 1e-6),
        ("trainer.optimizer.lr=1", "trainer.optimizer.lr", 1.0),
        ("logging.wandb=yes", "logging.wandb", True),
        ("slurm.partition=null", "slurm.partition", None),
        ("slurm.partition='null'", "slurm.partition", "null"),
        ("slurm.setup=[module load cuda]", "slurm.setup", ["module load cuda"]),
        ("generator.engine.max_model_len=${trainer.training.seq_len}", "generator.engine.max_model_len", 2048),
        ("data.system_prompt='Put it in \\boxed{} = a'", "data.system_prompt", "Put it in \\boxed{} = a"),
    ],
)
def test_values_mean_what_they_look_like(override, key, value):
    cfg = load_config(None, [override])
    for part in key.split("."):
        cfg = cfg[int(part)] if part.isdecimal() else getattr(cfg, part)
    assert cfg == value
    assert type(cfg) is type(value)


def test_an_index_reaches_into_a_list_and_a_list_replaces_it(tmp_path):
    file = write(tmp_path / "c.yaml", "reward: [{name: math}, {name: exact, weight: 2}]\n")
    cfg = load_config(file, ["reward.1.weight=3"])
    assert [(r.name, r.weight) for r in cfg.reward] == [("math", 1.0), ("exact", 3.0)]
    assert [r.name for r in load_config(file, ["reward=[{name: gsm8k}]"]).reward] == ["gsm8k"]


def test_relative_paths_are_looked_for_beside_the_file_then_here(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "here").mkdir()
    for place in ("configs/rewards.py", "configs/train.jsonl", "here/train.jsonl", "here/held_out.jsonl"):
        write(tmp_path / place, "")
    text = "reward: [{name: 'rewards.py:score'}]\nmodel: {path: Qwen/Qwen3-0.6B}\n"
    text += "data: {path: train.jsonl, eval_path: held_out.jsonl}\n"
    file = write(tmp_path / "configs" / "c.yaml", text)
    monkeypatch.chdir(tmp_path / "here")
    cfg = load_config(file)
    assert cfg.reward[0].name == f"{tmp_path}/configs/rewards.py:score"
    assert (cfg.data.path, cfg.data.eval_path) == (f"{tmp_path}/configs/train.jsonl", f"{tmp_path}/here/held_out.jsonl")
    assert cfg.model.path == "Qwen/Qwen3-0.6B"
    assert load_config(file, ["data.path=train.jsonl"]).data.path == f"{tmp_path}/here/train.jsonl"


def test_a_saved_configuration_reads_back_the_same(tmp_path):
    hard = [
        "${x}",
        r"\${x}",
        r"\\${x} $y",
        "1e-6",
        "null",
        "no",
        "12:00:00",
        "0x1f",
        "a: b # c",
        " two\n  lines \n\n",
        "é\t",
    ]
    for text in hard:
        cfg = load_config(None, ["cluster.nodes=3", "trainer.optimizer.lr=1e-6"])
        cfg.data.system_prompt = text
        cfg.slurm.extra = {"comment": text, "list": [text, 1, 0.5, None, True]}
        save_config(cfg, tmp_path / "config.yaml")
        assert read_config(tmp_path / "config.yaml") == cfg
        assert load_config(tmp_path / "config.yaml") == cfg


def test_a_saved_hub_name_stays_one_where_a_directory_of_that_name_is(tmp_path, monkeypatch):
    cfg = load_config(None, ["model.path=Qwen/Qwen3-0.6B"])
    save_config(cfg, tmp_path / "config.yaml")
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert read_config(tmp_path / "config.yaml").model.path == "Qwen/Qwen3-0.6B"


def test_a_saved_configuration_is_for_the_owner_alone_and_nothing_is_left_beside_it(tmp_path):
    old = os.umask(0)
    try:
        save_config(Config(), tmp_path / "config.yaml")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_may_see_safe_changes_and_no_others():
    old = load_config(None, ["trainer.training.steps=10"])

    def changes(*overrides: str, steps_done: int = 10) -> list[str]:
        new = load_config(None, ["trainer.training.steps=10", *overrides])
        return safe_changes(old, new, steps_done, "this run is another's", "put it back")

    assert changes() == []
    assert changes("trainer.training.steps=20", "slurm.account=a") == [
        "trainer.training.steps: 10 -> 20",
        "slurm.account: null -> a",
    ]
    with pytest.raises(UserError, match=r"this run is another's: seed \(42 there, 7 now\), model.path") as refused:
        changes("seed=7", "model.path=other", "checkpoint.keep=5")
    assert "keep" not in refused.value.message and refused.value.hint == "put it back"
    with pytest.raises(UserError, match="steps=9, and the run has done 10 steps already"):
        changes("trainer.training.steps=9")


def test_a_difference_names_key_old_and_new():
    old, new = Config(), load_config(None, ["seed=7", "slurm.extra={gres: x}", "reward=[{name: exact}, {name: math}]"])
    assert diff_config(old, old) == []
    assert ("seed", 42, 7) in diff_config(old, new)
    assert ("slurm.extra.gres", None, "x") in diff_config(old, new)
    assert ("reward.1.name", None, "math") in diff_config(old, new)


def test_every_key_of_the_schema_can_be_overridden():
    keys = all_keys()
    assert "trainer.optimizer.lr" in keys and "reward.0.weight" in keys and len(keys) == len(set(keys))
    for key in keys:
        try:
            lists = ["data.sources=[{path: a}]", "sources=[{name: a}]", "algorithm.sft.sources=[{path: a}]"]
            lists += ["evaluation.sets=[{label: a, reward: [{name: exact}]}]", "served=[{name: a}]"]
            load_config(None, [*lists, f"{key}={{not: [a, scalar]}}"])
        except UserError as error:
            assert "must be" in error.message and key in error.message


def test_errors_are_printed_in_two_lines(capsys):
    assert print_error(UserError("no such file: x", "give --config")) == EXIT_USAGE == 2
    assert capsys.readouterr().err == "error: no such file: x\nhint: give --config\n"
    print_error(UserError("no"))
    assert capsys.readouterr().err == "error: no\n"


def test_the_configuration_loads_without_the_heavy_packages_in_half_a_cpu_second():
    code = (
        "import sys, time, forge_hpc.config as c; cfg = c.load_config(sys.argv[1], ['cluster.nodes=64']);"
        "c.validate(cfg); print(c.plan(cfg, 8).describe());"
        "heavy = {'torch', 'vllm', 'monarch', 'transformers', 'datasets', 'torchtitan', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; assert time.process_time() < 0.5, time.process_time()"
    )
    subprocess.run([sys.executable, "-c", code, str(CONFIGS / "grpo" / "qwen3_0_6b.yaml")], check=True, timeout=60)
