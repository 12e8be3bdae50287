"""A recipe: what a training run is to do, as a YAML file."""
