"""What a dry run says: time, memory and disk, the first two measured on the first steps of the very run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pocketquant.cli.options import Talk
from pocketquant.cli.screen import print_json, size
from pocketquant.extras import install_command

if TYPE_CHECKING:
    from pocketquant.pace import Pace


MOST_TRIAL_BYTES = 4_000_000_000
"""A dry run writes no larger file: what it says must come in a minute or so."""


def say_pace(pace: Pace, unit: str, disk_bytes: int, talk: Talk, others: Mapping[str, Any] | None = None) -> None:
    """Says what a whole run costs, as a line and as JSON.

    Args:
        pace: from a trial of the run.
        unit: of its steps, "windows".
        disk_bytes: what it writes.
        talk: where to.
        others: what else the plan says, in front of it.
    """
    memory = "" if pace.peak_bytes is None else f", {size(pace.peak_bytes)} of memory"
    disk = f", {size(disk_bytes)} of disk" if disk_bytes else ""
    talk.say(
        f"about {duration(pace.seconds)} on this machine: {pace.steps} {unit} of {pace.step_seconds:.3g} s each, of "
        f"which {pace.tried} were tried{memory}{disk}"
    )
    if talk.json:
        costs = {
            "steps": pace.steps,
            "unit": unit,
            "tried": pace.tried,
            "seconds": round(pace.seconds, 3),
            "seconds_per_step": round(pace.step_seconds, 6),
            "peak_bytes": pace.peak_bytes,
            "disk_bytes": disk_bytes,
        }
        print_json({**(others or {}), **costs, **(others or {})}, of="plan")


def can_try(nbytes: int, texts: Sequence[Any], talk: Talk) -> bool:
    """Whether a trial may make a full-precision GGUF of so many bytes and run it over texts; says why it may not."""
    if "self" in texts:
        talk.say("note: the time is not known, since the model would have to write the text for a trial")
        return False
    if find_spec("llama_cpp") is None:
        talk.say(f"note: the time is not known, since it takes a trial; {install_command('eval')}")
        return False
    if nbytes > MOST_TRIAL_BYTES:
        talk.say(
            f"note: the time is not known, since a trial would write {size(nbytes)}; give a full-precision GGUF to a "
            "dry run of `imatrix`, `calibrate` or `eval` to learn how long that part takes"
        )
        return False
    return True


def duration(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
