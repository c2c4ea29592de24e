"""Errors raised by the language of the product.

Every message names the value, the limit and the remedy.
"""

from __future__ import annotations


class TunerError(Exception):
    """Base of every error that a user can cause and mend; commands print its text and exit with `exit_code`."""

    exit_code = 2


class InvalidValueError(TunerError, ValueError):
    """A value is outside its limits."""


def require(condition: bool, message: str) -> None:
    """Raise `InvalidValueError` with `message` unless `condition` holds."""
    if not condition:
        raise InvalidValueError(message)
