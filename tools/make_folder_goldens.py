"""Writes tests/golden/folders.json and peft_names.json: what transformers and PEFT make of test folders.

    python tools/make_folder_goldens.py [PYTHON]   PYTHON has both, and torch; .venv-peers/bin/python by default

The second has the names and shapes that PEFT saves for adapters of a tied model. The first has for every tokenizer its
length, end token, added tokens with whether they are special, and the ids of some texts; for every pair of flags and
every head whether embedding and head are the same numbers, by the class they are loaded as.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from checkpoint_maker import make_checkpoint  # noqa: E402
from folder_oracle import GOLDEN, ask_transformers  # noqa: E402
from peft_cases import GOLDEN as PEFT_GOLDEN  # noqa: E402
from peft_cases import ask_peft  # noqa: E402


def main() -> None:
    python = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / ".venv-peers/bin/python")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        keep(GOLDEN, ask_transformers(python, folder / "transformers"))
        keep(PEFT_GOLDEN, ask_peft(python, make_checkpoint(folder / "base"), folder / "peft"))


def keep(path: Path, answers: dict[str, Any]) -> None:
    """One line for each case, so that a change is seen."""
    lines = []
    for what, content in answers.items():
        if isinstance(content, dict):
            entries = ",\n".join(f"{json.dumps(name)}: {json.dumps(answer)}" for name, answer in content.items())
            lines.append(f"{json.dumps(what)}: {{\n{entries}\n}}")
        else:
            lines.append(f"{json.dumps(what)}: {json.dumps(content)}")
    path.write_text("{" + ",\n".join(lines) + "}\n")
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
