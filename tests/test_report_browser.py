"""The pages in a real browser, as wide as a phone and as wide as a desk (``make browser`` brings one)."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from browser import NAMES, find_browser, look_at
from report_runs import HOSTILE, write_run

from forge_hpc.cli import main

pytestmark = pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(NAMES)}")
SIZES = {"phone": (390, True), "desk": (1280, False)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report full of hostile text and endless words, and a comparison."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        write_run(folder / f"seed-{seed}", seed=seed, shift=seed / 10, lr=lr) for seed in (1, 2) for lr in ("1e-6",)
    ]
    runs.append(write_run(folder / "hostile", text=f"{HOSTILE} {'W' * 5000}", lr="1" * 300))
    assert main(["report", str(runs[-1])]) == 0
    assert main(["compare", *map(str, runs), "--html", str(folder / "compare.html")]) == 0
    return {"report": runs[-1].path / "report.html", "compare": folder / "compare.html"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["report", "compare"])
def test_a_page_fits_its_window_and_nothing_complains(name: str, size: str, pages: dict[str, Path]) -> None:
    width, is_phone = SIZES[size]
    seen = asyncio.run(look_at(pages[name], width, is_phone=is_phone))
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder, f"{name}-{width}.png").write_bytes(seen.screenshot)
    assert seen.measured["inner"] == width
    assert seen.measured["width"] == width, "it scrolls sideways"
    assert seen.complaints == []
    assert seen.requested == [pages[name].as_uri()]
    assert seen.measured["images"] >= 8 and seen.measured["broken"] == 0
    assert seen.measured["smallest"] > 300
    assert seen.measured["scripts"] == 0 and not seen.measured["marked"]
    if name == "report":
        assert "<script>window.marked = true</script>" in seen.measured["text"]


def test_the_browser_would_have_seen_a_wide_page_a_script_and_a_request(tmp_path: Path) -> None:
    """What the test above asserts can fail."""
    page = tmp_path / "bad.html"
    page.write_text('<p style="width:2000px">x<img src="missing.png"><script>window.marked = true; nothing()</script>')
    seen = asyncio.run(look_at(page, 390))
    assert seen.measured["width"] >= 2000 and seen.measured["marked"] and seen.measured["broken"] == 1
    assert any("nothing" in complaint for complaint in seen.complaints) and len(seen.requested) == 2
