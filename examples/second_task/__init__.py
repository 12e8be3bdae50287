"""A second task for a model that sees, from the command line."""
