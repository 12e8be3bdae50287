"""Data sets as conversations: read them, prepare pictures, make batches with labels on the answers alone."""

from .collator import ConversationCollator, split_turns
from .images import Augmentation
from .llava import check_images, read_llava
from .templates import CHAT_TEMPLATES

__all__ = ["CHAT_TEMPLATES", "Augmentation", "ConversationCollator", "check_images", "read_llava", "split_turns"]
