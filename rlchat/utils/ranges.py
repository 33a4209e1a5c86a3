"""Ranges of options: checks of values by name, and types of words on the command line for :mod:`argparse`."""

from __future__ import annotations

import argparse
import math

from rlchat.errors import UserError


def positive_integers(**options: int | None) -> None:
    """Raises :class:`UserError` for an option below 1; None is allowed."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise UserError(f"invalid value {value} for {name}: expected a positive integer")


def not_negative(**options: float | None) -> None:
    """Raises :class:`UserError` for an option that is negative or NaN; None is allowed."""
    for name, value in options.items():
        if value is not None and not value >= 0:
            raise UserError(f"invalid value {value} for {name}: expected a non-negative number")


def positive(**options: float | None) -> None:
    """Raises :class:`UserError` for an option that is not above 0; None is allowed."""
    for name, value in options.items():
        if value is not None and not value > 0:
            raise UserError(f"invalid value {value} for {name}: expected a positive number")


def finite(**options: float | None) -> None:
    """Raises :class:`UserError` for an option that is infinite or NaN; None is allowed."""
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise UserError(f"invalid value {value} for {name}: expected a finite number")


def check_seed(name: str, value: int) -> None:
    """Raises :class:`UserError` for a seed outside the bounds of Lightning and NumPy."""
    if not 0 <= value < 2**32:
        raise UserError(f"invalid value {value} for {name}: expected an integer from 0 to 2**32 - 1")


def fractions(**options: float) -> None:
    """Raises :class:`UserError` for an option outside [0, 1]."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise UserError(f"invalid value {value} for {name}: expected a number from 0 to 1")


def check_room(max_new_tokens: int, max_length: int) -> None:
    """Raises :class:`UserError` if a response can fill the whole ``max_length`` of the model."""
    if max_new_tokens >= max_length:
        raise UserError(
            f"invalid value {max_new_tokens} for max_new_tokens: it leaves no room for a prompt in "
            f"max_length {max_length}; lower it"
        )


def int_between(text: str, low: int, high: float, what: str) -> int:
    """The integer in ``text``, from ``low`` to ``high``.

    Raises:
        argparse.ArgumentTypeError: there is none; it says that ``what`` was expected.
    """
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected {what}")
    return number


def positive_int(text: str) -> int:
    """The positive integer in ``text``. Raises ``argparse.ArgumentTypeError`` if there is none."""
    return int_between(text, 1, math.inf, "a positive integer")


def positive_float(text: str) -> float:
    """The positive finite number in ``text``. Raises ``argparse.ArgumentTypeError`` if there is none."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected a positive number")
    return number
