"""`FunctionReward`: a plain Python function as a factor."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from rlchat.conversation import Conversation
from rlchat.errors import UserError
from rlchat.rewards.base import Reply, ReplyFactor


class FunctionReward(ReplyFactor):
    """The score of a function ``f(prompt, reply)``, which returns a number::

        def polite(prompt, reply):
            return float("please" in reply.text.lower())

    Args:
        function: the import path of the function, such as ``my_rewards.polite``; in Python, the function itself too.
        weight: of the factor.
        name: the name in logs and errors; by default that of the function.

    Raises:
        UserError: the function cannot be imported, or does not take a prompt and a response.
    """

    def __init__(self, function: str | Callable[..., Any], weight: float = 1.0, name: str = "") -> None:
        super().__init__(weight)
        self._function = imported_function(function) if isinstance(function, str) else function
        default = getattr(self._function, "__name__", type(self._function).__name__)
        self.function = function if isinstance(function, str) else f"{self._function.__module__}.{default}"
        self._name = name or default
        try:
            inspect.signature(self._function).bind(None, None)
        except TypeError as error:
            raise self.error(
                f"{self.function} cannot be called with (prompt, reply): {error}; define it as def {default}(prompt, "
                "reply)"
            ) from error

    @property
    def code(self) -> str:
        """The import path of the function."""
        return self.function

    def score(self, prompt: Conversation, reply: Reply) -> float:
        return self._function(prompt, reply)


def imported_function(path: str) -> Callable[..., Any]:
    """The function at the import path ``path``. Raises :class:`UserError` if there is none."""
    module, _, name = path.rpartition(".")
    if not module:
        raise UserError(f"reward function {path}: expected an import path such as my_rewards.polite")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"reward function {path} cannot be imported: there is no module {error.name}; put its file in the folder "
            "where you run rlchat, or install it"
        ) from error
    except AttributeError as error:
        raise UserError(f"reward function {path}: {module} has no {name}") from error
    except Exception as error:
        raise UserError(f"reward function {path} cannot be imported: {type(error).__name__}: {error}") from error
    if isinstance(found, type) or not callable(found):
        raise UserError(f"reward function {path} is not a function; a class is set by class_path")
    return found
