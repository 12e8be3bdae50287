"""Build the model that a recipe describes."""
