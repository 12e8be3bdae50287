"""Read data sets as conversations, prepare images, and make batches with labels only on the answers."""

from ..utils.extras import missing

try:
    import datasets  # noqa: F401
    import ijson  # noqa: F401
except ImportError as error:
    raise missing("train", error.name, "peft_crome.data") from error

from .collator import ConversationCollator
from .images import Augmentation, open_image
from .mixture import mix, mixture_probabilities
from .one_answer import split_turns
from .rows import FAULTS, Fault, RowError
from .sources import check_files, load_rows, read_rows
from .templates import CHAT_TEMPLATES
from .trl_rows import to_trl

__all__ = [
    "CHAT_TEMPLATES",
    "FAULTS",
    "Augmentation",
    "ConversationCollator",
    "Fault",
    "RowError",
    "check_files",
    "load_rows",
    "mix",
    "mixture_probabilities",
    "open_image",
    "read_rows",
    "split_turns",
    "to_trl",
]
