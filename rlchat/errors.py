"""What a user did that cannot work, said in one sentence."""


class UserError(Exception):
    """Something that the user can mend: the message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 2.
    """
