"""Do the tests see a mistake? ``make mutants`` breaks the package in many places, one after the other.

    python -m tests.support.mutants [--root FOLDER] [WORD ...]   (only mutants that have one of these words in them)

Each mutant is one change of text in a copy of the repository, found by the text itself wherever it stands, and the test
modules that have to fail over it. What fails in the unchanged copy already is left out. The processes are forks of this
one, which has imported torch and TorchRec and nothing of the package.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("torchrec_deepfm", "tests", "benchmarks", "apps", "docs", ".ci")  # and the files beside them


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        old: Text that stands once in the package.
        new: What is put in its place.
        tests: The test module that has to fail, and options of pytest.
    """

    old: str
    new: str
    tests: str


MODEL: Final = [
    Mutant("return 0.5 * ((sum_BK", "return 1.0 * ((sum_BK", "test_fm.py"),
    Mutant(
        "return _sum_of_pairs(factors, torch.float64)", "return _sum_of_pairs(factors, torch.float32)", "test_fm.py"
    ),
    Mutant("rows[:, :factor_dim].normal_(", "rows.normal_(", "test_fm.py"),
    Mutant("first_order_B1 + pairs_B1 if self._linear else pairs_B1", "first_order_B1 + pairs_B1", "test_deepfm.py"),
    Mutant("[keys.index(name) for name in names]", "[names.index(name) for name in keys]", "test_sharded_model.py"),
    Mutant("[keys.index(name) for name in names]", "list(range(len(names)))", "test_sharded_model.py"),
    Mutant("logits_B1 = self.bias\n", "logits_B1 = 0.0 * self.bias\n", "test_deepfm.py"),
    Mutant("return total / max(logits.shape[0], 1)", "return total", "test_deepfm.py"),
    Mutant(
        "dense_features.unsqueeze(2) * self.rows", "dense_features.abs().unsqueeze(2) * self.rows", "test_deepfm.py"
    ),
    Mutant("pooling=PoolingType.SUM", "pooling=PoolingType.MEAN", "test_deepfm.py"),
]
DATA: Final = [
    Mutant("self._generator(_ROWS, window).permutation(rows)", "rows", "test_loader.py"),
    Mutant("rows = rows[rows < self._rows]", "rows = rows[rows <= self._rows]", "test_loader.py"),
    Mutant("(self._sizes[j] - 1, dtype", "(self._sizes[j], dtype", "data/prepare/test_options.py"),
    Mutant(
        ".fill_null(0)\n            .cast(pl.Int32)",
        ".fill_null(1)\n            .cast(pl.Int32)",
        "data/prepare/test_options.py",
    ),
    Mutant("value ASC NULLS FIRST", "value ASC NULLS LAST", "data/prepare/test_prepare.py"),
    Mutant("HAVING count(*) >= {min_count}", "HAVING count(*) > {min_count}", "data/prepare/test_prepare.py"),
    Mutant('middle = -(-day["rows"] // 2)', 'middle = day["rows"] // 2', "data/prepare/test_options.py"),
    Mutant("np.repeat(begins - (ends - lengths), lengths)", "np.repeat(begins, lengths)", "data/loader/test_bags.py"),
    Mutant("            or not np.isfinite(dense).all()\n", "", "test_loader.py"),
    Mutant(
        'np.trunc(values) if column.transform == "fuxictr" else np.floor(values)',
        "np.floor(values)",
        "data/prepare/test_options.py",
    ),
]
SHARDING: Final = [
    Mutant("load += taken * ms", "load += ms", "search/test_plan_tables.py -k lies"),
    Mutant("sorted(groups.items(), reverse=True)", "sorted(groups.items())", "search/test_plan_tables.py -k graham"),
    Mutant(
        "(covered[_needed(units, count, ranks)] if",
        "(2 * covered[_needed(units, count, ranks)] if",
        "search/test_plan_tables.py -k trying",
    ),
    Mutant("column : column + columns]", ":columns]", "test_sharded_model.py"),
    Mutant("if shard.rank >= plan.world_size:", "if shard.rank > plan.world_size:", "plan/test_io.py"),
    Mutant("if plan.world_size % plan.local_world_size:", "if False:", "plan/test_io.py"),
    Mutant("    _check_covered(table, where)\n", "", "plan/test_io.py"),
    Mutant("if plan.world_size != world_size:", "if False:", "plan/test_io.py"),
]
TRAINING: Final = [
    Mutant("(np.logaddexp(0.0, z) - y * z) * each", "(np.logaddexp(0.0, z) - z) * each", "test_metrics.py"),
    Mutant("ne = logloss / -(", "ne = logloss * -(", "test_metrics.py"),
    Mutant("chances / weight / rate", "chances / weight", "test_metrics.py"),
    Mutant('for side in ("left", "right")', 'for side in ("left", "left")', "test_metrics.py"),
    Mutant("return (step + 1) / warmup_steps", "return step / warmup_steps", "test_optimizers.py"),
    Mutant("math.pow(left, config.decay_power)", "left", "test_optimizers.py"),
    Mutant(
        "torch.optim.Adam(parameters, lr=config.dense_lr, fused=_is_on_gpu(parameters))",
        "torch.optim.Adam(parameters)",
        "test_optimizers.py",
    ),
    Mutant(
        "addcmul_(weight.detach(), penalty)", "addcmul_(weight.detach(), penalty, value=0.5)", "test_regularisers.py"
    ),
    Mutant("rows.detach(), 1.0 / max(len(rows), 1)", "rows.detach(), 1.0", "test_regularisers.py"),
    Mutant(
        "[config.embedding_l2] * config.factor_dim + [config.linear_l2]",
        "[config.embedding_l2] * (config.factor_dim + 1)",
        "test_regularisers.py",
    ),
    Mutant("return min(decay, step / (9 + step))", "return decay", "test_ema.py"),
    Mutant("decay_at(step, self._decay) ** (since or self._every)", "decay_at(step, self._decay)", "test_ema.py"),
    Mutant("value > self.best_value", "value >= self.best_value", "test_early_stopping.py"),
    Mutant(
        "drop = 0 < self._lr_patience <= self._bad_since_drop",
        "drop = 0 < self._lr_patience < self._bad_since_drop",
        "test_early_stopping.py",
    ),
    Mutant("self._bad = self._bad_since_drop = 0", "self._bad_since_drop = 0", "test_early_stopping.py"),
]
CHECKPOINT: Final = [
    Mutant('if digest.hexdigest() != entry["sha256"]:', "if False:", "test_store.py"),
    Mutant('if size != entry["bytes"]:', "if False:", "test_store.py"),
    Mutant("for step in steps[keep_last:]", "for step in steps[keep_last + 1 :]", "test_store.py"),
    Mutant('if manifest.get("step") != step:', "if False:", "test_store.py"),
    Mutant(
        "(int(match[1]) for match in found if match), reverse=True)",
        "(int(match[1]) for match in found if match))",
        "test_store.py",
    ),
    Mutant(
        "cuts.append(Cut(cut.offsets, buffer))",
        "cuts.append(Cut(cut.offsets, cut.tensor))",
        "test_in_memory.py",
    ),
    Mutant("_MetadataUnpickler(io.BytesIO(content)).load()", "pickle.loads(content)", "test_security.py"),
]
MUTANTS: Final = {"model": MODEL, "data": DATA, "sharding": SHARDING, "training": TRAINING, "checkpoint": CHECKPOINT}


def copy_repository(root: Path, folder: Path) -> None:
    """Copy what tests need."""
    ignore = shutil.ignore_patterns("__pycache__")
    for path in root.iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)
        elif path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=ignore)


def apply(mutant: Mutant, folder: Path) -> Path:
    """Make the mistake in a copy; return the file that now has it."""
    found = [path for path in sorted((folder / "torchrec_deepfm").rglob("*.py")) if mutant.old in path.read_text()]
    assert len(found) == 1, f"{mutant.old!r} stands in {len(found)} files; name text that stands in one"
    text = found[0].read_text()
    assert text.count(mutant.old) == 1, f"{mutant.old!r} stands {text.count(mutant.old)} times in {found[0].name}"
    found[0].write_text(text.replace(mutant.old, mutant.new))
    return found[0].relative_to(folder)


def run_tests(folder: Path, tests: list[str], *options: str) -> tuple[int, list[str], str]:
    """Run test modules in a copy, in a fork of this process; return pytest's exit code, what failed, and its output."""
    words = [
        str(path) for word in tests for path in ((folder / "tests").rglob(word) if word.endswith(".py") else [word])
    ]
    output = folder / "output"
    output.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        code = 70
        try:
            for number in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            os.chdir(folder)
            os.environ["PYTHONPATH"] = str(folder)
            sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
            for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "torchrec_deepfm")]:
                del sys.modules[name]
            import pytest

            code = pytest.main(
                [*words, *options, "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-W", "ignore"]
            )
            sys.stdout.flush()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    text = output.read_text(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", text, re.MULTILINE)
    return os.waitstatus_to_exitcode(status), failed, text


def try_out(root: Path, mutant: Mutant, left_out: list[str]) -> tuple[bool, str]:
    """Make one mistake and run its tests; say whether they fail, and which one."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(root, folder)
        path = apply(mutant, folder)
        code, failed, output = run_tests(folder, mutant.tests.split(), "-x", *left_out)
    said = failed[0] if failed else output.strip().splitlines()[-1]
    what = f"{path}: {mutant.old.strip()!r} -> {mutant.new.strip()!r}"
    return code == 1, f"{what}\n    {said} ({time.monotonic() - started:.0f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository to try, such as an older one")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    mutants = [
        mutant
        for part, each in MUTANTS.items()
        for mutant in each
        if not options.words or any(word in f"{part} {mutant}" for word in options.words)
    ]
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    import hypothesis
    import torch.distributed.run
    import torch.utils.tensorboard
    import torchrec.distributed.planner

    assert hypothesis
    assert torch
    assert torchrec
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        copy_repository(options.root, Path(name))
        for tests in sorted({mutant.tests for mutant in mutants}):
            code, failed, output = run_tests(Path(name), tests.split())
            assert code == 0 or failed, output[-2000:]
            left_out += [f"--deselect={test}" for test in failed]
            print("".join(f"left out, it fails without a mutant: {test}\n" for test in failed), end="", flush=True)
    survivors = 0
    with ThreadPoolExecutor(options.at_once) as pool:
        for caught, text in pool.map(lambda mutant: try_out(options.root, mutant, left_out), mutants):
            survivors += not caught
            print(f"{'caught' if caught else 'SURVIVED'}  {text}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
