"""Errors that are shown to the user as one sentence."""


class UserError(Exception):
    """An error that the user can fix. The message states the cause, the place and the fix.

    The command line prints ``details`` and then the message, without a traceback, and exits with code 2.
    """

    details: str = ""  # the traceback of the user's own code, where that is what failed


class NonFiniteError(UserError):
    """The model computes NaN or infinity, because its weights have diverged in training."""


def at_least_one(owner: str, option: str, value: int) -> int:
    """``value`` of the ``option`` of a class named ``owner``. Raises :class:`UserError` if it is below 1."""
    if value < 1:
        raise UserError(f"invalid value {value} for {owner}.{option}: expected a positive integer")
    return value


def one_line(error: Exception) -> str:
    """The message of ``error`` on one line, or the name of its class if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def counted(number: int, thing: str) -> str:
    """``number`` and the word ``thing``, which gets an s for the plural: 1 verdict, 1,000 verdicts."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
