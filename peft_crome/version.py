"""The release of this package; an adapter records it."""

__version__ = "0.1.0.dev0"
