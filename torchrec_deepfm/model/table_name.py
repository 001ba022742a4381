"""The name of a feature's embedding table (standard library only: plans name tables where no torch is loaded)."""

from urllib.parse import unquote


def table_name(feature: str) -> str:
    """Name the table of a feature.

    ``torch.nn`` allows no dot in the name of a module, and TorchRec names a module after each table.

    Args:
        feature: Any column name.

    Returns:
        ``t_`` and the feature. A dot is written as ``%2E``, as in a URL; so that no two features share a name, ``%`` is
        written as ``%25`` where the feature has a dot or ``%2`` in it.

    Example:
        >>> table_name("C1"), table_name("user.id")
        ('t_C1', 't_user%2Eid')
    """
    if "." in feature or "%2" in feature:
        feature = feature.replace("%", "%25").replace(".", "%2E")
    return f"t_{feature}"


def feature_of(table: str) -> str:
    """Return the feature whose table has this name; a table that another tool named keeps its own.

    Args:
        table: The table's name.

    Returns:
        The feature.

    Example:
        >>> feature_of("t_user%2Eid"), feature_of("users")
        ('user.id', 'users')
    """
    if not table.startswith("t_"):
        return table
    feature = table.removeprefix("t_")
    return unquote(feature) if "%2" in feature else feature
