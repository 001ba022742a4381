"""What a local copy is called in messages: its address. Standard library only."""

_shown: dict[str, str] = {}


def show_as(local: object, address: str) -> None:
    """Have messages name an address where they would name the local path of its copy."""
    _shown[str(local)] = address


def named(text: str) -> str:
    """Return a message with addresses in place of the paths of their copies.

    Example:
        >>> show_as("/cache/copy-1/run", "s3://bucket/run")
        >>> named("/cache/copy-1/run/config.json: the file is missing")
        's3://bucket/run/config.json: the file is missing'
    """
    for local, address in _shown.items():
        text = text.replace(local, address)
    return text
