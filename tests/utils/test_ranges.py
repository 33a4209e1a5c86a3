"""Ranges of options, by value and by word."""

from __future__ import annotations

import argparse
import math

import pytest

from rlchat.errors import UserError
from rlchat.utils.ranges import (
    check_room,
    fractions,
    int_between,
    not_negative,
    positive,
    positive_float,
    positive_int,
    positive_integers,
)


def test_values_in_range() -> None:
    positive_integers(a=1, b=None)
    positive(a=1e-9, b=None)
    not_negative(a=0.0, b=None)
    fractions(a=0.0, b=1.0)
    check_room(63, 64)


def test_values_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match=r"^invalid value 0 for a: expected a positive integer$"):
        positive_integers(a=0)
    with pytest.raises(UserError, match=r"^invalid value 0.0 for b: expected a positive number$"):
        positive(a=1.0, b=0.0)
    with pytest.raises(UserError, match=r"^invalid value -1e-09 for a: expected a non-negative number$"):
        not_negative(a=-1e-9)
    with pytest.raises(UserError, match=r"^invalid value 1.5 for a: expected a number from 0 to 1$"):
        fractions(a=1.5)
    with pytest.raises(UserError, match=r"^invalid value 64 for max_new_tokens: it leaves no room for a prompt in "):
        check_room(64, 64)
    for check in (positive, not_negative, fractions):
        with pytest.raises(UserError, match="invalid value nan"):
            check(a=math.nan)


def test_words() -> None:
    assert positive_int("8") == 8
    assert positive_float("0.5") == 0.5
    assert int_between("0", 0, 9, "a digit") == 0
    for word in ("0", "-1", "1.5", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"^invalid value '{word}': expected a positive integer$"):
            positive_int(word)
    for word in ("0", "-1", "inf", "nan", "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"^invalid value '{word}': expected a positive number$"):
            positive_float(word)
    with pytest.raises(argparse.ArgumentTypeError, match=r"^invalid value '10': expected a digit$"):
        int_between("10", 0, 9, "a digit")
