"""Attach an adapter to a model: plan, checks, and the way back."""
