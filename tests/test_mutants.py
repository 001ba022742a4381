"""Each mutant of `make mutants` can be made: its text stands once in the package, and its test module exists."""

import pytest

from tests.support.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", [mutant for part in MUTANTS.values() for mutant in part], ids=lambda each: each.old)
def test_a_mutant_can_be_made(mutant: Mutant) -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "torchrec_deepfm").rglob("*.py")]
    assert sum(text.count(mutant.old) for text in texts) == 1
    assert len(list((ROOT / "tests").rglob(mutant.tests.split()[0]))) == 1
