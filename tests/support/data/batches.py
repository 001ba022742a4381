"""What the tests of the loader share."""

DAYS = (50, 1, 40, 32)  # 123 rows


def rows_of(batch) -> list[int]:
    """The numbers of a batch's rows: the first id of a row is its number."""
    return batch.sparse_features["c1"].values().tolist()


def real_rows(loader) -> list[list[int]]:
    return [rows_of(batch)[: loader.valid_rows(step)] for step, batch in enumerate(loader)]
