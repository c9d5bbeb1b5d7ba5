"""Recipes: strict YAML, validated before anything runs. The resolved recipe is what is stored and hashed."""

from aicompress.recipe.files import shipped
from aicompress.recipe.levels import Level, MeasuredLevels
from aicompress.recipe.section import Model, validated
from aicompress.recipe.step import DEFAULT_KINDS, Calibration, Recipe, Select, Tune, load

__all__ = [
    "DEFAULT_KINDS",
    "Calibration",
    "Level",
    "MeasuredLevels",
    "Model",
    "Recipe",
    "Select",
    "Tune",
    "load",
    "shipped",
    "validated",
]
