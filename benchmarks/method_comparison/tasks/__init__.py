"""The tasks of the comparison."""

from .digits import Digits
from .easy_vqa import EasyVqa
from .emoji_grids import EmojiGrids
from .emoji_kinds import EmojiKinds
from .task import Task
from .words import Words

TASKS: dict[str, Task] = {task.name: task for task in (EmojiKinds(), EmojiGrids(), EasyVqa(), Words(), Digits())}
