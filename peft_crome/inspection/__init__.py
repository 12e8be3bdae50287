"""Show an adapter's weights and its effect on an input: singular values, gates, changes, as numbers and images."""

from .activity import BranchActivity, inspect_activity
from .files import write_inspection
from .look import BranchView, View, look
from .places import ImageMap, map_images
from .weights import AdapterReport, BranchReport, MatrixReport, inspect_adapter

__all__ = [
    "AdapterReport",
    "BranchActivity",
    "BranchReport",
    "BranchView",
    "ImageMap",
    "MatrixReport",
    "View",
    "inspect_activity",
    "inspect_adapter",
    "look",
    "map_images",
    "write_inspection",
]
