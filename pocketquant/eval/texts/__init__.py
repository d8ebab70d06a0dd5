"""The short texts that come with the package, one a domain, and how texts are named on the command line.

They are there so that every kind of text is looked at; for small error bars bring longer ones. See README.md beside
them for where they are from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pocketquant.eval.corpus import CHAT_SUFFIX, Text

DOMAINS = "domains"
"""The name that stands for all texts of the package."""

_HERE = Path(__file__).parent


def domain_texts() -> list[Text]:
    """The texts of the package, in the order of their names."""
    files = [*_HERE.glob("*.txt"), *_HERE.glob(f"*{CHAT_SUFFIX}")]
    return [Text(path.stem, path) for path in sorted(files)]


def read_texts(given: Sequence[str]) -> list[Text]:
    """What each of FILE, NAME=FILE and `domains` stands for; a file without a name is called after its stem."""
    texts: list[Text] = []
    for each in given:
        name, is_named, path = each.partition("=")
        if each == DOMAINS:
            texts += domain_texts()
        elif is_named and not Path(each).exists():
            texts.append(Text(name, Path(path)))
        else:
            texts.append(Text(Path(each).stem, Path(each)))
    return texts
