"""Named runs."""

from dptrain.recipes.table import RECIPES, recipe

__all__ = ["RECIPES", "recipe"]
