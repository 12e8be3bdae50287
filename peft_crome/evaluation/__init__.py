"""Measure models with and without adapters."""

from .text_loss import TextLoss, adapters_off, text_loss

__all__ = ["TextLoss", "adapters_off", "text_loss"]
