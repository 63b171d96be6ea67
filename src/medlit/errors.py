"""Errors that the user can fix."""


class UserError(Exception):
    """A mistake in a flag, a config, a table or a file.

    The text is one sentence: what is wrong, where, and how to fix it. The command line prints it without a traceback
    and exits with code 2; every other exception is a bug and keeps its traceback.
    """


class NotCachedError(UserError):
    """A base model or dataset that is not cached and cannot be downloaded."""
