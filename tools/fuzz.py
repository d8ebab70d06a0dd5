"""Drives every reader of foreign files with damaged inputs, for as long as one likes: `make fuzz FUZZ="--minutes 60"`.

Each input is read in a worker process that may take 5 seconds of processor time and 1 GiB of memory more than it
starts with. Nothing but a PocketquantError may come out. What does is printed with its seed and saved, and
`tools/fuzz.py --replay FILE` reads it again. The readers and the ways to damage a file are those of
tests/hostile_readers.py and tests/damage.py, which `make test` drives for seconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from damage import damaged  # noqa: E402
from hostile_readers import READERS, Reader  # noqa: E402

from pocketquant.errors import PocketquantError  # noqa: E402

CPU_SECONDS = 5
WALL_SECONDS = 60.0
MEMORY_BYTES = 1 << 30
_BATCH = 50
_TOLD = 10_000
"""Inputs between two lines that say how far it is."""
READ, REFUSED = "read", "refused"


class TookTooLong(BaseException):
    """The limit on processor time; no reader can catch it by mistake."""


def rng_of(reader: Reader, seed: int) -> random.Random:
    """The source of chance of one input: the same in any order and on any machine."""
    return random.Random(zlib.crc32(reader.name.encode()) << 40 | seed)


def read_one(reader: Reader, path: Path, data: bytes) -> str:
    """`READ`, `REFUSED`, or what else came out."""
    path.write_bytes(data)
    try:
        reader.read(path)
        return READ
    except PocketquantError as error:
        is_told = all(line.isprintable() and len(line) < 1100 for line in str(error).split("\n"))
        return REFUSED if is_told else f"a message that is no text of bounded lines: {str(error)[:300]!r}"
    except TookTooLong:
        return f"more than {CPU_SECONDS} seconds\n{traceback.format_exc()}"
    except MemoryError:
        return f"more than {MEMORY_BYTES >> 20} MiB\n{traceback.format_exc()}"
    except BaseException:
        return traceback.format_exc()


def _work(connection: Connection) -> None:
    """Reads one input after the other as it is told, and answers what came of each."""
    signal.signal(signal.SIGPROF, _stop)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        prepared: dict[str, tuple[Path, bytes]] = {}
        while (message := connection.recv()) is not None:
            number, seed, given = message
            reader = READERS[number]
            if reader.name not in prepared:
                place = Path(folder) / str(number)
                place.mkdir()
                path = reader.make(place)
                prepared[reader.name] = path, path.read_bytes()
            path, good = prepared[reader.name]
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                data = damaged(reader.kind, good, rng_of(reader, seed)) if given is None else given
                outcome = read_one(reader, path, data)
            except TookTooLong:
                outcome = f"more than {CPU_SECONDS} seconds"
            signal.setitimer(signal.ITIMER_PROF, 0)
            path.write_bytes(good)
            connection.send(outcome)


def _stop(number: int, frame: object) -> None:
    raise TookTooLong


class Worker:
    """A process that reads; a new one where it died or does not come back."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def read(self, number: int, seed: int, given: bytes | None = None) -> str:
        self._connection.send((number, seed, given))
        try:
            if self._connection.poll(WALL_SECONDS):
                return str(self._connection.recv())
            outcome = f"no answer within {WALL_SECONDS:.0f} seconds"
        except (EOFError, ConnectionError):
            self._process.join()
            outcome = f"the process died ({self._process.exitcode})"
        self._process.kill()
        self._process.join()
        self._start()
        return outcome

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def fuzz(inputs: int | None, minutes: float, first_seed: int, only: str, out: Path) -> int:
    """Reads until the inputs or the minutes are over; how many faults there were."""
    chosen = [i for i, reader in enumerate(READERS) if only in reader.name]
    total_share = sum(READERS[i].share for i in chosen)
    counts: Counter[tuple[str, str]] = Counter()
    faults: Counter[str] = Counter()
    worker, began, n_done = Worker(), time.monotonic(), 0
    next_seed = dict.fromkeys(chosen, first_seed)
    while n_done < inputs if inputs else time.monotonic() - began < 60 * minutes:
        for i in chosen:
            reader = READERS[i]
            wanted = (n_done + _BATCH * len(chosen)) * reader.share / total_share
            while next_seed[i] - first_seed < wanted:
                outcome = worker.read(i, next_seed[i])
                if outcome not in (READ, REFUSED):
                    faults[_tell(i, next_seed[i], outcome, faults, out)] += 1
                counts[reader.name, outcome if outcome in (READ, REFUSED) else "fault"] += 1
                next_seed[i] += 1
        n_before, n_done = n_done, sum(counts.values())
        if n_before // _TOLD < n_done // _TOLD:
            print(f"{n_done} inputs, {sum(faults.values())} faults", flush=True)
    worker.close()
    for i in chosen:
        name = READERS[i].name
        print(f"{name:40} " + "  ".join(f"{counts[name, what]:7} {what}" for what in (READ, REFUSED, "fault")))
    seconds = time.monotonic() - began
    print(
        f"{n_done} inputs in {seconds:.0f} s from seed {first_seed}: {sum(faults.values())} faults, {len(faults)} kinds"
    )
    return sum(faults.values())


def _tell(number: int, seed: int, outcome: str, known: Counter[str], out: Path) -> str:
    """Prints and saves the first of each kind of fault; its kind."""
    reader = READERS[number]
    lines = [line.strip() for line in outcome.strip().splitlines()]
    places = [
        line
        for line in lines
        if line.startswith("File ") and "pocketquant/pocketquant" in line.replace(str(ROOT), "pocketquant")
    ]
    kind = f"{lines[-1][:80]} {places[-1] if places else ''}"
    if not known[kind]:
        with tempfile.TemporaryDirectory() as folder:
            path = reader.make(Path(folder))
            data = damaged(reader.kind, path.read_bytes(), rng_of(reader, seed))
        out.mkdir(parents=True, exist_ok=True)
        saved = out / f"{number:02d}-{seed}.input"
        saved.write_bytes(data)
        print(f"FAULT {reader.name}, seed {seed}, saved as {saved}\n{outcome}", flush=True)
    return kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, help="how many inputs; default: as many as --minutes allow")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first input")
    parser.add_argument("--only", default="", help="readers whose names contain this")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz", help="where faulty inputs are saved")
    parser.add_argument("--replay", type=Path, help="read a saved input again")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.replay is not None:
        outcome = Worker().read(int(options.replay.name.split("-")[0]), 0, options.replay.read_bytes())
        print(outcome)
        sys.exit(outcome not in (READ, REFUSED))
    sys.exit(fuzz(options.inputs, options.minutes, options.seed, options.only, options.out) > 0)


if __name__ == "__main__":
    main()
