"""Recipes: strict YAML, validated before anything runs. The resolved recipe is what is stored and hashed."""

from aicompress.data.section import Data
from aicompress.recipe.files import find, folder_of, read_text, read_yaml, shipped, with_overrides
from aicompress.recipe.levels import Level, MeasuredLevels
from aicompress.recipe.section import Model, ReportFiles, Section, StoredCodes, WholeRecipe, absolute, validated
from aicompress.recipe.step import DEFAULT_KINDS, Calibration, Recipe, Rule, Select, Tune, load

__all__ = [
    "DEFAULT_KINDS",
    "Calibration",
    "Data",
    "Level",
    "MeasuredLevels",
    "Model",
    "Recipe",
    "ReportFiles",
    "Rule",
    "Section",
    "Select",
    "StoredCodes",
    "Tune",
    "WholeRecipe",
    "absolute",
    "find",
    "folder_of",
    "load",
    "read_text",
    "read_yaml",
    "shipped",
    "validated",
    "with_overrides",
]
