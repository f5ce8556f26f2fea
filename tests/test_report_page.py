"""The page of a run: what stands in it, and that it stays one small harmless file."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_runs import HOSTILE, metrics, rollout, with_sources, write_lines, write_run
from runs import PROJECT, explained_metrics

from forge_hpc.cli import main
from forge_hpc.observability.page.curves import GENERATOR_PARTS, PANELS, TRAINER_PARTS
from forge_hpc.observability.page.markup import CSP, plain
from forge_hpc.observability.page.samples import first_and_last
from forge_hpc.observability.steps import Steps
from forge_hpc.run_dir import RunDir

VOID = ("meta", "img", "source")
VERBATIM = ("style", "title")


class Page(HTMLParser):
    """What a parser makes of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        """Tag, name, value."""
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in VERBATIM:
            self.text += data

    def pictures(self) -> list[str]:
        """The SVG of every picture."""
        links = [value for _, name, value in self.attributes if name in ("src", "srcset")]
        assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
        return [base64.b64decode(link.partition(",")[2]).decode() for link in links]


def page_of(run_dir: RunDir) -> Page:
    pytest.importorskip("matplotlib")
    assert main(["report", str(run_dir)]) == 0
    return Page(run_dir.path / "report.html")


def test_the_page_is_one_file_that_fetches_nothing_and_runs_no_script(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    page = page_of(run_dir)
    assert ("meta", "content", CSP) in page.attributes
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "a"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "href"]
    style = (run_dir.path / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    for svg in page.pictures():
        assert "<script" not in svg and "<image" not in svg
        links = re.findall(r'(?:href|src)="([^"]*)"', svg)
        assert all(link.startswith("#") for link in links)
    assert (run_dir.path / "report.html").stat().st_mode & 0o077 == 0


def test_nothing_is_wider_than_the_page(tmp_path: Path) -> None:
    """What the browser's test measures, as far as the rules tell: pictures shrink, tables scroll, long words break."""
    run_dir = write_run(tmp_path / "run")
    page = page_of(run_dir)
    assert ("meta", "content", "width=device-width, initial-scale=1") in page.attributes
    html = (run_dir.path / "report.html").read_text()
    assert html.count("<table>") == html.count('<div class="scroll"><table>')
    for rule in (
        "img{display:block;width:100%",
        ".scroll{overflow-x:auto",
        "white-space:pre-wrap;overflow-wrap:anywhere",
    ):
        assert rule in html
    assert not [name for _, name, _ in page.attributes if name in ("width", "height")]


def test_text_of_a_run_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", text=HOSTILE))
    harmless = page_of(write_run(tmp_path / "other", text="harmless"))
    assert page.tags == harmless.tags
    assert page.text.count(plain(HOSTILE)) >= harmless.text.count("harmless") >= 28
    assert "\x1b" not in page.text and "\u202e" not in page.text


def test_names_of_figures_break_no_picture(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    strange = {f"reward/{HOSTILE.replace('/', '')}": 0.5, "reward/$x^{$": 0.25, "reward/_私": 0.75}
    write_lines(run_dir.metrics, (record | strange for record in metrics(20)))
    pictures = page_of(run_dir).pictures()
    for svg in pictures:
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert any("$x^{$" in svg and "私" in svg for svg in pictures)


def test_the_page_shows_curves_history_evaluations_samples_and_what_changed(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    drawn = [panel for panel in PANELS if "response/length_mean" not in panel.keys]
    assert all(panel.caption in page.text for panel in drawn)
    assert len(page.pictures()) == len(drawn) + 1 + 2  # evaluations, and the time line for phone and desk
    for part in (
        "completed", "40 of 40", "preempted", "killed", "lost generators mended", "checkpoint.keep: 2 -> 1",
        "0.500 (0.400 to 0.600)", "Step 1, prompt 0: 4 samples", "Step 40, prompt 1: 4 samples",
        "lr: 1e-6", "first node", "trainers:", "wait for trainers",
    ):  # fmt: skip
        assert part in page.text, part


def test_a_long_run_is_read_in_bounded_memory_and_stays_a_small_page(tmp_path: Path) -> None:
    """A quarter of what 20,000 steps take as objects, and far less than the rollouts' file."""
    pytest.importorskip("matplotlib")
    run_dir = write_run(tmp_path / "run")
    write_lines(run_dir.metrics, metrics(20_000))
    line = json.dumps(rollout(5, 0, 0, "x" * 2000)).encode() + b"\n"
    with run_dir.rollouts.open("ab") as file:
        for _ in range(60):
            file.write(line * 300)
    assert run_dir.rollouts.stat().st_size > 100 << 20
    code = """
        import resource, sys
        from forge_hpc.observability.page.run import render_page
        from forge_hpc.observability.page.charts import line_chart, Line
        from forge_hpc.run_dir import RunDir
        line_chart([Line("", [1.0], [1.0])])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = len(render_page(RunDir(sys.argv[1])))
        print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines()), str(run_dir)]
    size, kib = map(int, subprocess.check_output(command, cwd=PROJECT, text=True).split())
    assert size < 2 << 20
    assert kib < 80 << 10


def test_steps_are_brought_together_with_their_extremes_and_nothing_is_lost() -> None:
    steps = Steps.read(
        ({"step": step, "wall_time": step * 2.0, "time/step_s": 2.0, "x": step} for step in range(1, 1001)), 50
    )
    assert 50 <= len(steps.buckets) <= 101
    assert sum(bucket.num for bucket in steps.buckets) == steps.num == 1000
    assert [bucket.first for bucket in steps.buckets[1:]] == [bucket.last + 1 for bucket in steps.buckets[:-1]]
    assert all((bucket.start, bucket.end) == (2.0 * bucket.first - 2, 2.0 * bucket.last) for bucket in steps.buckets)
    assert all(
        (span.low, span.high) == (bucket.first, bucket.last) for bucket in steps.buckets for span in [bucket.spans["x"]]
    )
    assert steps.whole["x"].mean == 500.5 and steps.last["x"] == 1000


def test_samples_are_whole_groups_of_the_first_and_the_last_step_also_beside_torn_and_endless_lines(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rollouts.jsonl"
    assert first_and_last(path) == ([], [])
    records = [
        rollout(step, position, sample, "x" * 1000)
        for step in range(1, 6)
        for position in (7, 8)
        for sample in range(3)
    ]
    write_lines(path, records[:12])
    with path.open("ab") as file:
        file.write(b"x" * (20 << 20) + b"\n")
        file.writelines(json.dumps(record).encode() + b"\n" for record in records[12:])
        file.write(b'{"step": 6, "torn')
    first, last = first_and_last(path)
    assert [[(record["step"], record["position"]) for record in group] for group in first] == [
        [(1, 7)] * 3,
        [(1, 8)] * 3,
    ]
    assert [[(record["step"], record["position"]) for record in group] for group in last] == [
        [(5, 7)] * 3,
        [(5, 8)] * 3,
    ]


def test_each_source_has_curves_of_its_own_under_its_name_and_a_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("sums", "game", "chains")
    run_dir = with_sources(write_run(tmp_path / "run"), *names)
    page, without = page_of(run_dir), page_of(write_run(tmp_path / "other"))
    html = (run_dir.path / "report.html").read_text()
    for title in ("Reward of each source", "Held-out accuracy of each source", "Held-out pass@8 of each source"):
        assert title in page.text and title not in without.text
        [what] = re.findall(rf'<figcaption>{title}[^<]*</figcaption><img src="[^"]*" alt="([^"]*)"', html)
        assert [part.partition(" ")[0].strip(":") for part in what.split("; ")] == list(names)
    assert len(page.pictures()) == len(without.pictures()) + 3
    assert not any("source/" in svg for svg in page.pictures()), "curves have the names of the sources"
    assert all(f"prompt {position} of {name}:" in page.text for position, name in zip((0, 3, 6), names, strict=True))
    assert main(["report", str(run_dir)]) == 0
    told = capsys.readouterr().out
    for number, name in enumerate(names, 1):
        assert re.search(rf"^source/{name}/reward/mean +[▁-█]+  \S+ to \S+$", told, re.MULTILINE)
        last = (1 - math.exp(-3 * 38 / 40)) / number
        said = re.search(rf"^of {name}: \S+ \(first 5 steps\) -> (\S+) \(last 5 steps\)$", told, re.MULTILINE)
        assert said and float(said[1]) == pytest.approx(last, abs=0.01)


def test_more_sources_than_colours_have_several_pictures(tmp_path: Path) -> None:
    page = page_of(with_sources(write_run(tmp_path / "run"), *(f"set-{number:02d}" for number in range(11))))
    assert page.text.count("Reward of each source") == page.text.count("Held-out accuracy of each source") == 2


def test_a_run_that_has_not_begun_and_one_of_which_little_is_left_have_pages(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.write_status(state="pending")
    assert "Nothing has begun yet." in page_of(run_dir).text
    write_lines(run_dir.metrics, [{"step": 1}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}])
    run_dir.config.write_text("name: x\n")
    assert "loss, first → last" in page_of(run_dir).text


def test_without_matplotlib_the_text_is_printed_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(run_dir)]) == 0
    out, err = capsys.readouterr()
    assert "completed at step 40" in out and "page:" not in out
    [line] = err.splitlines()
    assert "not installed; pip install" in line
    assert not (run_dir.path / "report.html").exists()
    assert main(["report", str(run_dir), "--html", str(tmp_path / "page.html")]) == 2


def test_a_page_that_cannot_be_written_there_goes_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run_dir = write_run(tmp_path / "run")
    assert main(["report", str(run_dir), "--html", str(tmp_path / "none" / "page.html")]) == 2
    assert "choose another with --html FILE" in capsys.readouterr().err
    assert main(["report", str(run_dir), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").exists() and str(tmp_path / "page.html") in capsys.readouterr().out


def test_what_is_drawn_are_figures_that_runs_write_and_the_page_on_metrics_lists_them() -> None:
    keys = [key for panel in PANELS for key in panel.keys]
    parts = [key for parts in (TRAINER_PARTS, GENERATOR_PARTS) for keys in parts.values() for key in keys]
    assert {*keys, *parts} <= explained_metrics().keys()
    page = (PROJECT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ((?:`[^`]+`(?:, )?)+) \|$", page, re.MULTILINE)
    assert [(title, tuple(re.findall("`([^`]+)`", tags))) for title, tags in rows] == [
        (panel.title, panel.keys) for panel in PANELS
    ]
