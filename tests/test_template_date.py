"""A chat template that writes today's date writes the same day in all starts of a run, and on all of its nodes."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from forge_hpc.config import UserError, load_config, read_config, save_config, validate
from forge_hpc.config.changes import safe_changes
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.render import DocumentRenderer, PromptRenderer
from forge_hpc.data.types import Prompt
from forge_hpc.environments.rendering import ConversationRenderer
from forge_hpc.run_dir import RunDir
from forge_hpc.submission import Request, _changes, _fix_date, prepare, resolve_config

# As Llama 3.2's template: the day of the rendering, unless the caller names another.
DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}|{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Tomorrow(date):
    @classmethod
    def today(cls) -> date:
        return date(2031, 5, 17)


def tokenizer() -> Any:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = DATED
    return tokenizer


def test_prompts_documents_and_openings_say_the_day_of_the_configuration() -> None:
    tok, data = tokenizer(), DataConfig(template_date="2024-07-26")
    example = {"question": "1?", "answer": "2"}
    prompt = PromptRenderer(tok, data)(example, 0)
    assert prompt.text == "Today: 26 Jul 2024|<user>1?<assistant>"
    [document] = DocumentRenderer(tok, data)(example)
    assert tok.decode(document.token_ids) == prompt.text + "2<eos>"
    opened = ConversationRenderer(tok, data).opening(Prompt(0, "", [], ""), "Guess.")
    assert opened.text == "Today: 26 Jul 2024|<user>Guess.<assistant>"
    given = DataConfig(template_date="2024-07-26", chat_template_args={"date_string": "now"})
    assert PromptRenderer(tok, given)(example, 0).text.startswith("Today: now|")


def test_the_day_is_that_of_the_first_submission_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir(tmp_path / "run")

    def submitted(*overrides: str) -> Config:
        cfg = resolve_config(Request(overrides=list(overrides), cluster="local"))
        _fix_date(cfg, run_dir)
        assert not [line for line in _changes(cfg, run_dir) if "template_date" in line]
        prepare(cfg, run_dir, None, warm := Config())
        assert warm.data.template_date == cfg.data.template_date
        return read_config(run_dir.config)

    today = date.today().isoformat()
    assert submitted().data.template_date in (today, date.today().isoformat())
    monkeypatch.setattr("forge_hpc.submission.date", Tomorrow)
    assert submitted().data.template_date == today
    with pytest.raises(UserError, match=r"data\.template_date"):
        submitted("data.template_date=2024-07-26")
    run_dir = RunDir(tmp_path / "another")
    assert submitted().data.template_date == "2031-05-17"


def test_a_run_begun_before_the_day_was_kept_may_go_on(tmp_path: Path) -> None:
    old = Config()
    save_config(old, tmp_path / "config.yaml")
    new = read_config(tmp_path / "config.yaml")
    new.data.template_date = "2024-07-26"
    assert safe_changes(old, new, 0, "another", "hint") == []
    with pytest.raises(UserError, match="another"):
        safe_changes(new, Config(), 0, "another", "hint")


def test_a_day_is_written_as_in_iso_8601() -> None:
    assert load_config(None, ["data.template_date=2024-07-26"]).data.template_date == "2024-07-26"
    cfg = Config()
    cfg.data.template_date = "26 Jul 2024"
    with pytest.raises(UserError, match=r"data\.template_date is '26 Jul 2024', which is no day") as error:
        validate(cfg)
    assert "YYYY-MM-DD" in (error.value.hint or "")
