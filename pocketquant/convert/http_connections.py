"""Connections to web servers, kept open between requests: a handshake costs as much as a megabyte.

Proxies and certificates come from where every program looks for them: HTTPS_PROXY, HTTP_PROXY, NO_PROXY; SSL_CERT_FILE,
SSL_CERT_DIR, REQUESTS_CA_BUNDLE.
"""

from __future__ import annotations

import os
import ssl
import threading
from base64 import b64encode
from dataclasses import dataclass, replace
from functools import lru_cache
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from importlib.util import find_spec
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

TIMEOUT_SECONDS = 30.0
_IDLE_PER_ORIGIN = 16
_DRAINABLE_BYTES = 1 << 16

_idle: dict[str, list[Connection]] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Connection:
    """One connection to a server.

    Attributes:
        origin: scheme, host and port it leads to.
        proxy_headers: set where each request is sent to a proxy that passes it on; None otherwise.
        is_used: it has answered before, so the other end may have closed it since.
    """

    origin: str
    line: HTTPConnection
    proxy_headers: dict[str, str] | None = None
    is_used: bool = False

    def get(self, url: str, headers: dict[str, str]) -> HTTPResponse:
        """Sends one GET and reads the head of the answer; OSError or HTTPException if there is none."""
        parts = urlsplit(url)
        target = quote(f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}", safe="/?&=%~:+,;@!$*'()-._")
        if self.proxy_headers is not None:
            target = f"{parts.scheme}://{parts.netloc}{target}"
        self.line.request("GET", target, headers=headers | (self.proxy_headers or {}))
        return self.line.getresponse()

    def close(self) -> None:
        self.line.close()


def origin_of(url: str) -> str:
    """Scheme, host and port: what must be the same for two addresses to be one server's."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def connect(url: str) -> Connection:
    """A connection to the address's server: an idle one if there is any."""
    origin = origin_of(url)
    with _lock:
        idle = _idle.get(origin)
        if idle:
            return replace(idle.pop(), is_used=True)
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
    if proxy is None:
        return Connection(origin, _line(parts.scheme, host, port))
    via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    headers = {}
    if via.username:
        user = f"{unquote(via.username)}:{unquote(via.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {b64encode(user.encode()).decode()}"
    line = _line(parts.scheme, via.hostname or "", via.port or 8080)
    if parts.scheme == "https":
        line.set_tunnel(host, port, headers)
        return Connection(origin, line)
    return Connection(origin, line, headers)


def keep(connection: Connection, response: HTTPResponse) -> None:
    """Puts a connection back for the next request if its answer was read to the end, else closes it."""
    try:
        if not response.isclosed() and response.length is not None and response.length <= _DRAINABLE_BYTES:
            response.read()
        if response.isclosed() and response.length == 0 and not response.will_close:
            with _lock:
                idle = _idle.setdefault(connection.origin, [])
                if len(idle) < _IDLE_PER_ORIGIN:
                    idle.append(connection)
                    return
    except Exception:  # an answer that cannot be read to its end: nothing was wanted from it any more
        pass
    response.close()
    connection.close()


def close_idle(url: str) -> None:
    """Closes every idle connection to the address's server."""
    with _lock:
        connections = _idle.pop(origin_of(url), [])
    for connection in connections:
        connection.close()


def _line(scheme: str, host: str, port: int | None) -> HTTPConnection:
    host = f"[{host}]" if ":" in host else host
    if scheme == "https":
        return HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=_tls())
    return HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    bundle = os.environ.get("REQUESTS_CA_BUNDLE")
    paths = ssl.get_default_verify_paths()
    if bundle is None and paths.cafile is None and paths.capath is None and find_spec("certifi"):
        import certifi  # some builds of Python come without certificates

        bundle = certifi.where()
    return ssl.create_default_context(cafile=bundle)


def _forget_after_fork() -> None:
    """A child process must not write into its parent's connections."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
