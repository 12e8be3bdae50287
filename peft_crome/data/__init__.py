"""Data sets as conversations: read them, prepare pictures, make batches with labels on the answers alone."""

from .collator import ConversationCollator
from .images import Augmentation
from .llava import read_llava
from .templates import CHAT_TEMPLATES

__all__ = ["CHAT_TEMPLATES", "Augmentation", "ConversationCollator", "read_llava"]
