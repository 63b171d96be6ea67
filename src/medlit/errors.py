"""The one error that is the user's to mend."""


class UserError(Exception):
    """A mistake in a flag, a config, a table or a file.

    The text is one sentence that names what is wrong, where, and how to mend it. The command line prints it without a
    traceback and exits with code 2; everything else that is raised is a bug and keeps its traceback.
    """


class NotCachedError(UserError):
    """A base model or notes that are neither in the Hub's cache nor to be had; with a network they may be."""
