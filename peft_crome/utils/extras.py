"""Errors for optional packages that are not installed."""

from __future__ import annotations


def missing(extra: str, module: str | None, what: str) -> ImportError:
    """Build the error for a missing package.

    Args:
        extra: name of the extra in pyproject.toml.
        module: name of the module that cannot be imported.
        what: feature that needs the module.
    """
    return ImportError(
        f'{what} needs {module!r}, which is not installed. Write: pip install "peft-crome[{extra}]"', name=module
    )
