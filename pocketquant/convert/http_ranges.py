"""Byte ranges of files on a server, by HTTP: verified, resumed where they broke off, nothing sent but requests.

Python's own client, so that it does not matter which one the installed huggingface_hub is built on. A file is named by
an address that never changes its content (a commit, where the hub has them); what answers must still agree on size and
ETag, or the file is refused by name. Range requests: RFC 9110, section 14; `X-Linked-*`: huggingface_hub 2.4,
file_download.py.
"""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from urllib.parse import urljoin, urlsplit

import numpy as np

from pocketquant.convert.http_connections import Connection, close_idle, connect, keep, origin_of
from pocketquant.errors import SourceError
from pocketquant.formats import U8Array

HUGGING_FACE, MODELSCOPE = "Hugging Face", "ModelScope"
TRIES = 6
FIRST_WAIT_SECONDS = 0.5
MAX_WAIT_SECONDS = 300.0  # the window over which Hugging Face counts requests
_MAX_REDIRECTS = 5
_PROGRESS_BYTES = 1 << 16  # a try that brought less than this counts as failed
_SKIPPABLE_BYTES = 16 << 20  # what may be read and thrown away where a server ignores ranges
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_BUSY = (408, 429, 500, 502, 503, 504)
_USER_AGENT = "pocketquant"


@dataclass(frozen=True)
class HttpFile:
    """One file of a repository.

    Attributes:
        hub: HUGGING_FACE or MODELSCOPE; decides which token goes with a request to the address's own host.
        url: its address.
        label: its name for people: "hf://org/name@revision/model.safetensors".
        size: bytes, as the hub listed them; None for an answer of the hub itself.
        etag: sha256 or git object id, as the hub listed it.
        commit: the commit it is read at.
    """

    hub: str
    url: str
    label: str
    size: int | None = None
    etag: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class _Place:
    """Where the hub sent us for a file last time, and the ETag it had there."""

    url: str
    etag: str | None


class _Interrupted(Exception):
    """This try failed; another may not."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


_places: dict[str, _Place] = {}
_places_lock = threading.Lock()


def fetch_range(file: HttpFile, start: int, stop: int) -> U8Array:
    """Bytes [start, stop) as u8[stop - start], in one request unless it breaks off.

    Raises:
        SourceError: refused, gone, changed meanwhile, or still failing after `TRIES` tries.
    """
    data = np.empty(stop - start, np.uint8)
    view, done, failures = memoryview(data.data), 0, 0
    while True:
        wait, before = None, done
        try:
            done += _fill(file, start + done, stop, view[done:])
            reason = "the connection ended early"
        except _Interrupted as error:
            reason, wait = str(error), error.wait
        if done == len(data):
            return data
        failures = 0 if done - before >= _PROGRESS_BYTES else failures + 1
        _pause(file, start + done, failures, reason, wait)


def fetch_whole(file: HttpFile, max_bytes: int) -> bytes:
    """What a hub's own interface answers, refused above `max_bytes`."""
    failures = 0
    while True:
        try:
            return _read_whole(file, max_bytes)
        except _Interrupted as error:
            failures += 1
            _pause(file, 0, failures, str(error), error.wait)


def _read_whole(file: HttpFile, max_bytes: int) -> bytes:
    answer = _open(file, None)
    try:
        data = answer.response.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise SourceError(f"{file}: the answer is longer than {max_bytes} bytes")
        if answer.response.length:
            raise _Interrupted("the connection ended early")
        return data
    except (OSError, HTTPException) as error:
        raise _Interrupted(f"the connection ended early ({type(error).__name__})") from error
    finally:
        keep(answer.connection, answer.response)


def waiting_asked_for(headers: Message) -> float | None:
    """Seconds that Retry-After asks for, in either of its two forms; None without it."""
    text = str(headers.get("Retry-After") or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def _pause(file: HttpFile, at: int, failures: int, reason: str, asked: float | None) -> None:
    """Waits before the next try, as long as the hub asks for; raises where it is time to give up."""
    if failures >= TRIES:
        raise SourceError(f"{file}: gave up at byte {at} after {TRIES} tries: {reason}; run the command again")
    if asked is not None and asked > MAX_WAIT_SECONDS:
        raise SourceError(too_busy(file.label, asked))
    time.sleep(waiting(failures) if asked is None else asked)


def waiting(failures: int) -> float:
    """Seconds to wait after that many failures in a row."""
    return min(MAX_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (failures - 1)) if failures else 0.0


def too_busy(label: str, asked: float) -> str:
    """What to tell when a hub asks for more patience than there is."""
    return (
        f"{label}: the hub asks to wait {asked:.0f} seconds (too many requests); try again then, or log in, which "
        "raises the limit"
    )


@dataclass(frozen=True)
class _Answer:
    connection: Connection
    response: HTTPResponse
    skip: int = 0


def _fill(file: HttpFile, start: int, stop: int, view: memoryview) -> int:
    """Bytes put into `view` before the answer ended, well or not."""
    answer = _open(file, (start, stop))
    done = 0
    try:
        skip = answer.skip
        while skip and (piece := answer.response.read(min(skip, 1 << 20))):
            skip -= len(piece)
        while done < len(view):
            n = answer.response.readinto(view[done:])
            if not n:
                break
            done += n
    except (OSError, HTTPException):
        pass  # what came is kept, the rest is asked for again
    finally:
        keep(answer.connection, answer.response)
    return done


def _open(file: HttpFile, wanted: tuple[int, int] | None) -> _Answer:
    """The answer that holds the bytes wanted, through redirects, checked to be of the same file."""
    with _places_lock:
        place = _places.get(file.url)
    url = place.url if place else file.url
    for _ in range(_MAX_REDIRECTS):
        headers = {"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"}
        if wanted:
            headers["Range"] = f"bytes={wanted[0]}-{wanted[1] - 1}"
        if origin_of(url) == origin_of(file.url):  # a token never goes to another host
            headers |= _credentials(file.hub)
        try:
            connection, response = _get(url, headers)
        except _Interrupted as error:
            if place is None or url != place.url:
                raise
            _forget_place(file)  # a storage that is gone: the hub knows where the file is now
            raise _Interrupted(str(error), 0.0) from error
        if response.status in (301, 302, 303, 307, 308):
            keep(connection, response)
            _check_linked(file, response.headers)
            url = _redirected(file, url, response.headers.get("Location"))
            continue
        try:
            skip = _checked(file, url, place, response, wanted)
        except BaseException:
            keep(connection, response)
            raise
        return _Answer(connection, response, skip)
    raise SourceError(f"{file}: more than {_MAX_REDIRECTS} redirects")


def _forget_place(file: HttpFile) -> None:
    with _places_lock:
        _places.pop(file.url, None)


def _get(url: str, headers: dict[str, str]) -> tuple[Connection, HTTPResponse]:
    connection = None
    try:
        connection = connect(url)
        return connection, connection.get(url, headers)
    except (OSError, HTTPException) as error:
        wait = None
        if connection is not None:
            connection.close()
            if connection.is_used:  # it had been closed at the other end meanwhile, and so will the others
                close_idle(url)
                wait = 0.0
        what = str(error) if isinstance(error, OSError) and str(error) else type(error).__name__
        raise _Interrupted(f"no answer from {urlsplit(url).hostname} ({what})", wait) from error


def _redirected(file: HttpFile, url: str, location: str | None) -> str:
    target = urljoin(url, location or "")
    if not location or urlsplit(target).scheme not in ("http", "https"):
        raise SourceError(f"{file}: the hub redirects to no address")
    if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
        raise SourceError(f"{file}: the hub redirects from https to http; refused")
    return target


def _check_linked(file: HttpFile, headers: Message) -> None:
    """What a hub says about the file it redirects to."""
    size, etag, commit = (headers.get(f"X-{name}") for name in ("Linked-Size", "Linked-Etag", "Repo-Commit"))
    if size and file.size is not None and size != str(file.size):
        raise _changed(file, f"{file.size} bytes, now {size}")
    if etag and file.etag and _bare(etag) != file.etag:
        raise _changed(file, f"ETag {file.etag}, now {_bare(etag)}")
    if commit and file.commit and commit != file.commit:
        raise _changed(file, f"commit {file.commit}, now {commit}")


def _checked(
    file: HttpFile, url: str, place: _Place | None, response: HTTPResponse, wanted: tuple[int, int] | None
) -> int:
    """Bytes to skip before the first one wanted; raises what the status or the headers call for."""
    status, headers = response.status, response.headers
    if status in _BUSY:
        raise _Interrupted(f"the hub answered {status} {_phrase(response)}", waiting_asked_for(headers))
    if status in (401, 403, 404, 410) and origin_of(url) != origin_of(file.url):
        _forget_place(file)  # a signed address that has expired: ask the hub for a new one
        raise _Interrupted(f"the hub's storage answered {status} {_phrase(response)}", None if place is None else 0.0)
    if status not in (200, 206):
        raise SourceError(refusal(file.label, file.hub, status, headers.get("X-Error-Code")))
    if headers.get("Content-Encoding", "identity") != "identity":
        raise SourceError(f"{file}: the hub sends it compressed though asked not to")
    _check_linked(file, headers)
    etag = _bare(headers.get("ETag"))
    if url == file.url and file.hub == HUGGING_FACE and etag and file.etag and etag != file.etag:
        raise _changed(file, f"ETag {file.etag}, now {etag}")
    if place and place.url == url and place.etag and etag and etag != place.etag:
        raise _changed(file, f"ETag {place.etag}, now {etag}")
    if wanted is None:
        return 0
    skip = _skipped(file, response, wanted[0])
    if place is None and url != file.url:
        with _places_lock:
            _places[file.url] = _Place(url, etag)
    return skip


def _skipped(file: HttpFile, response: HTTPResponse, start: int) -> int:
    if response.status == 200:
        length = response.headers.get("Content-Length")
        if length is not None and file.size is not None and length != str(file.size):
            raise _changed(file, f"{file.size} bytes, now {length}")
        if start > _SKIPPABLE_BYTES:
            raise SourceError(f"{file}: the server sends no byte ranges; download it first, with --keep-source DIR")
        return start
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != start:
        raise SourceError(f"{file}: asked for byte {start}, the server sends other bytes than that")
    if match[3] != "*" and file.size is not None and int(match[3]) != file.size:
        raise _changed(file, f"{file.size} bytes, now {match[3]}")
    return 0


def _changed(file: HttpFile, what: str) -> SourceError:
    return SourceError(f"{file}: changed while it was being read ({what}); run the command again")


def refusal(label: str, hub: str, status: int, code: str | None = None) -> str:
    """What a hub's final "no" means and what to do about it."""
    if code == "GatedRepo" or status == 403:
        return f"{label}: gated ({status}); ask for access on its page on {hub}, then {_HOW_TO_LOG_IN[hub]}"
    if status == 401:
        return f"{label}: not found, or private ({status}); check the name, and for a private one {_HOW_TO_LOG_IN[hub]}"
    if code == "RevisionNotFound":
        return f"{label}: no such revision; give a branch, a tag or a commit that its page on {hub} lists"
    if status in (404, 410):
        return f"{label}: not found on {hub} ({status}); check the name, and for a private one {_HOW_TO_LOG_IN[hub]}"
    if status == 416:
        return f"{label}: changed while it was being read (it is shorter now); run the command again"
    return f"{label}: {hub} answered {status}; try again later"


_HOW_TO_LOG_IN = {
    HUGGING_FACE: "log in with `hf auth login` or set HF_TOKEN",
    MODELSCOPE: "set MODELSCOPE_API_TOKEN",
}


def _credentials(hub: str) -> dict[str, str]:
    """The header that says who asks. Looked up at every request: never stored, pickled or printed."""
    if hub == MODELSCOPE:
        token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
        # its older addresses know the cookie only (modelscope_hub 0.5.1, _legacy_api.py)
        return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    from huggingface_hub import constants, get_token

    found = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"Authorization": f"Bearer {found}"} if found else {}


def _bare(etag: str | None) -> str | None:
    return etag.removeprefix("W/").strip('"') if etag else None


def _phrase(response: HTTPResponse) -> str:
    return re.sub(r"[^ -~]", "", response.reason or "")[:60]
