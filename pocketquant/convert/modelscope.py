"""A repository on ModelScope -> `Snapshot`, over its public HTTP interface.

Addresses and fields: modelscope 1.20.0 hub/{api,file_download}.py; modelscope_hub 0.5.1 _legacy_api.py, _download.py.
It has no address for the files of a commit, as Hugging Face has: files are read at the branch or tag given, and one
that changes meanwhile is found out by its size, ETag and, for small and kept files, sha256.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from pocketquant.convert.folder import top_level
from pocketquant.convert.http_ranges import MODELSCOPE, HttpFile, fetch_whole
from pocketquant.convert.remote_file import BLOCK_BYTES, RemoteFile
from pocketquant.convert.repository import (
    check_digests,
    check_room,
    missing_bytes,
    named_snapshot,
    small_files,
    weight_files,
)
from pocketquant.convert.snapshot import Snapshot, local_snapshot
from pocketquant.errors import SourceError
from pocketquant.files.replacing import replacing
from pocketquant.files.small import parse_json

_MAX_LISTING_BYTES = 64 << 20
_LISTING_LIMIT = 3000  # a longer listing is cut there without a word (modelscope_hub, constants.py)
_FETCHED_AT_ONCE = 8


@contextmanager
def modelscope_snapshot(repo: str, revision: str | None, keep_source: Path | None = None) -> Iterator[Snapshot]:
    """The checkpoint in a repository on ModelScope.

    Args:
        repo: "org/name".
        revision: branch or tag; None for master.
        keep_source: a folder to download the whole checkpoint into (as `keep_source/name`) and convert from there.

    Raises:
        SourceError: missing, private, changed meanwhile, or the hub keeps failing.
        OutputError: no room for `keep_source`.
    """
    label = f"ms://{repo}" + (f"@{revision}" if revision else "")
    model_name = repo.split("/")[-1]
    files = _list_files(repo, revision or "master", label)
    sizes = {name: file.size for name, file in files.items()}
    small, weights = small_files(label, sizes), weight_files(label, sizes)
    if keep_source is not None:
        folder = keep_source / model_name
        check_room(folder, missing_bytes(folder, {name: files[name] for name in (*small, *weights)}))
        for name in (*small, *weights):
            if not (folder / name).is_file():
                _download(files[name], folder / name)
        check_digests(folder, {name: files[name].etag for name in (*small, *weights)})
        yield local_snapshot(folder)
        return
    with tempfile.TemporaryDirectory(prefix="pocketquant-") as temporary:
        with ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:
            list(pool.map(lambda name: _store(files[name], Path(temporary) / name), small))
        ranged = {name: RemoteFile(files[name]) for name in weights}
        with named_snapshot(Path(temporary), model_name, label, ranged, top_level(files)) as snapshot:
            yield snapshot


def _list_files(repo: str, revision: str, label: str) -> dict[str, HttpFile]:
    base = f"{_endpoint()}/api/v1/models/{quote(repo)}/repo"
    query = urlencode({"Revision": revision, "Recursive": "True"})
    raw = fetch_whole(HttpFile(MODELSCOPE, f"{base}/files?{query}", label), _MAX_LISTING_BYTES)
    entries = _entries(raw, label)
    files = {}
    for entry in entries:
        name, size, digest = entry.get("Path"), entry.get("Size"), entry.get("Sha256")
        if entry.get("Type") == "tree" or not isinstance(name, str):
            continue
        files[name] = HttpFile(
            MODELSCOPE,
            f"{base}?{urlencode({'Revision': revision, 'FilePath': name})}",
            f"{label}/{name}",
            size if type(size) is int and size > 0 else None,
            digest if isinstance(digest, str) and digest else None,
        )
    if "config.json" not in files and len(entries) >= _LISTING_LIMIT:
        raise SourceError(f"{label}: more files than ModelScope lists; download it, and give the folder")
    return files


def _entries(raw: bytes, label: str) -> list[dict[str, Any]]:
    answer = parse_json(raw, f"{label}: ModelScope's answer (is the endpoint right?)")
    data = answer.get("Data") if isinstance(answer, dict) else None
    entries = data.get("Files") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise SourceError(f"{label}: ModelScope lists no files for it; check the name and the revision")
    return [entry for entry in entries if isinstance(entry, dict)]


def _store(file: HttpFile, path: Path) -> None:
    """Fetches a small file whole and checks it against its digest."""
    data = RemoteFile(file).read(0, file.size or 0).tobytes()
    if file.etag and hashlib.sha256(data).hexdigest() != file.etag:
        raise SourceError(f"{file}: differs from the sha256 that ModelScope lists; run the command again")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _download(file: HttpFile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = file.size or 0
    whole = RemoteFile(file).within(0, size)
    with replacing(path) as temporary, open(temporary, "wb") as out:
        for start in range(0, size, BLOCK_BYTES):
            out.write(whole.read(start, min(BLOCK_BYTES, size - start)).data)


def _endpoint() -> str:
    """MODELSCOPE_ENDPOINT, else MODELSCOPE_DOMAIN, else the Chinese site; https where no scheme is given."""
    given = os.environ.get("MODELSCOPE_ENDPOINT", "").strip() or os.environ.get("MODELSCOPE_DOMAIN", "").strip()
    endpoint = (given or "www.modelscope.cn").rstrip("/")
    return endpoint if endpoint.startswith(("http://", "https://")) else f"https://{endpoint}"
