"""Recipes, one file an algorithm, and what a recipe is (`base`)."""

from forge_hpc.recipes.base import ModelNeed, Needs, Recipe, Session

__all__ = ["ModelNeed", "Needs", "Recipe", "Session"]
