"""The one exception a user of this package is meant to read."""


class UserError(ValueError):
    """A mistake in the input, told in one line: what, where, and what to do.

    The command line prints the message alone and exits with code 2; in a library call it is an ordinary ``ValueError``.
    Anything else that is raised is a defect of ours and keeps its traceback.
    """


def shown(value: object, most: int = 60) -> str:
    """Write a value that is wrong for a message, in short.

    Args:
        value: anything that a file may hold.
        most: characters that it may take.

    Returns:
        Its ``repr``, cut if it is longer.

    Example:
        >>> shown([1, "a"]), shown("long" * 100, most=8)
        ("[1, 'a']", "'long...")
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 3]}..."
