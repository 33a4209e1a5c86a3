"""What a user did that cannot work, said in one sentence."""


class UserError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 2.
    """


def at_least_one(owner: str, option: str, value: int) -> int:
    """``value`` of the ``option`` of a class named ``owner``. Raises :class:`UserError` where it is below 1."""
    if value < 1:
        raise UserError(f"{owner}: {option} is {value}, it must be at least 1")
    return value
