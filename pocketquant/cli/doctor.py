"""`doctor`: what this machine can do, and what to do where something fails."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pocketquant.cli.options import Json, option
from pocketquant.cli.screen import print_json

SCHEMA = "pocketquant.doctor/1"
_MARK = {"ok": "ok    ", "remark": "remark", "fail": "FAIL  "}


def doctor(
    renew: Annotated[
        bool, option("--renew", "", "Try llama.cpp's kernels again, in place of using the saved result.")
    ] = False,
    json: Json = False,
) -> None:
    """Examine this machine, and say what to do where something fails.

    Software, llama.cpp's kernels, memory, disk and extras are tried. The exit code is 1 if a part that is needed fails.
    """
    from pocketquant.doctor import examine, is_fit

    parts = examine(renew=renew)
    if json:
        print_json({"schema": SCHEMA, "is_fit": is_fit(parts), "parts": [asdict(part) for part in parts]})
    else:
        for part in parts:
            print(f"{_MARK[part.status]}  {part.name}: {part.found}")
            if part.remedy:
                print(f"          -> {part.remedy}")
    if not is_fit(parts):
        raise typer.Exit(1)
