"""What an adapter holds and what it does on an input: singular values, gates, changes, as numbers and pictures."""

from .activity import BranchActivity, inspect_activity
from .files import write_inspection
from .look import BranchView, View, look
from .places import PictureMap, map_pictures
from .weights import AdapterReport, BranchReport, MatrixReport, inspect_adapter

__all__ = [
    "AdapterReport",
    "BranchActivity",
    "BranchReport",
    "BranchView",
    "MatrixReport",
    "PictureMap",
    "View",
    "inspect_activity",
    "inspect_adapter",
    "look",
    "map_pictures",
    "write_inspection",
]
