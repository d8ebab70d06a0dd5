"""The short texts that come with the package, one a domain, and how texts are named on the command line.

They are there so that every kind of text is looked at; for small error bars bring longer ones. See README.md beside
them for where they are from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pocketquant.demo import TEXTS, text_path
from pocketquant.errors import EvalError
from pocketquant.files.reading import sha256_of
from pocketquant.texts.corpus import CHAT_SUFFIX, Text

DOMAINS = "domains"
"""The name that stands for all texts of the package."""

PACKAGE = "package:"
"""What stands before the name of one text of the package, the embedded model's included: package:prose."""

_HERE = Path(__file__).parent


def domain_texts() -> list[Text]:
    """The texts of the package, in the order of their names."""
    files = [*_HERE.glob("*.txt"), *_HERE.glob(f"*{CHAT_SUFFIX}")]
    return [Text(path.stem, path) for path in sorted(files)]


def package_texts() -> dict[str, Path]:
    """Name -> file of every text of the package: one a domain, and those of the embedded model."""
    return {text.domain: text.path for text in domain_texts()} | {name: text_path(name) for name in TEXTS}


def name_in_package(name: str, sha256: str) -> str:
    """How a text is named on the command line: package:NAME where it is one of the package's, else by its file."""
    path = package_texts().get(Path(name).stem)
    return f"{PACKAGE}{Path(name).stem}" if path is not None and sha256_of(path) == sha256 else name


def _path(word: str) -> Path:
    if not word.startswith(PACKAGE) or Path(word).exists():
        return Path(word)
    texts = package_texts()
    if (path := texts.get(word.removeprefix(PACKAGE))) is None:
        raise EvalError(f"{word}: no such text comes with the package; there are: {', '.join(texts)}")
    return path


def read_texts(given: Sequence[str]) -> list[Text]:
    """What each of FILE, NAME=FILE, `domains` and package:NAME stands for; one without a name is called after its stem.

    Raises:
        EvalError: the package has no text of that name.
    """
    texts: list[Text] = []
    for each in given:
        name, is_named, path = each.partition("=")
        if each == DOMAINS:
            texts += domain_texts()
        elif is_named and not Path(each).exists():
            texts.append(Text(name, _path(path)))
        else:
            texts.append(Text(_path(each).stem, _path(each)))
    return texts
