"""The long fault campaign: ``make faults`` runs it and prints its table for docs/results.md.

    python -m tests.faults.campaign [--seed N] [--share 0.1] [--part NAME ...]

Faults come from outside, at moments that nobody has chosen: a random time after the first step of a life. Every run
must end with the losses, metrics and weights of the run that nothing happened to, to the last bit, and must have seen
every row of every epoch once. (Where the number of ranks changes on the way, sums have another order: there losses and
metrics agree to 1e-4, weights to 1e-3.) A run counts as attempted when it begins, and as equal once its files have been
compared and are equal. A part whose two counts differ fails, and so does the campaign: exit code 1.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.attempts import Command, Tally, expect, living_ranks, wait_for_ranks
from tests.faults.jobs import Job, command, environment, run, start
from tests.faults.runs import make_data

SLEEP = "0.04"  # seconds a step, so that a life of 40 steps lasts as long as its saves
SAVES = ("--checkpoint-every", "2")
WITHOUT_CHANCE = ("--dropout", "0", "--no-batch-norm")  # nothing left that depends on the number of ranks
STALL_SECONDS = 15  # --timeout; ranks on a busy machine take some seconds to start
PHASES = ["before the save", "between ranks", "before the manifest", "before the rename", "after the rename"]
# System calls that strace lets fail with EIO, as a broken disk or a lost mount does.
STATS = "stat,newfstatat,statx,fstat"
READS = {"folder": [STATS, "getdents64"], "file": [STATS, "openat", "read,pread64,readv,preadv"]}


@dataclass
class Campaign:
    """What all parts share."""

    folder: Path
    data: Path
    share: float
    rng: random.Random = field(default_factory=random.Random)
    references: dict[tuple[int, tuple[str, ...]], Path] = field(default_factory=dict)

    def times(self, number: int) -> int:
        """How often, of a full campaign's number."""
        return max(1, round(number * self.share))

    def undisturbed(self, ranks: int, options: tuple[str, ...]) -> Path:
        """The run that nothing happens to, trained when first asked for."""
        key = ranks, options
        if key not in self.references:
            place = self.folder / f"undisturbed_{len(self.references)}"
            code, _, err = run(
                command(self.data, place / "run", ranks=ranks, options=options), environment(place / "log")
            )
            expect(code == 0, err)
            self.references[key] = place / "run"
        return self.references[key]

    def restarted_by_torchelastic(self, tally: Tally) -> None:
        """Kill a random rank of two at a random moment; torchelastic starts the ranks again."""
        undisturbed = self.undisturbed(2, SAVES)
        wanted = self.times(30)
        while tally.count < wanted and tally.attempted < wanted:
            place = self.folder / f"elastic_{tally.attempted}"
            with tally.a_run():
                env = environment(place / "log", FAULTS_SLEEP=SLEEP)
                job = start(command(self.data, place / "run", ranks=2, restarts=8, options=SAVES), env)
                gone: set[int] = set()
                for _ in range(min(8, wanted - tally.count)):
                    moment = self.kill(place, job, 2, gone)
                    if moment is None:
                        break
                    tally.faults[moment] += 1
                    tally.lives += 1
                code, _, err = job.finish()
                tally.lives += 1
                expect(code == 0, err)
                tally.compare(place, undisturbed)

    def typed_again(self, tally: Tally) -> None:
        """Kill the only process at a random moment, up to nine times a run; the same command again after each kill."""
        undisturbed = self.undisturbed(1, SAVES)
        wanted = self.times(50)
        while tally.count < wanted and tally.attempted < wanted:
            place = self.folder / f"alone_{tally.attempted}"
            with tally.a_run():
                for life in range(1, 11):
                    env = environment(place / "log", FAULTS_SLEEP=SLEEP)
                    job = start(command(self.data, place / "run", options=SAVES), env)
                    moment = None
                    if life < 10 and tally.count < wanted:
                        moment = self.kill(place, job, 1, set())
                    code, _, err = job.finish()
                    tally.lives += 1
                    if moment is not None:
                        tally.faults[moment] += 1
                    if code == 0:
                        break
                    expect(code == -signal.SIGKILL, err)
                tally.compare(place, undisturbed)

    def each_phase_of_a_save(self, tally: Tally) -> None:
        """Kill each of two ranks in each phase of a save that it goes through, in one job."""
        place = self.folder / "phases"
        with tally.a_run():
            faults = [
                {"at": phase, "rank": 0, "step": 4 * number + 4, "do": "kill"} for number, phase in enumerate(PHASES)
            ]
            faults += [
                {"at": phase, "rank": 1, "step": 4 * number + 24, "do": "kill"}
                for number, phase in enumerate(PHASES[:2])
            ]
            env = environment(place / "log", faults, FAULTS_SLEEP=SLEEP)
            words = command(self.data, place / "run", ranks=2, restarts=len(faults), options=SAVES)
            code, _, err = run(words, env, timeout=400)
            expect(code == 0, err)
            for number, fault in enumerate(faults):
                expect((place / "log" / f"fault_{number}").exists(), f"it did not happen: {fault}")
                tally.faults[f"kill -9 {fault['at']}"] += 1
            tally.lives = len(faults) + 1
            tally.compare(place, self.undisturbed(2, SAVES))

    def asked_to_stop(self, tally: Tally) -> None:
        """SIGTERM to torchrun at a random moment, as slurm and kubernetes send it; then the same command again."""
        undisturbed = self.undisturbed(2, ())
        wanted = self.times(10)
        while tally.count < wanted and tally.attempted < wanted:
            place = self.folder / f"terminated_{tally.attempted}"
            with tally.a_run():
                code = None
                while code != 0:
                    job = start(
                        command(self.data, place / "run", ranks=2), environment(place / "log", FAULTS_SLEEP="0.1")
                    )
                    if tally.count < wanted and wait_for_ranks(place / "log", job, 2, set()) is not None:
                        time.sleep(self.rng.uniform(0.0, 2.0))
                        with contextlib.suppress(ProcessLookupError):
                            job.send_signal(signal.SIGTERM)
                    code, _, err = job.finish()
                    tally.lives += 1
                    if code == 143:
                        tally.faults["SIGTERM to all ranks"] += 1
                        # Ranks that are done when the signal arrives have nothing to save.
                        reported = re.search(r"stopped by SIGTERM after step \d+, saved in", err)
                        expect(reported or (place / "run" / "summary.json").exists(), f"no step is named: {err}")
                    else:
                        expect(code == 0, err)
                tally.compare(place, undisturbed)

    def launcher_killed(self, tally: Tally) -> None:
        """Kill the launcher alone at a random moment; the same command again at once."""
        front = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "torchrec_deepfm.launch",
            "--standalone",
            "--nproc_per_node",
            "2",
        ]
        self._parent_killed(tally, "launcher", self.times(6), [*front, "-m", "tests.faults.rank"])

    def torchx_killed(self, tally: Tally) -> None:
        """Kill `torchx run` alone at a random moment; the same command again at once."""
        torchx = Path(sys.executable).parent / "torchx"
        front = [str(torchx), "run", "-s", "local_cwd", "tests/faults/torchx_app.py", "-j", "1x2", "--"]
        self._parent_killed(tally, "torchx", self.times(4), front)

    def _parent_killed(self, tally: Tally, name: str, wanted: int, front: list[str]) -> None:
        undisturbed = self.undisturbed(2, SAVES)
        while tally.count < wanted and tally.attempted < wanted:
            place = self.folder / f"{name}_{tally.attempted}"
            env = environment(place / "log", FAULTS_SLEEP="0.1")
            words = command(self.data, place / "run", ranks=2, options=SAVES)
            first = words.index("--checkpoint-every")  # SAVES has it again, and TorchX takes no option twice
            words = [*front, *words[words.index("--data") : first], *words[first + 2 :]]
            with tally.a_run():
                try:
                    gone: set[int] = set()
                    for life in range(4):
                        job = Command(words, env, place)
                        tally.lives += 1
                        if life == 3 or tally.count == wanted:
                            break
                        found = wait_for_ranks(place / "log", job, 2, gone)
                        if found is None:
                            break
                        time.sleep(self.rng.uniform(0.0, 2.0))
                        if job.poll() is not None:
                            break
                        os.kill(job.pid, signal.SIGKILL)
                        job.finish()
                        tally.faults[f"kill -9 of the {name}"] += 1
                        gone |= set(found.values())
                    expect(job.finish() == 0, job.err)
                    tally.compare(place, undisturbed)
                finally:
                    for pid in living_ranks(
                        place / "log"
                    ).values():  # where they outlive it, they are in the next's way
                        os.kill(pid, signal.SIGKILL)

    def stalled(self, tally: Tally) -> None:
        """SIGSTOP to a random rank at a random moment: it stalls and does not end; torchelastic starts all again."""
        undisturbed = self.undisturbed(2, SAVES)
        wanted = self.times(5)
        while tally.count < wanted and tally.attempted < wanted:
            place = self.folder / f"stalled_{tally.attempted}"
            with tally.a_run():
                env = environment(place / "log", FAULTS_SLEEP=SLEEP)
                options = (*SAVES, "--timeout", str(STALL_SECONDS))
                job = start(command(self.data, place / "run", ranks=2, restarts=3, options=options), env)
                found = wait_for_ranks(place / "log", job, 2, set())
                expect(found is not None, job.err)
                assert found is not None
                time.sleep(self.rng.uniform(0.0, 0.9))
                rank = self.rng.choice(sorted(found))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(found[rank], signal.SIGSTOP)
                    tally.faults["SIGSTOP"] += 1
                try:
                    code, _, err = job.finish()
                    tally.lives += 2
                    expect(code == 0, err)
                    tally.compare(place, undisturbed)
                finally:
                    for pid in living_ranks(place / "log").values():
                        os.kill(pid, signal.SIGKILL)

    def other_plans(self, tally: Tally) -> None:
        """Kill at random moments and resume under another plan each time, on two ranks."""
        plans = [
            ("user=row_wise", "item=table_wise"),
            ("user=table_wise", "item=row_wise"),
            ("user=row_wise", "item=row_wise"),
        ]
        rules = [("--constraint", *each) for each in plans]
        starts = [(2, rule) for rule in rules]
        self._changes(tally, "another plan", self.times(4), starts, (2, SAVES), {})

    def other_ranks(self, tally: Tally) -> None:
        """Kill at random moments and resume with another number of ranks each time, and another plan."""
        starts = [
            (2, ("--constraint", "user=row_wise", "item=row_wise")),
            (1, ()),
            (4, ("--constraint", "user=table_wise")),
            (2, ()),
        ]
        close = {"relative": 1e-4, "absolute": 1e-3}
        self._changes(tally, "other ranks and plan", self.times(4), starts, (2, (*SAVES, *WITHOUT_CHANCE)), close)

    def _changes(
        self,
        tally: Tally,
        name: str,
        wanted: int,
        starts: list[tuple[int, tuple[str, ...]]],
        reference: tuple[int, tuple[str, ...]],
        tolerance: dict[str, float],
    ) -> None:
        undisturbed = self.undisturbed(*reference)
        for number in range(wanted):
            place = self.folder / f"{name.replace(' ', '_')}_{number}"
            with tally.a_run():
                gone: set[int] = set()
                for life, (ranks, options) in enumerate(starts):
                    env = environment(place / "log", FAULTS_SLEEP=SLEEP)
                    options = (*reference[1], *options)
                    job = start(command(self.data, place / "run", ranks=ranks, options=options), env)
                    tally.lives += 1
                    last = life == len(starts) - 1
                    if not last and self.kill(place, job, ranks, gone, longest=0.4) is not None:
                        tally.faults[f"kill -9, then {name}"] += 1
                    code, _, err = job.finish()
                    expect(code == 0 if last else code != 2, err)
                    if code == 0:
                        break
                tally.compare(place, undisturbed, **tolerance)

    def read_errors(self, tally: Tally) -> None:
        """Let system calls on files of the checkpoints or the data fail with EIO while a run is resumed (strace).

        The command may use an older checkpoint, or stop in one line; then the same command without the fault finishes
        the run. No checkpoint may be lost where it stops.
        """
        if shutil.which("strace") is None:
            print("strace is not installed: no read errors")
            return
        undisturbed = self.undisturbed(1, SAVES)
        for number in range(self.times(8)):
            place = self.folder / f"unreadable_{number}"
            with tally.a_run():
                env = environment(place / "log", FAULTS_SLEEP=SLEEP)
                words = command(self.data, place / "run", options=SAVES)
                words = words[words.index("--data") :]
                job = start(command(self.data, place / "run", options=SAVES), env)
                while not saved(place):
                    expect(job.poll() is None, job.err)
                    time.sleep(0.01)
                self.kill(place, job, 1, set())
                tally.lives += 1
                expect(job.finish()[0] == -signal.SIGKILL, "it ended before it was killed")
                before = saved(place)
                newest = place / "run" / "checkpoints" / before[-1]
                of_data = self.rng.random() < 0.3
                target = self.rng.choice(
                    sorted(path for path in self.data.iterdir() if path.suffix in (".npy", ".json"))
                    if of_data
                    else [newest.parent, newest, *sorted(newest.iterdir())]
                )
                calls = self.rng.choice(READS["folder" if target.is_dir() else "file"])
                inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO", "-P", str(target)]
                front = ["strace", "-f", "-qq", "-o", str(place / "strace"), *inject]
                rank = [sys.executable, "-W", "ignore", "-m", "tests.faults.rank"]
                job = Command([*front, *rank, *words], env, place)
                code = job.finish()
                tally.lives += 1
                injected = (place / "strace").read_text(errors="replace").count("(INJECTED)")
                kind = "data" if of_data else "a checkpoint"
                tally.faults[f"EIO on {kind}" if injected else "EIO on a file that nothing read"] += 1
                if code != 0:
                    expect("Traceback" not in job.err, job.err)
                    expect(
                        re.search(r"^error: .+$", job.err, re.MULTILINE), f"exit code {code}, and no reason: {job.err}"
                    )
                    expect(
                        set(before) <= set(saved(place)), f"of {before} only {saved(place)} is left ({calls} {target})"
                    )
                    code, _, err = run(command(self.data, place / "run", options=SAVES), env)
                    tally.lives += 1
                    expect(code == 0, err)
                tally.compare(place, undisturbed)

    def kill(self, place: Path, job: "Job | Command", ranks: int, gone: set[int], longest: float = 0.9) -> str | None:
        """Kill a random rank at a random moment; say when that was. None if the job has ended first."""
        found = wait_for_ranks(place / "log", job, ranks, gone)
        if found is None:
            return None
        time.sleep(self.rng.uniform(0.0, longest))
        saving = any((place / "run" / "checkpoints").glob("*.partial"))
        if job.poll() is not None:
            return None
        gone |= set(found.values())
        try:
            os.kill(found[self.rng.choice(sorted(found))], signal.SIGKILL)
        except ProcessLookupError:
            return None
        return "kill -9 during a save" if saving else "kill -9 between saves"


def saved(place: Path) -> list[str]:
    """The names of the checkpoints, by step."""
    return sorted(path.name for path in (place / "run" / "checkpoints").glob("step_????????"))


PARTS: dict[str, tuple[str, Callable[[Campaign, Tally], None]]] = {
    "elastic": ("2 ranks, restarted by torchelastic", Campaign.restarted_by_torchelastic),
    "alone": ("1 process, the command typed again", Campaign.typed_again),
    "phases": ("each phase of a save, 2 ranks", Campaign.each_phase_of_a_save),
    "sigterm": ("SIGTERM, 2 ranks", Campaign.asked_to_stop),
    "launcher": ("launcher killed, 2 ranks, the command typed again", Campaign.launcher_killed),
    "torchx": ("torchx killed, 2 ranks, the command typed again", Campaign.torchx_killed),
    "stall": ("a rank stops, 2 ranks, restarted by torchelastic", Campaign.stalled),
    "plans": ("killed and resumed under another plan, 2 ranks", Campaign.other_plans),
    "ranks": ("killed and resumed on 2, 1, 4, 2 ranks under other plans", Campaign.other_ranks),
    "eio": ("reads that fail, 1 process", Campaign.read_errors),
}


def main() -> int:
    """Run the parts; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of faults")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only these")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        data = make_data(Path(name) / "data").folder
        print(
            "| part | faults | runs attempted | lives | compared and equal | seconds |\n"
            "| --- | --- | --- | --- | --- | --- |",
            flush=True,
        )
        campaign = Campaign(Path(name), data, options.share)
        for part in options.part or PARTS:
            title, play = PARTS[part]
            tally, started = Tally(), time.monotonic()
            campaign.rng.seed(f"{options.seed} {part}")  # the same moments, whichever parts run
            try:
                play(campaign, tally)
            except Exception as error:  # before a run began
                tally.failures.append(f"{type(error).__name__}: {error}")
            shown = ", ".join(f"{count} x {fault}" for fault, count in sorted(tally.faults.items()))
            seconds = time.monotonic() - started
            print(
                f"| {title} | {shown} | {tally.attempted} | {tally.lives} | {tally.equal} | {seconds:.0f} |", flush=True
            )
            failed |= tally.equal != tally.attempted or bool(tally.failures)
            for line in tally.failures:
                print(f"FAILED {title}: {line}", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
