"""Interrupts, kills and faults: drives the commands with the embedded model and looks at what each run leaves.

Every trial starts a command, sends SIGINT, SIGTERM or SIGKILL at a random moment, and checks that each output is the
old one or, to the last byte, that of an undisturbed run; that nothing lies beside it but what a resumed run needs; and
for the two that can be caught, exit code 130 and a message within a second. Trials of one command follow one another in
one folder, each with what the last one left (taken up with --resume where there is such an option); after every few of
them a run is left alone, and has to end well, with the same bytes, and nothing beside them.

    python tools/faults.py --interrupts 200 --kills 200 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pocketquant.demo import checkpoint_dir, text_path

COMMAND = [str(Path(sys.executable).with_name("pocketquant"))]
OLD = b"old"
RUN_ALONE_AFTER = 5
SECONDS = 1.0
"""Within which an interrupt is to be answered."""

FAULTS: dict[str, Callable[[], None]] = {
    "full disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    "little memory": lambda: resource.setrlimit(resource.RLIMIT_AS, (900 << 20, 900 << 20)),
}


@dataclass
class Case:
    """A command: its words, the outputs in its folder, and the names that an unfinished run may leave there."""

    name: str
    words: list[str]
    outputs: list[str]
    kept: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()
    stays: tuple[str, ...] = ()
    whole: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def visible(self) -> set[str]:
        return set(self.outputs) | set(self.stays)


def cases(given: Path) -> list[Case]:
    """Every command that writes a file, and one that only prints, short enough to be run hundreds of times."""
    source, f32, q8 = str(checkpoint_dir()), str(given / "f32.gguf"), str(given / "q8_0.gguf")
    learn, judge = str(given / "learn.txt"), str(given / "judge.txt")
    small = ["--context", "64", "--chunks", "6"]
    model, shards = "pocket-demo-3.8M", sorted(path.name for path in given.glob("s-*"))
    reports = ["report.json", "report.md", "report.html"]
    return [
        Case("convert", ["convert", source, "--out", "m.gguf"], ["m.gguf"]),
        Case("quantize", ["quantize", source, "--recipe", "pocket_4bit", "--out", "m.gguf"], ["m.gguf"]),
        Case("split", ["split", f32, "--split-max-size", "4M", "--out", "m.gguf"], [f"m{name[1:]}" for name in shards]),
        Case("join", ["join", str(given / shards[0]), "--out", "m.gguf"], ["m.gguf"]),
        Case(
            "imatrix",
            ["imatrix", f32, "--text", learn, "--context", "64", "--chunks", "40", "--out", "m.gguf"],
            ["m.gguf"],
            (".m.gguf.unfinished",),
            ("--resume",),
        ),
        Case(
            "calibrate",
            ["calibrate", source, "--text", learn, *small, "--out", "m.stats"],
            ["m.stats"],
            (".m.stats.unfinished", ".m.stats.state"),
            ("--resume",),
        ),
        Case(
            "sensitivity",
            ["sensitivity", source, "--text", learn, "--groups", "1", *small, "--out", "m.toml"],
            ["m.toml"],
            (".m.toml.runs.json",),
            ("--resume",),
        ),
        Case(
            "reference",
            ["reference", f32, "--text", judge, *small, "--out", "m.pqref"],
            ["m.pqref"],
            (".m.pqref.unfinished", ".m.pqref.state"),
            ("--resume",),
        ),
        Case("eval", ["eval", q8, "--reference", f32, "--text", judge, "--context", "64", "--chunks", "20"], []),
        Case("smoke", ["smoke", q8, "--reference", f32, "--max-tokens", "8", "--out", "m.json"], ["m.json"]),
        Case(
            "make",
            ["make", source, "--text", judge, *small, "--calibrate", learn, "--calibrate-chunks", "6", "--out", "."],
            [f"{model}-POCKET_4BIT.gguf", f"{model}-Q8_0.gguf", f"{model}-imatrix.gguf", *reports, "SHA256SUMS"],
            (".making",),
        ),
        Case(
            "sweep",
            ["sweep", source, "-r", "q8_0", "-r", "q4_k_m", "--text", judge, *small, "--imatrix", "none", "--out", "."],
            [f"{model}-Q8_0.gguf", f"{model}-Q4_K_M.gguf", *reports],
            (".sweep",),
            stays=(".sweep",),
        ),
    ]


def prepare(given: Path) -> None:
    """Makes the files that the commands read."""
    given.mkdir()
    for name in ("f32", "q8_0"):
        _run(["quantize", str(checkpoint_dir()), "--recipe", name, "--out", f"{name}.gguf"], given)
    _run(["split", "f32.gguf", "--split-max-size", "4M", "--out", "s.gguf"], given)
    for name, text in (("learn", "calibration"), ("judge", "evaluation")):
        (given / f"{name}.txt").write_bytes(text_path(text).read_bytes()[:20_000])


def _run(words: list[str], folder: Path) -> float:
    started = time.monotonic()
    result = subprocess.run([*COMMAND, *words], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {result.returncode}\n{result.stderr}")
    return time.monotonic() - started


@dataclass
class Found:
    """Counts and complaints."""

    counts: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)

    def complain(self, case: Case, what: str) -> None:
        self.complaints.append(f"{case.name}: {what}")
        print(f"  {case.name}: {what}", flush=True)


def measure(case: Case, folder: Path) -> None:
    """What an undisturbed run writes, and how long it takes."""
    _run(case.words, folder)  # compiles what is not compiled yet
    for name in case.stays:
        shutil.rmtree(folder / name, ignore_errors=True)
    case.seconds = _run(case.words, folder)
    case.whole = {name: (folder / name).read_bytes() for name in case.outputs}
    unexpected = set(os.listdir(folder)) - case.visible
    if unexpected:
        raise SystemExit(f"{case.name} writes {sorted(unexpected)}, too")
    for name in case.outputs:
        (folder / name).write_bytes(OLD)


def disturb(case: Case, folder: Path, number: signal.Signals, found: Found, rng: random.Random) -> None:
    """One trial."""
    for name in case.outputs:
        (folder / name).write_bytes(OLD)
    resumes = [*case.resume] if any((folder / name).exists() for name in case.kept) else []
    process = subprocess.Popen(
        [*COMMAND, *case.words, *resumes], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    is_alive = is_done = False
    try:
        process.wait(rng.uniform(0.0, 1.1 * case.seconds))
    except subprocess.TimeoutExpired:
        is_alive, is_done = True, bool(case.outputs) and all(is_whole(case, folder, name) for name in case.outputs)
    sent = time.monotonic()
    process.send_signal(number)
    said, answered = b"", None
    assert process.stderr is not None
    for line in process.stderr:
        said += line
        if b"interrupted" in line and answered is None:
            answered = time.monotonic() - sent
    code = process.wait()
    kind = "kill" if number == signal.SIGKILL else "interrupt"
    if code == 0:
        found.counts[f"{kind} {'at' if is_alive else 'after'} the end"] += 1
        if is_alive and not is_done and (lasted := time.monotonic() - sent) > SECONDS:
            found.complain(case, f"{number.name}: ended well {lasted:.2f} s later, as if nothing had come")
    elif number == signal.SIGKILL:
        found.counts["kill landed"] += 1
        if code != -signal.SIGKILL:
            found.complain(case, f"exit code {code}: {said.decode()[-400:]}")
    elif answered is None and (code == -number or b"KeyboardInterrupt" in said):
        found.counts["interrupt before the handlers were there"] += 1
    else:
        found.counts["interrupt landed"] += 1
        found.answers.append(answered or 0.0)
        if code == 130 and not any(words in said for words in (b"goes on", b"starts it anew")):
            found.complain(case, f"{number.name}: says nothing of how to go on: {said.decode()[-400:]}")
        if code != 130 or answered is None:
            found.complain(case, f"{number.name}: exit code {code}: {said.decode()[-400:]}")
        elif answered > SECONDS:
            found.complain(case, f"{number.name}: answered after {answered:.2f} s")
    look(case, folder, found, hidden=code != 130)


def is_whole(case: Case, folder: Path, name: str) -> bool:
    return (folder / name).exists() and (folder / name).read_bytes() == case.whole[name]


def look(case: Case, folder: Path, found: Found, *, hidden: bool) -> None:
    """Outputs are old or whole; nothing lies beside them but what may, and what is hidden after a kill."""
    for name in case.outputs:
        data = (folder / name).read_bytes() if (folder / name).exists() else None
        if data not in (OLD, case.whole[name]):
            found.complain(case, f"{name} is neither the old one nor a whole new one")
    beside = set(os.listdir(folder)) - case.visible - set(case.kept)
    if unexpected := {name for name in beside if not (hidden and name.startswith("."))}:
        found.complain(case, f"left {sorted(unexpected)}")


def run_alone(case: Case, folder: Path, found: Found) -> None:
    """A run after disturbed ones ends well and leaves its outputs and nothing else."""
    resumes = [*case.resume] if any((folder / name).exists() for name in case.kept) else []
    result = subprocess.run([*COMMAND, *case.words, *resumes], cwd=folder, capture_output=True, text=True)
    found.counts["run left alone"] += 1
    if result.returncode:
        found.complain(case, f"the next run: exit code {result.returncode}: {result.stderr[-400:]}")
        return
    for name in case.outputs:
        if (folder / name).read_bytes() != case.whole[name]:
            found.complain(case, f"the next run wrote another {name}")
        (folder / name).write_bytes(OLD)
    if unexpected := set(os.listdir(folder)) - case.visible:
        found.complain(case, f"the next run left {sorted(unexpected)}")
    for name in case.stays:
        shutil.rmtree(folder / name, ignore_errors=True)


def fault(case: Case, folder: Path, what: str, found: Found) -> None:
    """A run that cannot end well says so, and replaces nothing."""
    for name in case.kept:
        shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / name).is_file():
            (folder / name).unlink()
    environment = dict(os.environ)
    if what == "no home":
        environment |= {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
    result = subprocess.run(
        [*COMMAND, *case.words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=FAULTS.get(what),
    )
    code = result.returncode
    found.counts[f"{what}: exit code {code}"] += 1
    if "Traceback" in result.stderr or code not in (0, 2):
        found.complain(case, f"{what}: exit code {code}: {result.stderr[-400:]}")
    look(case, folder, found, hidden=code < 0)
    if code == 0:
        for name in case.outputs:
            (folder / name).write_bytes(OLD)
        for name in case.stays:
            shutil.rmtree(folder / name, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--interrupts", type=int, default=200)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="commands; default: all")
    parser.add_argument("--json", type=Path, help="write the counts there")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # what is ignored here, as in a shell's background, stays so there
        signal.signal(number, signal.SIG_DFL)
    rng, found = random.Random(options.seed), Found()
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        prepare(Path(root) / "given")
        chosen = [case for case in cases(Path(root) / "given") if options.only is None or case.name in options.only]
        for number, case in enumerate(chosen):
            folder = Path(root) / case.name
            folder.mkdir()
            measure(case, folder)
            print(f"{case.name}: {case.seconds:.1f} s", flush=True)
            counts = [n // len(chosen) + (number < n % len(chosen)) for n in (options.interrupts, options.kills)]
            trials = [rng.choice([signal.SIGINT, signal.SIGTERM]) for _ in range(counts[0])]
            trials += [signal.SIGKILL] * counts[1]
            rng.shuffle(trials)
            for i, trial in enumerate(trials, start=1):
                disturb(case, folder, trial, found, rng)
                if i % RUN_ALONE_AFTER == 0 or i == len(trials):
                    run_alone(case, folder, found)
            for what in (*FAULTS, "no home"):
                fault(case, folder, what, found)
            print(f"  so far: {dict(sorted(found.counts.items()))}", flush=True)
    slowest = max(found.answers, default=0.0)
    print(json.dumps(dict(sorted(found.counts.items())), indent=2))
    print(f"slowest answer: {slowest:.2f} s; {len(found.complaints)} complaints")
    if options.json:
        options.json.write_text(json.dumps({"counts": found.counts, "complaints": found.complaints}, indent=2))
    raise SystemExit(1 if found.complaints else 0)


if __name__ == "__main__":
    main()
