"""Rewards as plain values, for checkpoints, and their reconstruction."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from rlchat import rewards
from rlchat.errors import UserError
from rlchat.rewards.base import Factor
from rlchat.rewards.classifier import HFReward
from rlchat.rewards.function import FunctionReward, imported_function
from rlchat.rewards.remote import HTTPReward, host_of
from rlchat.rewards.reward import Reward

_log = logging.getLogger("rlchat")

ALLOWED_HOSTS = "RLCHAT_REWARD_HOSTS"
"""The environment variable with the hosts, separated by commas, to which a described :class:`HTTPReward` may send."""
_LOCAL = ("localhost", "127.0.0.1", "::1")


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
            check_arguments(factor, row["init_args"])
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


def check_arguments(factor: type[Factor], init_args: dict[str, Any]) -> None:
    """Raises :class:`UserError` if ``factor`` must not be built with what a file from someone else may contain.

    A function is imported only as the class of a factor is: from the import path, with a warning, and not from the
    standard library. A service on another machine, which would receive the conversation, must be allowed by
    ``RLCHAT_REWARD_HOSTS``. Code that comes with a model is not run.
    """
    if issubclass(factor, FunctionReward):
        path = str(init_args.get("function"))
        module = path.rpartition(".")[0]
        top = module.partition(".")[0]
        if not top or top in sys.stdlib_module_names or importlib.util.find_spec(top) is None:
            raise UserError(f"cannot import the function {path}: its module is not on the import path")
        found = imported_function(path)
        if not inspect.isfunction(found) or found.__module__ != module:
            raise UserError(f"{path} is not a function that {module} defines")
        _log.warning("the reward uses your function %s from %s", path, inspect.getfile(found))
    elif issubclass(factor, HTTPReward):
        host = host_of(str(init_args.get("url")))
        if host not in (*_LOCAL, *os.environ.get(ALLOWED_HOSTS, "").split(",")):
            raise UserError(
                f"it would send the conversation to {host}; to allow it, set the environment variable "
                f"{ALLOWED_HOSTS}={host}"
            )
    elif issubclass(factor, HFReward) and init_args.get("trust_remote_code"):
        raise UserError(
            f"the model {init_args.get('model')} runs code that comes with it, which only a configuration can allow"
        )


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
