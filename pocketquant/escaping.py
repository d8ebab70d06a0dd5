"""Foreign text in messages, tables and pages: names of files, models, tensors and tokens may hold anything.

Nothing of it may begin a line, move a terminal's cursor, turn the direction of writing round or become markup.
"""

from __future__ import annotations

import re

LONGEST_LINE = 1000
"""Characters of a message's line; what is longer loses its middle."""

_names: set[str] = set()
"""Parts of paths that hold line ends, which nothing in a finished message tells from the message's own."""
_MOST_NAMES = 1000

_MARKUP = re.compile(r"[\\`*\[\]|#]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "@<!-- -->"}
"""The last one keeps a name from being notified, which no escape in Markdown does; it is not seen."""


def one_line(text: str, most: int | None = None) -> str:
    r"""Text as one line of printable characters, all others as \n, \x1b, \u202e; shortened to `most`, if given."""
    if most is not None and len(text) > most:
        text = f"{text[: most - most // 3]} … {text[-(most // 3) :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def as_lines(text: str, most: int | None = LONGEST_LINE) -> str:
    """The same line by line, none longer than `most`: line ends stay, but for those of names that were noted."""
    for name in sorted(_names, key=len, reverse=True):
        text = text.replace(name, one_line(name))
    return "\n".join(one_line(line, most) for line in text.split("\n"))


def note_name(path: str) -> None:
    """Has `as_lines` show a path that was given or found as one line, whatever line ends are in its parts."""
    if "\n" in path and len(_names) < _MOST_NAMES:
        _names.update(part for part in re.split("[/=]", path) if "\n" in part)


def is_text(text: str) -> bool:
    """Whether UTF-8 can write it: names of files may hold bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def for_markdown(text: str) -> str:
    """One line that Markdown and HTML leave as it is: no markup, no table's cell, no image, no mention."""
    line = _MARKUP.sub(r"\\\g<0>", one_line(text))
    return "".join(_ENTITIES.get(c, c) for c in line)


def as_code(text: str) -> str:
    """One line as code in Markdown, whatever backquotes are in it; a cell of a table ends at no `|` in it."""
    line = one_line(text).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    space = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}" if line else ""


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
