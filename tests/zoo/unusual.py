"""Hosts that the usual shape does not fit: image tokens in the vocabulary, no tower, cross-attention, encoder-decoders."""

from __future__ import annotations
