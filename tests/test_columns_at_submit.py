"""A column that a loss takes and nobody fills is refused where the run is submitted, as far as that can be known."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_hpc.config import Config, UserError, load_config, validate
from forge_hpc.config.columns import _columns_asked
from forge_hpc.config.needs import ModelNeed
from forge_hpc.losses.base import columns_of
from forge_hpc.losses.build import build_loss

LOSSES = '''
raise RuntimeError("a login node runs no loss")


def weighted(*, logprobs, mask, normalizer, weight, scale=1.0, beta, **rest): ...


class Pairs:
    """Called with columns."""

    def __call__(self, *, logprobs, mask, group_ids, chosen, margin=0.0): ...


class Named:
    columns: tuple = ("returns", "old_values")

    def __call__(self, values, mask, other): ...


class Derived(Pairs):
    def __call__(self, *, logprobs, unknown): ...


class Made:
    columns = tuple(["made"])


def wrapped(function): ...


@wrapped
def decorated(*, anything): ...
'''
RECIPES = """
from forge_hpc.recipes import ModelNeed, Needs, Recipe


class Silent(Recipe):
    async def run(self, session): ...


class Fills(Silent):
    def needs(self, config):
        return Needs(columns=("weight",))


class Critic(Silent):
    def needs(self, config):
        return Needs({"policy": ModelNeed(), "critic": ModelNeed(head="value")}, columns=("advantages",))


class Own(Silent):
    def needs(self, config):
        return Needs({"policy": ModelNeed(loss=f"{__file__[:-10]}losses.py:Pairs")}, columns=())
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "losses.py").write_text(LOSSES)
    (tmp_path / "recipes.py").write_text(RECIPES)
    return tmp_path


def config(files: Path, loss: str | None = None, recipe: str | None = None, *overrides: str) -> Config:
    given = [f"algorithm.loss={files}/losses.py:{loss}"] if loss else []
    given += [f"recipe={files}/recipes.py:{recipe}"] if recipe else []
    return load_config(None, [*given, *overrides])


@pytest.mark.parametrize(
    ("loss", "recipe", "words"),
    [
        (
            "Pairs",
            None,
            "losses.py:Pairs takes the column 'chosen' of what 'policy' is trained on, and recipe=grpo fills",
        ),
        ("weighted", None, "losses.py:weighted takes the column 'weight'"),
        ("Named", None, "losses.py:Named takes the column 'returns'"),
        (
            "Pairs",
            "Fills",
            "takes the column 'chosen' of what 'policy' is trained on, and recipe=.*:Fills fills weight",
        ),
        (None, "Critic", "the loss of a value head takes the column 'returns' of what 'critic' is trained on"),
        (None, "Own", "the loss .*losses.py:Pairs takes the column 'chosen'"),
    ],
)
def test_a_column_that_the_recipe_does_not_fill_is_refused_before_the_queue(
    files: Path, loss: str | None, recipe: str | None, words: str
) -> None:
    with pytest.raises(UserError, match=words) as refused:
        validate(config(files, loss, recipe))
    assert refused.value.hint and "take another loss, or have the recipe fill document.columns[" in refused.value.hint


@pytest.mark.parametrize(
    ("loss", "recipe", "overrides"),
    [
        ("weighted", "Fills", ["algorithm.loss_args={beta: 0.1}"]),  # an option is no column
        ("Pairs", "Silent", []),  # says nothing of columns
        ("Derived", None, []),  # what follows is known only to whoever runs it
        ("Made", None, []),
        ("decorated", None, []),
        (None, None, []),
        (None, None, ["algorithm.loss=simple_grpo", "reference.enable=true"]),
    ],
)
def test_what_is_filled_or_not_to_be_known_is_left_to_the_first_step(
    files: Path, loss: str | None, recipe: str | None, overrides: list[str]
) -> None:
    validate(config(files, loss, recipe, *overrides))


@pytest.mark.parametrize("loss", ["weighted", "Pairs", "Named"])
def test_what_is_read_from_the_source_is_what_the_trainer_asks_for(files: Path, loss: str) -> None:
    (files / "losses.py").write_text(LOSSES.replace('raise RuntimeError("a login node runs no loss")', ""))
    cfg = config(files, loss)
    assert _columns_asked(cfg, ModelNeed()) == columns_of(build_loss(cfg.algorithm.loss, cfg.algorithm))
