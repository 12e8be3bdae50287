"""The composite model that a recipe describes."""
