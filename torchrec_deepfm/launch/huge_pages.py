"""Huge pages for torch's large tensors on the CPU. Loads no torch."""

import os


def use_huge_pages() -> None:
    """Let torch ask Linux for huge pages for tensors of 2 MiB and more, unless a user has set its variable.

    A look-up touches a page per row: in tables far larger than a processor's caches most of its time goes into finding
    the pages (docs/performance.md). torch reads the variable once, when it is loaded.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
