"""Hosts with a multi-modal projector, beside LLaVA's own: Mistral, Cohere, Liquid, Llama 4 and others."""

from __future__ import annotations
