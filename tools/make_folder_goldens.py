"""Writes tests/golden/folders.json: what transformers makes of the tokenizers and of the tied heads of test folders.

    python tools/make_folder_goldens.py [PYTHON]   PYTHON has torch and transformers; .venv-peers/bin/python by default

For every tokenizer its length, end token, added tokens with whether they are special, and the ids of some texts; for
every pair of flags and every head whether embedding and head are the same numbers, by the class they are loaded as.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from folder_oracle import GOLDEN, ask_transformers  # noqa: E402


def main() -> None:
    python = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / ".venv-peers/bin/python")
    with tempfile.TemporaryDirectory() as folder:
        answers = ask_transformers(python, Path(folder))
    lines = [f'"transformers": {json.dumps(answers.pop("transformers"))}']
    for what, cases in answers.items():
        entries = ",\n".join(f"{json.dumps(name)}: {json.dumps(answer)}" for name, answer in cases.items())
        lines.append(f"{json.dumps(what)}: {{\n{entries}\n}}")
    GOLDEN.write_text("{" + ",\n".join(lines) + "}\n")
    print(f"{GOLDEN.name}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
