"""What can be wrong with a recipe, and with a directory that a stage wrote."""

from __future__ import annotations


class StageError(ValueError):
    """A directory is no stage's, is half-written, or does not fit what is to start from it."""


class RecipeError(ValueError):
    """A recipe is wrong; the message names each key, what was given and what is expected."""
