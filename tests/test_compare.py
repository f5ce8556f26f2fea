"""Runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev

import pytest
from report_runs import metrics, with_sources, write_lines, write_run

from forge_hpc.cli import main
from forge_hpc.observability.compare import Interval, compare, find_runs, student_t
from forge_hpc.observability.page.charts import COLORS
from forge_hpc.run_dir import RunDir


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two learning rates with three seeds each."""
    for lr in ("1e-6", "3e-6"):
        for seed in (0, 1, 2):
            write_run(tmp_path / f"{lr}-{seed}", seed=seed, lr=lr, shift=seed / 10 + (lr == "3e-6"))
    return tmp_path


def test_runs_that_differ_only_in_their_seed_are_a_group_with_an_interval(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(sweep), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert [group["group"] for group in (first, second)] == ["trainer.optimizer.lr=1e-6", "trainer.optimizer.lr=3e-6"]
    assert [run["seed"] for run in first["runs"]] == [0, 1, 2]
    rewards = [run["reward, last 5 steps"] for run in first["runs"]]
    figure = first["figures"]["reward, last 5 steps"]
    half = 4.303 * stdev(rewards) / 3**0.5
    assert figure["mean"] == pytest.approx(fmean(rewards)) and figure["num"] == 3
    assert (figure["low"], figure["high"]) == pytest.approx((fmean(rewards) - half, fmean(rewards) + half))
    assert second["figures"]["reward, last 5 steps"]["mean"] == pytest.approx(figure["mean"] + 1)


def test_the_terminal_shows_a_row_a_group(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(path) for path in sorted(sweep.iterdir())]
    assert main(["compare", *runs, *runs[:2]]) == 0  # named twice, it counts once
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| trainer.optimizer.lr=")]
    assert len(rows) == 2 and all("| 3 | completed |" in " ".join(row.split()) for row in rows)
    assert "95 % intervals" in lines[-1]


def test_names_logging_slurm_and_the_day_do_not_part_runs_but_what_is_computed_does(tmp_path: Path) -> None:
    same = [write_run(tmp_path / str(number), seed=number) for number in range(2)]
    for run_dir, text in zip(same, ("name: a\nslurm: {time: 1}\n", "name: b\nslurm: {time: 2}\n"), strict=True):
        config = run_dir.config.read_text().replace("name: demo\n", text)
        run_dir.config.write_text(
            config + f"data: {{template_date: {run_dir.name}}}\nlogging: {{wandb: {run_dir.name}}}\n"
        )
    [group] = compare(same)
    assert (len(group.runs), group.label) == (2, "0")
    for run_dir in same:
        run_dir.config.write_text(run_dir.config.read_text().replace("data: {", "data: {chat_template: true, "))
    assert [group.label for group in compare(same)] == ["data.template_date=0", "data.template_date=1"]


def test_a_key_that_an_older_version_did_not_have_parts_nobody(tmp_path: Path) -> None:
    old, new = (write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new")))
    new.config.write_text(new.config.read_text() + "rollout: {window: 1}\n")
    assert len(compare([old, new])) == 1


def test_an_interval_of_shares_ends_with_their_range(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.9, 1.0, 1.0)):
        run_dir = write_run(tmp_path / str(seed), seed=seed, lr="1e-6", shift=seed)
        shares = {"accuracy": accuracy, "source/sums/accuracy": accuracy, "pass@4": 0.0 if seed else 0.05}
        write_lines(run_dir.evaluations, [{"step": 9, **shares}])
    [group] = compare(find_runs([RunDir(tmp_path)]))
    figures = group.figures()
    half = 4.303 * 0.1 / 3  # of a deviation of 0.1 / sqrt(3)
    for name in ("held-out accuracy", "held-out source/sums/accuracy"):
        assert (figures[name].low, figures[name].high) == pytest.approx((2.9 / 3 - half, 1.0), abs=1e-3)
    assert figures["held-out pass@4"].low == 0.0 and (figures["held-out pass@4"].high or 0) > 0.05
    reward = figures["reward, last 5 steps"]
    assert reward.high is not None and reward.high > reward.mean + 2, "a reward has no range that is known"


def test_a_run_alone_has_no_interval_and_one_without_steps_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert str(Interval.of([0.5])) == "0.500" and str(Interval.of([0.5, 0.5])) == "0.500 (0.500 to 0.500)"
    run_dir = write_run(tmp_path / "run")
    for path in (run_dir.metrics, run_dir.evaluations):
        path.unlink()
    assert main(["compare", str(run_dir)]) == 0
    assert "| run " in capsys.readouterr().out


def test_where_no_run_is_the_user_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    assert "give run directories, or a folder of them" in capsys.readouterr().err


def test_the_page_has_a_curve_of_each_group(sweep: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from test_report_page import Page

    write_lines(sweep / "1e-6-2/metrics.jsonl", metrics(10))  # has not come so far
    file = tmp_path / "page.html"
    assert main(["compare", str(sweep), "--html", str(file)]) == 0
    page = Page(file)
    blue, orange = COLORS[:2]
    assert all(blue in svg and orange in svg for svg in page.pictures())
    key = page.text.partition("groups:")[2][:100]
    assert "lr=1e-6" in key and "lr=3e-6" in key
    assert len(page.pictures()) > 5 and "10 to 40" in page.text


def test_sources_are_compared_each_by_itself_and_groups_are_named_by_what_differs_in_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for share in (2, 5):
        for seed in (0, 1):
            run_dir = with_sources(write_run(tmp_path / f"{share}-{seed}", seed=seed, shift=seed / 10), "sums", "game")
            run_dir.config.write_text(run_dir.config.read_text().replace("share: 2", f"share: {share}"))
    assert main(["compare", str(tmp_path), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)
    assert [group["group"] for group in groups] == ["sources.1.share=2", "sources.1.share=5"]
    figures = groups[0]["figures"]
    assert figures["reward of game, last 5 steps"]["mean"] == pytest.approx(
        figures["reward of sums, last 5 steps"]["mean"] / 2
    )
    assert figures["held-out source/sums/accuracy"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "num": 2}
    pytest.importorskip("matplotlib")
    from test_report_page import Page

    file = tmp_path / "page.html"
    assert main(["compare", str(tmp_path), "--html", str(file)]) == 0
    page = Page(file)
    for name in ("sums", "game"):
        assert f"Held-out accuracy of {name}: source/{name}/accuracy" in page.text
        assert f"Reward of {name}: source/{name}/reward/mean" in page.text
    assert "Held-out accuracy: accuracy" in page.text


def test_runs_with_lists_of_other_lengths_differ_in_the_whole_list(tmp_path: Path) -> None:
    for names in (("sums",), ("sums", "game")):
        with_sources(write_run(tmp_path / str(len(names))), *names)
    assert [list(group.differs) for group in compare(find_runs([RunDir(tmp_path)]))] == [["sources"]] * 2


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (10, 2.228), (11, 2.201), (20, 2.086), (120, 1.980)])
def test_students_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, abs=1e-3)


def test_a_folder_of_runs_stands_for_them(sweep: Path) -> None:
    assert [run.name for run in find_runs([RunDir(sweep)])] == sorted(path.name for path in sweep.iterdir())
