"""The release of this package, which an adapter records."""

__version__ = "0.1.0.dev0"
