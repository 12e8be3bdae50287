"""Teach a second task to a model with vision, from the command line."""
