"""The file format of reference packs: what a full-precision model said about a text, kept for later comparisons.

    0   8 bytes   magic, "PQREF", two zeros and the version
    8   u64       where the header starts
    16  u64       bytes of the header
    24  32 bytes  SHA-256 of the header
    56  sections, one behind the other, then the header to the end of the file: JSON

The header names every section with its offset, size and SHA-256, and says what the pack belongs to (`PackHeader`). All
numbers are little endian. A pack comes from anywhere: every length is checked against the file before it is used, every
field against its range, and every section against its digest, so a damaged pack is refused and never misread. The same
reference, text and settings give the same bytes; there is no time and no path in a pack.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pocketquant.errors import EvalError, OutputError, listing
from pocketquant.files.reading import read_at
from pocketquant.files.small import open_regular, parse_json
from pocketquant.formats import U8Array
from pocketquant.gguf_file.identity import FileIdentity

MAGIC = b"PQREF\0\0\1"
_FRONT = struct.Struct("<8sQQ32s")
_MAX_HEADER = 16 << 20
_PIECE = 1 << 24
_SHA256 = 64

I32Array = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TextIdentity:
    """A text by content, and how much of the pack comes from it.

    Attributes:
        windows: windows cut from it; the pack holds the texts' windows one text after the other.
        text_tokens: tokens of the whole text.
    """

    name: str
    size: int
    sha256: str
    windows: int
    text_tokens: int


@dataclass(frozen=True)
class HeadIdentity:
    """The output matrix that turns hidden states into logits.

    Attributes:
        name: of the tensor in its file.
        format: GGML's name of its type.
        n_embd: columns.
        sha256: of its bytes as stored.
    """

    name: str
    format: str
    n_embd: int
    sha256: str


@dataclass(frozen=True)
class Floor:
    """How far the pack is from the reference that it was made of, measured when it was made (`floor.FloorMeter`).

    Attributes:
        kld_mean: mean KL divergence between the live reference and what the pack gives back, in nats.
        kld_max: the largest one.
        shift: mean change of a position's divergence, up or down, for a model at 0.00125 nats from the reference.
        captured: that model's mean divergence as the pack shows it, over the true one: 1, but for packs of top tokens.
        positions: positions all this was measured at.
    """

    kld_mean: float
    kld_max: float
    shift: float
    captured: float
    positions: int


@dataclass(frozen=True)
class Section:
    """A stretch of the file. `offset` counts from its start."""

    offset: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class PackHeader:
    """What a pack holds and what it belongs to.

    Attributes:
        kind: "states" (final hidden states) or "top" (the most likely tokens).
        model: the reference, by content.
        sizes: dimension words -> numbers that every file of the same model shares.
        vocabulary: digest of its tokens as in `Runtime`; "" for a checkpoint, whose windows alone tell.
        bos: as in `Runtime`.
        context: tokens in a window.
        first_scored: first position of a window that is scored; the last one is context - 2.
        row_bytes: bytes per scored position.
        coding: how a hidden state is stored, "" in a pack of top tokens.
        head: what the states are multiplied with, None in a pack of top tokens.
        top: tokens kept per position, 0 in a pack of states.
        versions: names and versions of the software that computed the reference.
        quantized: the types that the reference's own matrices are rounded to; "" for full precision, and then not in
            the file.
    """

    kind: str
    model: FileIdentity
    sizes: Mapping[str, int]
    vocabulary: str
    n_vocab: int
    bos: int | None
    context: int
    first_scored: int
    texts: tuple[TextIdentity, ...]
    row_bytes: int
    coding: str
    head: HeadIdentity | None
    top: int
    floor: Floor
    versions: Mapping[str, str]
    quantized: str = ""

    @property
    def n_window(self) -> int:
        return sum(text.windows for text in self.texts)

    @property
    def scored_per_window(self) -> int:
        return self.context - 1 - self.first_scored

    @property
    def positions(self) -> int:
        """Scored positions in all."""
        return self.n_window * self.scored_per_window


@dataclass(frozen=True)
class Pack:
    """An opened pack: header and sections ("tokens", "rows" and perhaps "head"), no data."""

    path: Path
    header: PackHeader
    sections: Mapping[str, Section]

    def windows(self) -> I32Array:
        """The tokens, i32[n_window, context]."""
        section, header = self.sections["tokens"], self.header
        data = read_at(self.path, section.offset, section.nbytes).view("<i4")
        return data.reshape(header.n_window, header.context)

    def rows(self, window: int, start: int, stop: int) -> U8Array:
        """What is stored for positions [start, stop) of a window, u8[n, row_bytes]; 0 is the first scored one."""
        header = self.header
        place = (window * header.scored_per_window + start) * header.row_bytes
        data = read_at(self.path, self.sections["rows"].offset + place, (stop - start) * header.row_bytes)
        return data.reshape(stop - start, header.row_bytes)


class PackWriter:
    """Writes the sections of a pack in order, each in as many pieces as one likes, and then its header.

    A file that is there is written over, so that what another writer had put there can be taken up. OutputError where
    the disk takes no more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._sections: dict[str, Section] = {}
        self._digest = hashlib.sha256()

    def __enter__(self) -> PackWriter:
        self._file = open(self._path, "r+b" if self._path.exists() else "w+b")
        self._file.write(bytes(_FRONT.size))
        return self

    def add(self, name: str, data: U8Array) -> None:
        """Appends to the section `name`; begins it if another was written last."""
        assert self._file is not None
        if name not in self._sections:
            self._digest = hashlib.sha256()
            self._sections[name] = Section(self._file.tell(), 0, "")
        piece = np.ascontiguousarray(data).tobytes()
        with self._named():
            self._file.write(piece)
        self._digest.update(piece)
        section = self._sections[name]
        self._sections[name] = replace(section, nbytes=section.nbytes + len(piece), sha256=self._digest.hexdigest())

    def take_up(self, name: str, nbytes: int) -> str:
        """Begins the section `name` with bytes that are there already; what lies behind them goes.

        Returns:
            Their SHA-256, in hexadecimal digits; of fewer bytes, where the file ends before.
        """
        assert self._file is not None
        self._digest, start = hashlib.sha256(), self._file.tell()
        left = nbytes
        while left and (piece := self._file.read(min(left, _PIECE))):
            self._digest.update(piece)
            left -= len(piece)
        self._file.seek(start + nbytes - left)
        self._file.truncate()
        self._sections[name] = Section(start, nbytes - left, self._digest.hexdigest())
        return self._digest.hexdigest()

    def written(self, name: str) -> tuple[int, str]:
        """Bytes of a section so far, and their SHA-256 in hexadecimal digits."""
        section = self._sections[name]
        return section.nbytes, section.sha256

    def flush(self) -> None:
        """Has the file hold all that was added; OSError where it cannot."""
        if self._file is not None and not self._file.closed:
            self._file.flush()

    def finish(self, header: PackHeader) -> None:
        """Writes the header; nothing may be added after it.

        Raises:
            EvalError: the rows are not those of all positions.
        """
        assert self._file is not None
        nbytes = self._sections["rows"].nbytes if "rows" in self._sections else 0
        if nbytes != header.positions * header.row_bytes:
            raise EvalError(
                f"{nbytes} bytes of rows were kept, {header.positions} positions of {header.row_bytes} are wanted: the "
                "run was cut short"
            )
        sections = {name: asdict(section) for name, section in self._sections.items()}
        fields = {key: value for key, value in asdict(header).items() if key != "quantized" or value}
        data = json.dumps({**fields, "sections": sections}, sort_keys=True, separators=(",", ":")).encode()
        offset = self._file.tell()
        with self._named():
            self._file.write(data)
            self._file.truncate()
            self._file.seek(0)
            self._file.write(_FRONT.pack(MAGIC, offset, len(data), hashlib.sha256(data).digest()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with self._named():
                self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A full disk names no file by itself."""
        try:
            yield
        except OSError as caught:
            raise OutputError(f"{self._path}: cannot be written: {caught.strerror}") from caught


def is_pack(path: str | Path) -> bool:
    """Whether a file starts as a reference pack does, of any version."""
    try:
        with open_regular(path, EvalError) as file:
            return file.read(5) == MAGIC[:5]
    except (OSError, EvalError):
        return False


def read_pack(path: str | Path) -> Pack:
    """Opens a pack: reads its header and checks every section against its digest.

    Raises:
        EvalError: it cannot be read, is damaged or cut short, contradicts itself, or is of another version.
    """
    path = Path(path)
    try:
        with open_regular(path, EvalError) as file:
            size = os.fstat(file.fileno()).st_size
            front = file.read(_FRONT.size)
            if front[:5] != MAGIC[:5]:
                raise EvalError(f"{path}: no reference pack (it does not start with 'PQREF')")
            if front[:8] != MAGIC[: len(front[:8])]:
                raise EvalError(f"{path}: a reference pack of another version; make it again with this one")
            if len(front) < _FRONT.size:
                raise _damaged(path, "ends within its first bytes")
            _, offset, nbytes, digest = _FRONT.unpack(front)
            if not _FRONT.size <= offset <= size or nbytes != size - offset or nbytes > _MAX_HEADER:
                raise _damaged(path, f"its header should lie in bytes {offset} to {offset + nbytes} of {size}")
            file.seek(offset)
            data = file.read(nbytes)
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if hashlib.sha256(data).digest() != digest:
        raise _damaged(path, "the digest of its header differs")
    fields = parse_json(data, f"{path}, header", EvalError)
    try:
        header, sections = _header_of(fields), _sections_of(fields)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise EvalError(f"{path}: a reference pack with a wrong header ({error}); make it again") from error
    pack = Pack(path, header, sections)
    if problems := _find_problems(pack, offset):
        raise EvalError(f"{path}: a reference pack that contradicts itself; make it again:\n{listing(problems)}")
    changed = [name for name, section in sections.items() if _digest_section(path, section) != section.sha256]
    if changed:
        raise _damaged(path, f"the digest of {' and '.join(changed)} differs")
    tokens = pack.windows()
    if tokens.min() < 0 or tokens.max() >= header.n_vocab:
        raise EvalError(f"{path}: holds tokens outside its vocabulary of {header.n_vocab}; make it again")
    return pack


def _damaged(path: Path, what: str) -> EvalError:
    return EvalError(f"{path}: the reference pack is damaged or cut short ({what}); fetch it again or make it again")


def _digest_section(path: Path, section: Section) -> str:
    digest = hashlib.sha256()
    for start in range(0, section.nbytes, _PIECE):
        digest.update(read_at(path, section.offset + start, min(_PIECE, section.nbytes - start)).data)
    return digest.hexdigest()


def _find_problems(pack: Pack, header_offset: int) -> list[str]:
    header, sections = pack.header, pack.sections
    expected = {
        "tokens": 4 * header.n_window * header.context,
        "rows": header.positions * header.row_bytes,
    }
    problems = [f"no section {name!r}" for name in expected if name not in sections]
    problems += [f"an unknown section {name!r}" for name in sections if name not in (*expected, "head")]
    end = _FRONT.size
    for name, section in sections.items():
        if section.offset != end:
            problems.append(f"section {name!r} starts at byte {section.offset}, expected {end}")
        if section.nbytes != expected.get(name, section.nbytes):
            problems.append(f"section {name!r} has {section.nbytes} bytes, expected {expected[name]}")
        end = section.offset + section.nbytes
    if end != header_offset:
        problems.append(f"the sections end at byte {end}, the header starts at {header_offset}")
    if header.kind not in ("states", "top") or (header.kind == "top") != (header.top > 0):
        problems.append(f"kind {header.kind!r} with {header.top} tokens kept")
    if (header.kind == "states") != (header.head is not None) or ("head" in sections and header.head is None):
        problems.append(f"kind {header.kind!r} and its output matrix do not belong together")
    if not 0 <= header.first_scored < header.context - 1:
        problems.append(f"scored from position {header.first_scored} of a window of {header.context}")
    if not header.texts:
        problems.append("no text")
    return problems


def _header_of(fields: Any) -> PackHeader:
    model, floor = fields["model"], fields["floor"]
    head = fields["head"]
    bos = fields["bos"]
    return PackHeader(
        kind=_text(fields["kind"]),
        model=FileIdentity(_text(model["name"]), _whole(model["size"]), _text(model["sha256"])),
        sizes={_text(name): _whole(value) for name, value in fields["sizes"].items()},
        vocabulary=_text(fields["vocabulary"]),
        n_vocab=_whole(fields["n_vocab"], 2, 1 << 24),
        bos=None if bos is None else _whole(bos, 0, 1 << 24),
        context=_whole(fields["context"], 2, 1 << 24),
        first_scored=_whole(fields["first_scored"], 0, 1 << 24),
        texts=tuple(
            TextIdentity(
                _text(text["name"]),
                _whole(text["size"]),
                _text(text["sha256"]),
                _whole(text["windows"], 1, 1 << 24),
                _whole(text["text_tokens"]),
            )
            for text in fields["texts"]
        ),
        row_bytes=_whole(fields["row_bytes"], 1, 1 << 24),
        coding=_text(fields["coding"]),
        head=None
        if head is None
        else HeadIdentity(
            _text(head["name"]), _text(head["format"]), _whole(head["n_embd"], 1, 1 << 20), _text(head["sha256"])
        ),
        top=_whole(fields["top"], 0, 1 << 16),
        floor=Floor(
            kld_mean=_real(floor["kld_mean"]),
            kld_max=_real(floor["kld_max"]),
            shift=_real(floor["shift"]),
            captured=_real(floor["captured"]),
            positions=_whole(floor["positions"]),
        ),
        versions={_text(name): _text(value) for name, value in fields["versions"].items()},
        quantized=_text(fields.get("quantized", "")),
    )


def _sections_of(fields: Any) -> dict[str, Section]:
    sections = {
        _text(name): Section(_whole(item["offset"]), _whole(item["nbytes"]), _text(item["sha256"], _SHA256))
        for name, item in fields["sections"].items()
    }
    return dict(sorted(sections.items(), key=lambda item: item[1].offset))


def _text(value: Any, length: int | None = None) -> str:
    if not isinstance(value, str) or length not in (None, len(value)):
        raise TypeError(f"{value!r:.40} where a text should be")
    return value


def _whole(value: Any, low: int = 0, high: int = 1 << 62) -> int:
    if type(value) is not int or not low <= value <= high:
        raise TypeError(f"{value!r:.40} where a whole number from {low} to {high} should be")
    return value


def _real(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise TypeError(f"{value!r:.40} where a number from 0 on should be")
    return float(value)
