"""A hub on this machine: what the Hugging Face and ModelScope clients ask for, with faults on demand.

Two servers, as in the real thing: the hub, which lists and redirects, and the storage that large files come from, at
another host name, so that a token sent there would be seen. Protocol: huggingface_hub 2.4.0 (hf_api.py,
file_download.py, utils/_http.py); modelscope 1.20.0 (hub/api.py, hub/file_download.py).
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"
TOKEN = "hf_secretsecretsecret"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that `where` is part of (a path, after "GET " or "HEAD ").

    Attributes:
        status: answer this instead.
        headers: with these.
        cut: send this many bytes of the body, then drop the connection.
        after: let this many requests through first.
    """

    where: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    times: int = 1
    after: int = 0


@dataclass
class Hub:
    """The repositories served and what was asked of them.

    Attributes:
        folders: "org/name" -> folder.
        gated: names that need TOKEN.
        served: file name -> bytes of body sent.
        requests: (method and path, headers), in order.
        edit: called with a file's name and bytes before they are served.
        listed_digest: file name -> a sha256 to list instead of the true one.
        no_ranges: the storage ignores Range.
    """

    folders: dict[str, Path]
    url: str = ""
    storage_url: str = ""
    gated: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    edit: Callable[[str, bytes], bytes] = lambda name, data: data
    listed_digest: dict[str, str] = field(default_factory=dict)
    no_ranges: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault_for(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.where in line and fault.times > 0:
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def asked(self, text: str) -> list[dict[str, str]]:
        """Headers of every request whose line holds a text."""
        return [headers for line, headers in self.requests if text in line]

    def reset(self) -> None:
        """Forgets what was asked."""
        self.served.clear()
        self.requests.clear()


def is_large(name: str) -> bool:
    """Whether a file lives in the storage rather than on the hub itself."""
    return name.endswith(".safetensors") or name == "tokenizer.json"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        line = f"{self.command} {self.path}"
        with self.hub.lock:
            self.hub.requests.append((line, dict(self.headers)))
        fault = self.hub.fault_for(line)
        if fault and fault.status:
            self.reply(fault.status, b"", fault.headers)
            return
        cut = fault.cut if fault else None
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            self.model_info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif parts[0] == "storage":
            self.content("/".join(parts[1:3]), "/".join(parts[3:]), {}, cut)
        elif parts[:3] == ["api", "v1", "models"] and parts[5:] == ["repo", "files"]:
            self.modelscope_listing("/".join(parts[3:5]), query["Revision"][0])
        elif parts[:3] == ["api", "v1", "models"] and parts[5:] == ["repo"]:
            self.modelscope_file("/".join(parts[3:5]), query["FilePath"][0], cut)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), cut)
        else:
            self.reply(404, b"")

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body if cut is None else body[:cut]
        try:
            self.wfile.write(sent)
        except OSError:
            self.close_connection = True
        if cut is not None:
            self.close_connection = True

    def folder(self, name: str) -> Path | None:
        """The repository's folder; answers for itself if it may not be seen."""
        if name not in self.hub.folders:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        if name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 403 if self.headers.get("Authorization") else 401
            self.reply(status, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            return None
        return self.hub.folders[name]

    def model_info(self, name: str, revision: str) -> None:
        folder = self.folder(name)
        if folder is None:
            return
        if revision not in ("main", "v1", COMMIT):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            item = {"rfilename": str(path.relative_to(folder)), "size": len(data), "blobId": git_id(data)}
            if is_large(path.name):
                digest = self.hub.listed_digest.get(path.name, sha256(data))
                item["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(item)
        info = {
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, file_name: str, cut: int | None) -> None:
        folder = self.folder(name)
        if folder is None:
            return
        if revision not in ("main", "v1", COMMIT) or not (folder / file_name).is_file():
            code = "EntryNotFound" if revision in ("main", "v1", COMMIT) else "RevisionNotFound"
            self.reply(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        data = self.hub.edit(file_name, (folder / file_name).read_bytes())
        if not is_large(file_name):
            self.content(name, file_name, {"X-Repo-Commit": COMMIT, "ETag": f'"{git_id(data)}"'}, cut)
            return
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{sha256(data)}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.storage_url}/storage/{name}/{file_name}?X-Signature=abc",
        }
        self.reply(302, b"", headers)

    def content(self, name: str, file_name: str, headers: dict[str, str], cut: int | None) -> None:
        data = self.hub.edit(file_name, (self.hub.folders[name] / file_name).read_bytes())
        headers = {"Accept-Ranges": "bytes", "ETag": f'"storage-{git_id(data)}"', **headers}
        wanted, status = self.headers.get("Range"), 200
        if wanted and not self.hub.no_ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
            if start >= len(data):
                self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if self.command == "GET":
            with self.hub.lock:
                self.hub.served[file_name] += len(data) if cut is None else min(cut, len(data))
        self.reply(status, data, headers, cut)

    def modelscope_listing(self, name: str, revision: str) -> None:
        if name not in self.hub.folders or revision not in ("master", "v1"):
            body = {"Code": 10010205001, "Data": None, "Message": "Not found", "Success": False}
            self.reply(404, json.dumps(body).encode())
            return
        folder = self.hub.folders[name]
        files = []
        for path in sorted(folder.rglob("*")):
            item = {"Name": path.name, "Path": str(path.relative_to(folder)), "Type": "tree", "Size": 0}
            if path.is_file():
                data = path.read_bytes()
                digest = self.hub.listed_digest.get(path.name, sha256(data))
                item |= {"Type": "blob", "Size": len(data), "Sha256": digest, "Revision": COMMIT}
            files.append(item)
        body = {"Code": 200, "Data": {"Files": files}, "Message": "success", "Success": True}
        self.reply(200, json.dumps(body).encode())

    def modelscope_file(self, name: str, file_name: str, cut: int | None) -> None:
        if not (self.hub.folders[name] / file_name).is_file():
            self.reply(404, b"")
        elif is_large(file_name):
            self.reply(302, b"", {"Location": f"{self.hub.storage_url}/storage/{name}/{file_name}?Expires=1"})
        else:
            self.content(name, file_name, {}, cut)


@contextmanager
def serving(folders: dict[str, Path]) -> Iterator[Hub]:
    """A hub of these repositories, for as long as the block runs."""
    hub = Hub(folders)
    handler = type("Handler", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.url = f"http://127.0.0.1:{servers[0].server_port}"
    hub.storage_url = f"http://localhost:{servers[1].server_port}"
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
