"""Measure models, with adapters and without them."""

from .text_loss import TextLoss, adapters_off, text_loss

__all__ = ["TextLoss", "adapters_off", "text_loss"]
