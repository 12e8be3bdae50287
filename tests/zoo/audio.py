"""Hosts that hear: a projector or a tower gives sounds in the language model's width."""

from __future__ import annotations
