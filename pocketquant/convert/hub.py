"""A repository on Hugging Face -> `Snapshot`: small files whole, weights by byte ranges, all at one commit.

Listing, small files and tokens go through huggingface_hub, with its cache, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pocketquant.convert.folder import top_level
from pocketquant.convert.http_ranges import (
    HUGGING_FACE,
    MAX_WAIT_SECONDS,
    TRIES,
    HttpFile,
    refusal,
    too_busy,
    waiting,
    waiting_asked_for,
)
from pocketquant.convert.remote_file import RemoteFile
from pocketquant.convert.repository import (
    check_digests,
    check_room,
    missing_bytes,
    named_snapshot,
    small_files,
    weight_files,
)
from pocketquant.convert.safetensors import LocalFile, RangeFile
from pocketquant.convert.snapshot import Snapshot, local_snapshot
from pocketquant.errors import SourceError

# Unless the user says otherwise, requests do not tell which frameworks are installed nor who runs this.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_FETCHED_AT_ONCE = 8
_T = TypeVar("_T")


@contextmanager
def hub_snapshot(repo: str, revision: str | None, keep_source: Path | None = None) -> Iterator[Snapshot]:
    """The checkpoint in a repository, at the commit that `revision` is now.

    Args:
        repo: "org/name".
        revision: branch, tag or commit; None for the repository's main branch.
        keep_source: a folder to download the whole checkpoint into (as `keep_source/name`) and convert from there.

    Raises:
        SourceError: missing, gated, offline and not cached, changed meanwhile, or the hub keeps failing.
        OutputError: no room for `keep_source`.
    """
    from huggingface_hub import constants

    label = f"hf://{repo}" + (f"@{revision}" if revision else "")
    name = repo.split("/")[-1]
    if constants.HF_HUB_OFFLINE:
        folder = _cached_folder(repo, revision, label)
        local = local_snapshot(folder)
        offline = f"{label} (offline, {folder})"
        with named_snapshot(folder, name, offline, local.weights, local.entries) as snapshot:
            yield snapshot
        return
    files = _list_files(repo, revision, label)
    sizes = {name: file.size for name, file in files.items()}
    small, weights = small_files(label, sizes), weight_files(label, sizes)
    commit = files["config.json"].commit
    assert commit is not None
    if keep_source is not None:
        folder = keep_source / name
        check_room(folder, missing_bytes(folder, {name: files[name] for name in (*small, *weights)}))
        _download(repo, commit, [*small, *weights], label, into=folder)
        check_digests(folder, {name: _sha256(files[name]) for name in (*small, *weights)})
        yield local_snapshot(folder)
        return
    folder = _download(repo, commit, small, label, named=revision)
    ranged = {name: _weights(repo, commit, name, files[name]) for name in weights}
    with named_snapshot(folder, name, label, ranged, top_level(files)) as snapshot:
        yield snapshot


def _list_files(repo: str, revision: str | None, label: str) -> dict[str, HttpFile]:
    """Every file of the repository at the commit that the revision is now."""
    from huggingface_hub import HfApi, hf_hub_url

    api = HfApi(library_name="pocketquant")
    info = _ask(lambda: api.model_info(repo, revision=revision, files_metadata=True), label)
    commit = info.sha
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise SourceError(f"{label}: the hub names no commit for it")
    files = {}
    for item in info.siblings or ():
        etag = item.lfs.sha256 if item.lfs else item.blob_id
        url = hf_hub_url(repo, item.rfilename, revision=commit)
        size = item.size if isinstance(item.size, int) and item.size >= 0 else None
        files[item.rfilename] = HttpFile(
            HUGGING_FACE, url, f"hf://{repo}@{commit[:8]}/{item.rfilename}", size, etag, commit
        )
    return files


def _download(
    repo: str, commit: str, names: list[str], label: str, *, named: str | None = None, into: Path | None = None
) -> Path:
    """Downloads whole files, several at a time, into huggingface_hub's cache or a folder; the folder they are in."""
    from huggingface_hub import hf_hub_download

    def fetch(name: str, revision: str = commit) -> str:
        place = f"{label}: {name}"
        options = {"local_dir": into} if into else {}
        return _ask(
            lambda: hf_hub_download(repo, name, revision=revision, library_name="pocketquant", **options), place
        )

    if into is not None:
        for name in names:  # each is fetched in parts at once already, with a bar of its own
            fetch(name)
        return into
    with _without_bars(), ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:
        paths = list(pool.map(fetch, names))
        if named is None or not _COMMIT.fullmatch(named):
            fetch("config.json", named or "main")  # so that the cache knows, offline, which commit the name was
    return Path(paths[names.index("config.json")]).parent


def _weights(repo: str, commit: str, name: str, file: HttpFile) -> RangeFile:
    """A file of weights: in huggingface_hub's cache, if somebody downloaded it, else on the hub."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo, name, revision=commit)
    return LocalFile(Path(cached)) if isinstance(cached, str) else RemoteFile(file)


def _cached_folder(repo: str, revision: str | None, label: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise SourceError(
            f"{label}: not in the local cache, and HF_HUB_OFFLINE is set; unset it, or give a local folder"
        )
    folder = Path(cached).parent
    if not local_snapshot(folder).weights:
        raise SourceError(
            f"{label}: the local cache holds its config but not its weights, and HF_HUB_OFFLINE is set; unset it, or "
            f"download the whole checkpoint first: hf download {repo}"
        )
    return folder


def _sha256(file: HttpFile) -> str | None:
    """The digest, where the hub lists one: for files in large-file storage; others have a git object id."""
    return file.etag if file.etag and re.fullmatch(r"[0-9a-f]{64}", file.etag) else None


def _ask(question: Callable[[], _T], label: str) -> _T:
    """What huggingface_hub answers; it is asked again where the hub or the net may do better in a moment.

    Its errors are told in our words: theirs name addresses, and differ between its versions.
    """
    from huggingface_hub import errors

    for failures in range(1, TRIES + 1):
        wait = None
        try:
            return question()
        except errors.RevisionNotFoundError:
            raise SourceError(refusal(label, HUGGING_FACE, 404, "RevisionNotFound")) from None
        except errors.GatedRepoError as error:
            raise SourceError(refusal(label, HUGGING_FACE, _status(error) or 403, "GatedRepo")) from None
        except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
            if _status(error) is None:  # huggingface_hub's way of saying that it could not reach the hub
                reason = "the hub does not answer"
            else:
                raise SourceError(refusal(label, HUGGING_FACE, _status(error) or 404)) from None
        except errors.HFValidationError:
            raise SourceError(f"{label}: no name that a repository can have; give org/name") from None
        except errors.HfHubHTTPError as error:
            status = _status(error) or 0
            if status not in (0, 408, 429) and status < 500:
                raise SourceError(refusal(label, HUGGING_FACE, status)) from None
            reason = f"the hub answered {status}" if status else "the hub does not answer"
            wait = waiting_asked_for(error.response.headers) if error.response is not None else None
        except PermissionError as error:
            raise SourceError(f"{label}: its files cannot be stored: {error.strerror}: {error.filename}") from None
        except Exception as error:  # the HTTP client's own: requests', httpx's, by version
            reason = f"the hub does not answer ({type(error).__name__})"
        if wait is not None and wait > MAX_WAIT_SECONDS:
            raise SourceError(too_busy(label, wait))
        if failures < TRIES:
            time.sleep(waiting(failures) if wait is None else wait)
    raise SourceError(f"{label}: gave up after {TRIES} tries: {reason}; is the network up? Run the command again")


def _status(error: Any) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


@contextmanager
def _without_bars() -> Iterator[None]:
    """huggingface_hub draws a bar for every file; a dozen small ones need none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
