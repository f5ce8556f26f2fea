"""From ``recipe`` of the configuration to the controller loop."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from forge_hpc.config.errors import UserError
from forge_hpc.config.user_code import load_user_code
from forge_hpc.config.validate import RECIPES

if TYPE_CHECKING:
    from forge_hpc.controller.session import Session

Recipe = Callable[["Session"], Awaitable[None]]


def load_recipe(name: str) -> Recipe:
    """A recipe of ours, or the user's own as ``file.py:function`` or ``package.module:function``; imports its module.

    Raises:
        UserError: there is no such recipe, or it is no ``async def`` of one argument, the session.
    """
    if name in RECIPES:
        return getattr(importlib.import_module(f"forge_hpc.recipes.{name}"), name)
    if ":" not in name:
        known = f"one of {', '.join(RECIPES)}, or your own as file.py:function or package.module:function"
        raise UserError(f"unknown recipe {name!r}", known)
    recipe = load_user_code(name, "recipe")
    if not inspect.iscoroutinefunction(recipe):
        raise UserError(f"the recipe {name} is not async", "write `async def my_recipe(session): ...`")
    try:
        inspect.signature(recipe).bind(None)
    except TypeError:
        raise UserError(f"the recipe {name} does not take one argument", "it is called with the session") from None
    return recipe
