"""Recipes, one file an algorithm, and what a recipe is (`base`). What authors import is here."""

from forge_hpc.config.errors import UserError
from forge_hpc.config.fields import setting
from forge_hpc.recipes.base import ModelNeed, Needs, Recipe, Session

__all__ = ["ModelNeed", "Needs", "Recipe", "Session", "UserError", "setting"]
