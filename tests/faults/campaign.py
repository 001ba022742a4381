"""The long fault campaign: ``make faults`` runs it and prints its table for docs/results.md.

    python -m tests.faults.campaign [--seed N] [--quick]

Kills come from outside, at moments that nobody has chosen: so long after the first step of a life as a random number
says. Every run must end with the losses, metrics and weights of the run that nothing happened to, to the last bit, and
must have seen every row of every epoch once.
"""

import argparse
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.jobs import GLOBAL_BATCH, Job, command, environment, run, start
from tests.faults.runs import assert_each_row_once, assert_same_run, make_data

SLEEP = "0.04"  # seconds a step, so that a life of 40 steps lasts as long as its saves
SAVES = ("--checkpoint-every", "2")
PHASES = ["before the save", "between ranks", "before the manifest", "before the rename", "after the rename"]


@dataclass
class Tally:
    """What one part of the campaign has done."""

    faults: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    lives: int = 0
    seconds: float = 0.0


def ranks_of(logs: Path, job: Job) -> dict[int, int]:
    """Process by rank, of the ranks that have begun to train and live."""
    found, alive = {}, job.processes()
    for path in logs.glob("rank_*"):
        _, rank, pid = path.name.split("_")
        if int(pid) in alive:
            found[int(rank)] = int(pid)
    return found


def wait_for_ranks(logs: Path, job: Job, ranks: int, gone: set[int]) -> dict[int, int] | None:
    """The processes of the next life; None if the job ends first."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if job.poll() is not None:
            return None
        found = ranks_of(logs, job)
        if len(found) == ranks and not gone & set(found.values()):
            return found
        time.sleep(0.01)
    raise AssertionError(f"no life:\n{job.err[-2000:]}")


def kill_at_random(rng: random.Random, logs: Path, job: Job, ranks: int, folder: Path, gone: set[int]) -> str | None:
    """Kill a random rank at a random moment; say when that was. None if the job has ended first."""
    found = wait_for_ranks(logs, job, ranks, gone)
    if found is None:
        return None
    time.sleep(rng.uniform(0.0, 0.9))
    saving = any((folder / "checkpoints").glob("*.partial"))
    if job.poll() is not None:
        return None
    gone |= set(found.values())
    try:
        os.kill(found[rng.choice(sorted(found))], signal.SIGKILL)
    except ProcessLookupError:
        return None
    return "kill -9 during a save" if saving else "kill -9 between saves"


def killed_under_torchelastic(
    rng: random.Random, data: Path, folder: Path, undisturbed: Path, kills: int, ranks: int
) -> Tally:
    """One job after the other; torchelastic starts the ranks again."""
    tally = Tally()
    while sum(tally.faults.values()) < kills:
        place = folder / f"elastic_{ranks}_{tally.runs}"
        env = environment(place / "log", FAULTS_SLEEP=SLEEP)
        job = start(command(data, place / "run", ranks=ranks, restarts=8, options=SAVES), env)
        gone: set[int] = set()
        lives = 1
        while lives <= 8 and sum(tally.faults.values()) < kills:
            moment = kill_at_random(rng, place / "log", job, ranks, place / "run", gone)
            if moment is None:
                break
            tally.faults[moment] += 1
            lives += 1
        code, _, err = job.finish()
        assert code == 0, err[-3000:]
        check(place, undisturbed)
        tally.runs += 1
        tally.lives += lives
    return tally


def killed_in_one_process(rng: random.Random, data: Path, folder: Path, undisturbed: Path, kills: int) -> Tally:
    """The same command again after each kill, up to ten times a run."""
    tally = Tally()
    while sum(tally.faults.values()) < kills:
        place = folder / f"alone_{tally.runs}"
        env = environment(place / "log", FAULTS_SLEEP=SLEEP)
        for life in range(11):
            job = start(command(data, place / "run", options=SAVES), env)
            moment = None
            if life < 10 and sum(tally.faults.values()) < kills:
                moment = kill_at_random(rng, place / "log", job, 1, place / "run", set())
            code, _, err = job.finish()
            tally.lives += 1
            if moment is not None:
                tally.faults[moment] += 1
            if code == 0:
                break
            assert code == -signal.SIGKILL, err[-3000:]
        check(place, undisturbed)
        tally.runs += 1
    return tally


def killed_in_each_phase(data: Path, folder: Path, undisturbed: Path) -> Tally:
    """Each phase of a save on each of two ranks that goes through it, in one job."""
    tally = Tally(runs=1)
    rank_0 = [{"at": phase, "rank": 0, "step": 4 * number + 4, "do": "kill"} for number, phase in enumerate(PHASES)]
    rank_1 = [
        {"at": phase, "rank": 1, "step": 4 * number + 24, "do": "kill"} for number, phase in enumerate(PHASES[:2])
    ]
    faults = [*rank_0, *rank_1]
    place = folder / "phases"
    env = environment(place / "log", faults, FAULTS_SLEEP=SLEEP)
    words = command(data, place / "run", ranks=2, restarts=len(faults), options=SAVES)
    code, out, err = run(words, env, timeout=400)
    assert code == 0, err[-3000:]
    for number, fault in enumerate(faults):
        assert (place / "log" / f"fault_{number}").exists(), fault
        tally.faults[f"kill -9 {fault['at']}"] += 1
    tally.lives = len(re.findall("going on after step", out)) + 1
    check(place, undisturbed)
    return tally


def terminated(rng: random.Random, data: Path, folder: Path, undisturbed: Path, times: int) -> Tally:
    """SIGTERM to torchrun at a random moment, as slurm and kubernetes send it; then the same command again."""
    tally = Tally()
    left = times
    while left:
        place = folder / f"terminated_{tally.runs}"
        env = environment(place / "log", FAULTS_SLEEP="0.1")
        code = None
        while code != 0:
            job = start(command(data, place / "run", ranks=2), env)
            found = wait_for_ranks(place / "log", job, 2, set()) if left else None
            if found is not None:
                time.sleep(rng.uniform(0.0, 2.0))
                job.send_signal(signal.SIGTERM)
            code, _, err = job.finish()
            tally.lives += 1
            if code == 143:
                left -= 1
                tally.faults["SIGTERM to all ranks"] += 1
                assert re.search(r"stopped by SIGTERM after step \d+, saved in", err), err
            else:
                assert code == 0, err[-3000:]
        check(place, undisturbed)
        tally.runs += 1
    return tally


def check(place: Path, undisturbed: Path) -> None:
    assert_same_run(place / "run", undisturbed)
    assert_each_row_once(place / "log", epochs=2, global_batch=GLOBAL_BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of it")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    share = 10 if options.quick else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder / "data").folder
        undisturbed = {}
        for ranks, saves in ((1, SAVES), (2, SAVES), (2, ())):
            place = folder / f"undisturbed_{ranks}_{len(saves)}"
            code, _, err = run(command(data, place / "run", ranks=ranks, options=saves), environment(place / "log"))
            assert code == 0, err
            undisturbed[ranks, len(saves)] = place / "run"
        print(
            "| part | faults | runs | lives | ended as undisturbed | seconds |\n| --- | --- | --- | --- | --- | --- |"
        )
        parts = {
            "2 ranks, restarted by torchelastic": lambda: killed_under_torchelastic(
                rng, data, folder, undisturbed[2, 2], 30 // share, 2
            ),
            "1 process, the command typed again": lambda: killed_in_one_process(
                rng, data, folder, undisturbed[1, 2], 50 // share
            ),
            "each phase of a save, 2 ranks": lambda: killed_in_each_phase(data, folder, undisturbed[2, 2]),
            "SIGTERM, 2 ranks": lambda: terminated(rng, data, folder, undisturbed[2, 0], 10 // share),
        }
        for part, play in parts.items():
            started = time.monotonic()
            tally = play()
            shown = ", ".join(f"{count} x {fault}" for fault, count in sorted(tally.faults.items()))
            seconds = time.monotonic() - started
            print(
                f"| {part} | {shown} | {tally.runs} | {tally.lives} | {tally.runs} of {tally.runs} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
