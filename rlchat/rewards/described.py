"""Rewards as plain values, for checkpoints, and their reconstruction."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Sequence
from typing import Any

from rlchat import rewards
from rlchat.errors import UserError
from rlchat.rewards.base import Factor
from rlchat.rewards.reward import Reward

_log = logging.getLogger("rlchat")


def describe_fully(reward: Reward) -> list[dict[str, Any]]:
    """``reward.describe()`` with the names of the arguments that it omits, under ``unknown``.

    An argument is unknown if the factor has no attribute of that name, or one that is neither a plain value nor the
    argument's default. A subclass of Reward is described as one row, all of whose arguments are unknown.
    """
    kind = type(reward)
    if kind is not Reward:
        arguments = list(inspect.signature(kind).parameters)
        return [{"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": {}, "unknown": arguments}]
    return [{**factor.describe(), "unknown": _unknown_arguments(factor)} for factor in reward.factors.values()]


def rebuild(described: Sequence[dict[str, Any]]) -> Reward:
    """The reward of :func:`describe_fully`. Raises :class:`UserError` if a factor cannot be rebuilt as it was."""
    factors = []
    for row in described:
        if row["unknown"]:
            raise UserError(
                f"{row['class_path']} cannot be rebuilt: the values of its arguments {', '.join(row['unknown'])} are "
                f"not known"
            )
        factor = find_factor(row["class_path"])
        try:
            factors.append(factor(**row["init_args"]))
        except UserError as error:
            raise UserError(f"{row['class_path']} cannot be rebuilt: {error}") from error
        except Exception as error:  # the code of a user's factor can raise anything
            raise UserError(f"{row['class_path']} cannot be rebuilt: {type(error).__name__}: {error}") from error
    return Reward(factors)


def find_factor(class_path: str) -> type[Factor]:
    """The subclass of :class:`Factor` at ``class_path``. Raises :class:`UserError` if there is none.

    A class of rlchat is found by the last part of its path. The module of any other class is imported only if it is on
    the import path, and a warning names the class and its file.
    """
    module, _, name = class_path.rpartition(".")
    if module.partition(".")[0] == "rlchat":
        found = getattr(rewards, name) if name in rewards.__all__ else None
    else:
        try:
            # Only the top module is searched: to search a submodule, Python would import the modules above it.
            if module and importlib.util.find_spec(module.partition(".")[0]) is None:
                raise UserError(f"cannot import {module}: it is not on the import path; add its folder to PYTHONPATH")
            found = getattr(importlib.import_module(module), name, None) if module else None
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"cannot import {module}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Factor)) or inspect.isabstract(found):
        raise UserError(f"{class_path} is not a reward factor")
    if module.partition(".")[0] != "rlchat":
        _log.warning("the reward uses your class %s from %s", class_path, inspect.getfile(found))
    return found


def _unknown_arguments(factor: Factor) -> list[str]:
    known = factor.describe()["init_args"]
    return [
        name
        for name, parameter in inspect.signature(type(factor)).parameters.items()
        if name not in known and not (hasattr(factor, name) and _same(getattr(factor, name), parameter.default))
    ]


def _same(value: Any, default: Any) -> bool:
    """Whether an attribute that is not a plain value equals the default of its argument."""
    return value is default or (isinstance(value, list | tuple | dict) and bool(value == default))
