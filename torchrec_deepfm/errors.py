"""The one exception a user of this package is meant to read."""


class UserError(ValueError):
    """A mistake in the input, told in one line: what, where, and what to do.

    The command line prints the message alone and exits with code 2; in a library call it is an ordinary ``ValueError``.
    Anything else that is raised is a defect of ours and keeps its traceback.
    """
