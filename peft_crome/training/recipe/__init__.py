"""Recipes: YAML files that describe a training run."""
