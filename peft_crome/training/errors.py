"""Errors about a recipe, and about a directory that a stage wrote."""

from __future__ import annotations


class StageError(ValueError):
    """A directory is not a stage's, is incomplete, or does not fit the stage that starts from it."""


class RecipeError(ValueError):
    """A recipe is wrong. The message names each key, the given value and what is expected."""
