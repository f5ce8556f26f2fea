"""From ``recipe`` and ``recipe_args`` to the recipe.

A recipe's module is imported where a run is submitted, which tells what it needs: it should import torch where it
computes, not at its top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from forge_hpc.config.errors import UserError
from forge_hpc.config.fields import Rule, walk
from forge_hpc.config.needs import REWARD_MODEL, ModelNeed, Needs
from forge_hpc.config.registry import RECIPES
from forge_hpc.config.rewards import reward_model_of
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.config.user_code import find_user_code, load_user_code, nearest, remembered


class LoadedRecipe(Protocol):
    """A ``recipes.Recipe``, as those see it who start it."""

    args: Any

    def needs(self, config: Config) -> Needs: ...

    def check(self, config: Config) -> None: ...

    def renderer(self, tokenizer: Any, data: DataConfig) -> Callable[[Any, str], list[Any]]: ...

    async def validate(self, session: Any, documents: Sequence[Any]) -> dict[str, float]: ...

    async def run(self, session: Any) -> None: ...


def load_recipe(cfg: Config, folder: Path | None = None) -> LoadedRecipe:
    """The recipe that `cfg` names, with its options; paths among them are looked for in ``folder`` first.

    Raises:
        UserError: there is no such recipe, it is none, or has no such options.
    """
    cls = _recipe_class(cfg.recipe)
    values = cfg.recipe_args
    if not values:
        return cls(cls.Args())
    from forge_hpc.config.load import typed_options  # OmegaConf's import is slow, and most runs have none

    if not dataclasses.fields(cls.Args):
        raise UserError(f"recipe_args has {', '.join(values)}, and recipe={cfg.recipe} has no options", "leave it out")
    return cls(typed_options(cls.Args, values, "recipe_args", f"recipe={cfg.recipe}", folder))


def resolve_recipe_args(cfg: Config, file: Path | None) -> None:
    """Set all of ``recipe_args``: its defaults are part of a run, like those of the schema, and paths that were written
    in ``file`` are looked for beside it. Raises as ``load_recipe``."""
    cfg.recipe_args = dataclasses.asdict(load_recipe(cfg, None if file is None else file.expanduser().parent).args)


def named_paths(cfg: Config) -> Iterator[tuple[str, str, Rule]]:
    """What the configuration names of files and code, lists and the recipe's own options included: key, what it says,
    and the key's rule."""
    for key, value, rule in (*walk(cfg), *walk(load_recipe(cfg).args, "recipe_args.")):
        if rule.path or rule.code:
            yield from ((key, item, rule) for item in (value if isinstance(value, list) else [value]) if item)


def needs_of(cfg: Config) -> Needs:
    """What the recipe of `cfg` needs, and a reward model beside it. Raises as ``load_recipe``."""
    needs = load_recipe(cfg).needs(cfg)
    if (reward := reward_model_of(cfg)) is None or needs.generators != "beside":
        return needs
    model = ModelNeed(trained=False, head="value", path=reward.path or "")
    return dataclasses.replace(needs, models={**needs.models, REWARD_MODEL: model})


def _recipe_class(name: str) -> type[Any]:
    if name not in RECIPES and ":" not in name:
        own = "or your own as file.py:Class or package.module:Class"
        raise UserError(
            f"recipe is {name!r}, which is not known", nearest(name, RECIPES) or f"known: {', '.join(RECIPES)}, {own}"
        )
    place = RECIPES.get(name, name)
    file = Path(place.rpartition(":")[0]).expanduser()
    return _load(place, file.stat().st_mtime_ns if file.suffix == ".py" and file.is_file() else 0)


@remembered
def _load(place: str, written: int) -> type[Any]:
    """``written`` says which state of the file."""
    module, _, name = place.rpartition(":")
    if not module or not name.isidentifier():
        raise UserError(f"recipe is {place!r}", "write package.module:Class or file.py:Class")
    if module.endswith(".py"):
        find_user_code("recipe", Path(module).expanduser(), name)
    try:
        found = load_user_code(place, "recipe")
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"recipe: {module} cannot be imported: {type(error).__name__}: {error}", "try it with python"
        ) from error
    if (check := getattr(found, "check_surface", None)) is None:
        raise UserError(
            f"the recipe {place} is no forge_hpc.recipes.Recipe",
            "write `class MyRecipe(Recipe)` with `async def run(self, session)`",
        )
    check(place)
    assert isinstance(found, type)
    return found
