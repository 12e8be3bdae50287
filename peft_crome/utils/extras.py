"""Optional parts: what is said where their packages are not installed."""

from __future__ import annotations


def missing(extra: str, module: str | None, what: str) -> ImportError:
    """The error to raise.

    Args:
        extra: as in pyproject.toml.
        module: that cannot be imported.
        what: needs it.
    """
    return ImportError(
        f'{what} needs {module!r}, which is not installed. Write: pip install "peft-crome[{extra}]"', name=module
    )
