"""Puts llama.cpp's converter into an environment, as the release of llama-cpp-python that we test against carries it.

    .venv-peers/bin/python tools/get_converter.py      # writes .venv-peers/llama.cpp

The source distribution holds the whole of llama.cpp; only the converters and their gguf-py are kept.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

RELEASE = "0.3.36"
_KEPT = ("conversion/", "gguf-py/", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py")


def main() -> None:
    target = Path(sys.prefix) / "llama.cpp"
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"llama-cpp-python=={RELEASE}"
        ask = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, wanted]
        subprocess.run([sys.executable, "-m", *ask], check=True)
        [archive] = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            for member in source.getmembers():
                _, _, inside = member.name.partition("/vendor/llama.cpp/")
                if member.isfile() and inside.startswith(_KEPT):
                    member.name = inside
                    source.extract(member, target, filter="data")
    (target / "RELEASE").write_text(f"llama-cpp-python {RELEASE}\n")


if __name__ == "__main__":
    main()
