"""Byte ranges by HTTP, from a real server that misbehaves on demand."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from email.message import Message
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from hub_server import COMMIT, TOKEN, Fault, Hub, serving, sha256

from pocketquant.convert import http_ranges, remote_file
from pocketquant.convert.http_ranges import HUGGING_FACE, MODELSCOPE, HttpFile, fetch_range, waiting_asked_for
from pocketquant.convert.remote_file import RemoteFile
from pocketquant.errors import SourceError

NAME = "model.safetensors"
DATA = np.random.default_rng(5).integers(0, 256, 1 << 20, np.uint8)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / NAME).write_bytes(DATA.tobytes())
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(http_ranges, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(http_ranges, "_places", {})  # another test's hub may have had the same port
    monkeypatch.setattr(remote_file, "_blocks", type(remote_file._blocks)())
    with serving({"org/name": tmp_path}) as hub:
        yield hub


def address(hub: Hub, **changes: object) -> HttpFile:
    url = f"{hub.url}/org/name/resolve/{COMMIT}/{NAME}"
    fields = {"size": DATA.size, "etag": sha256(DATA.tobytes()), "commit": COMMIT, **changes}
    return HttpFile(HUGGING_FACE, url, f"hf://org/name/{NAME}", **fields)


def test_ranges_come_through_the_redirect_which_is_asked_for_once(hub: Hub) -> None:
    for start, stop in [(0, 8), (8, 5000), (DATA.size - 3, DATA.size)]:
        assert np.array_equal(fetch_range(address(hub), start, stop), DATA[start:stop])
    assert len(hub.asked("/resolve/")) == 1
    assert len(hub.asked("/storage/")) == 3
    assert hub.served[NAME] == 8 + 4992 + 3


def test_the_token_goes_to_the_hub_and_nowhere_else(hub: Hub) -> None:
    fetch_range(address(hub), 0, 8)
    assert [headers.get("Authorization") for headers in hub.asked("/resolve/")] == [f"Bearer {TOKEN}"]
    assert [headers.get("Authorization") for headers in hub.asked("/storage/")] == [None]


def test_requests_say_what_is_wanted_and_nothing_about_the_machine(hub: Hub) -> None:
    fetch_range(address(hub), 0, 8)
    assert set(hub.asked("/storage/")[0]) == {"Host", "User-Agent", "Accept-Encoding", "Range"}
    assert hub.asked("/storage/")[0]["User-Agent"] == "pocketquant"


def test_a_file_is_pickled_without_token_or_connection(hub: Hub) -> None:
    file = RemoteFile(address(hub)).within(100, 5000)
    raw = pickle.dumps(file)
    assert TOKEN.encode() not in raw
    assert np.array_equal(pickle.loads(raw).read(100, 50), DATA[100:150])


def test_another_process_reads_with_a_connection_of_its_own(hub: Hub) -> None:
    file = RemoteFile(address(hub)).within(100, 5000)
    assert np.array_equal(file.read(100, 50), DATA[100:150])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert np.array_equal(pool.submit(file.read, 200, 50).result(timeout=60), DATA[200:250])
    assert len(hub.asked("/resolve/")) == 2


# ---------------------------------------------------------------- faults


def test_a_dropped_connection_goes_on_where_it_broke_off(hub: Hub) -> None:
    hub.faults = [Fault("/storage/", cut=70_000), Fault("/storage/", cut=10_000)]
    assert np.array_equal(fetch_range(address(hub), 1000, 201_000), DATA[1000:201_000])
    ranges = [headers["Range"] for headers in hub.asked("/storage/")]
    assert ranges == ["bytes=1000-200999", "bytes=71000-200999", "bytes=81000-200999"]
    assert hub.served[NAME] == 200_000


def test_a_connection_that_always_breaks_off_is_given_up(hub: Hub) -> None:
    hub.faults = [Fault("/storage/", cut=10, times=99)]
    with pytest.raises(SourceError, match=rf"hf://org/name/{NAME}: gave up at byte 60 after 6 tries: .*ended early"):
        fetch_range(address(hub), 0, 5000)


def test_a_connection_that_breaks_off_but_moves_is_not_given_up(hub: Hub) -> None:
    hub.faults = [Fault("/storage/", cut=70_000, times=99)]
    assert np.array_equal(fetch_range(address(hub), 0, 900_000), DATA[:900_000])
    assert len(hub.asked("/storage/")) == 13


@pytest.mark.parametrize("where", ["/resolve/", "/storage/"])
@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_a_failing_hub_is_asked_again(status: int, where: str, hub: Hub) -> None:
    hub.faults = [Fault(where, status=status, times=2)]
    assert np.array_equal(fetch_range(address(hub), 0, 5000), DATA[:5000])


def test_a_hub_that_keeps_failing_is_given_up(hub: Hub) -> None:
    hub.faults = [Fault("/resolve/", status=503, times=99)]
    with pytest.raises(SourceError, match=r"gave up at byte 0 after 6 tries: the hub answered 503"):
        fetch_range(address(hub), 0, 5000)
    assert len(hub.requests) == 6


def test_too_many_requests_waits_as_long_as_asked(hub: Hub) -> None:
    hub.faults = [Fault("/resolve/", status=429, headers={"Retry-After": "1"})]
    started = time.monotonic()
    assert np.array_equal(fetch_range(address(hub), 0, 5000), DATA[:5000])
    assert 1.0 <= time.monotonic() - started < 3.0


def test_too_long_a_wait_is_refused_with_advice(hub: Hub) -> None:
    hub.faults = [Fault("/resolve/", status=429, headers={"Retry-After": "86400"})]
    with pytest.raises(SourceError, match=r"asks to wait 86400 seconds \(too many requests\).*log in"):
        fetch_range(address(hub), 0, 5000)


def test_retry_after_has_two_forms() -> None:
    def asked(text: str | None) -> float | None:
        headers = Message()
        if text is not None:
            headers["Retry-After"] = text
        return waiting_asked_for(headers)

    assert asked("17") == 17.0
    assert asked(formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert asked(formatdate(time.time() - 30, usegmt=True)) == 0.0
    assert [asked(text) for text in (None, "soon", "-3", "")] == [None] * 4


def test_an_expired_signed_address_is_asked_for_again(hub: Hub) -> None:
    fetch_range(address(hub), 0, 8)
    hub.faults = [Fault("/storage/", status=403)]
    assert np.array_equal(fetch_range(address(hub), 8, 16), DATA[8:16])
    assert len(hub.asked("/resolve/")) == 2


def test_a_storage_that_is_gone_is_looked_for_again(hub: Hub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    file = address(hub)
    http_ranges._places[file.url] = http_ranges._Place(f"http://localhost:{port}/storage/{NAME}", None)
    assert np.array_equal(fetch_range(file, 0, 5000), DATA[:5000])
    assert len(hub.asked("/resolve/")) == 1


def test_idle_connections_closed_meanwhile_cost_no_wait(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_range(address(hub), 0, 8)
    for idle in http_ranges.close_idle.__globals__["_idle"].values():
        for connection in idle:
            connection.line.sock.shutdown(2)
    monkeypatch.setattr(http_ranges, "FIRST_WAIT_SECONDS", 60)
    assert np.array_equal(fetch_range(address(hub), 8, 16), DATA[8:16])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("/resolve/", status=401), r"not found, or private \(401\).*hf auth login"),
        (Fault("/resolve/", status=403), r"gated \(403\); ask for access.*HF_TOKEN"),
        (Fault("/resolve/", status=401, headers={"X-Error-Code": "GatedRepo"}), r"gated \(401\); ask for access"),
        (Fault("/resolve/", status=404), r"not found on Hugging Face \(404\)"),
        (Fault("/resolve/", status=404, headers={"X-Error-Code": "RevisionNotFound"}), "no such revision"),
        (Fault("/resolve/", status=418), "Hugging Face answered 418"),
        (Fault("/resolve/", status=302), "redirects to no address"),
        (Fault("/resolve/", status=302, headers={"Location": "file:///etc/passwd"}), "redirects to no address"),
        (Fault("/resolve/", status=302, headers={"Location": "?"}, times=99), "more than 5 redirects"),
        (Fault("/storage/", status=206), "sends other bytes"),
        (Fault("/storage/", status=206, headers={"Content-Range": "bytes 0-7/999"}), "changed while .*1048576 .* 999"),
        (Fault("/storage/", status=206, headers={"Content-Range": "bytes 8-15/1048576"}), "sends other bytes"),
        (Fault("/storage/", status=206, headers={"Content-Encoding": "gzip"}), "compressed"),
        (Fault("/storage/", status=416), "shorter now"),
    ],
)
def test_refusals_say_what_to_do_and_no_secret(fault: Fault, message: str, hub: Hub) -> None:
    hub.faults = [fault]
    with pytest.raises(SourceError, match=rf"^hf://org/name/{NAME}: .*{message}") as caught:
        fetch_range(address(hub), 0, 8)
    assert TOKEN not in str(caught.value)
    assert "Signature" not in str(caught.value)


# ---------------------------------------------------------------- changed meanwhile


def test_a_file_that_changes_between_two_requests_is_named(hub: Hub) -> None:
    fetch_range(address(hub), 0, 8)
    hub.edit = lambda name, data: data[::-1]
    with pytest.raises(SourceError, match=rf"{NAME}: changed while it was being read \(ETag .*, now .*run the command"):
        fetch_range(address(hub), 8, 16)


def test_a_file_that_changes_and_gets_a_new_address_is_named(hub: Hub) -> None:
    fetch_range(address(hub), 0, 8)
    hub.edit = lambda name, data: data[::-1]
    hub.faults = [Fault("/storage/", status=403)]
    with pytest.raises(SourceError, match=rf"{NAME}: changed while it was being read \(ETag {sha256(DATA.tobytes())}"):
        fetch_range(address(hub), 8, 16)


@pytest.mark.parametrize(
    ("listed", "message"),
    [({"size": 77}, "77 bytes, now 1048576"), ({"etag": "0" * 64}, "ETag 0000"), ({"commit": "f" * 40}, "commit ffff")],
)
def test_a_file_that_is_not_the_listed_one_is_named(listed: dict[str, object], message: str, hub: Hub) -> None:
    with pytest.raises(SourceError, match=rf"{NAME}: changed while it was being read \({message}"):
        fetch_range(address(hub, **listed), 0, 8)


def test_a_server_without_ranges_serves_the_beginning_and_no_more(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.no_ranges = True
    assert np.array_equal(fetch_range(address(hub), 900, 1000), DATA[900:1000])
    monkeypatch.setattr(http_ranges, "_SKIPPABLE_BYTES", 500)
    with pytest.raises(SourceError, match=r"no byte ranges.*--keep-source"):
        fetch_range(address(hub), 900, 1000)


def test_modelscope_is_given_its_own_token_only(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    url = f"{hub.url}/api/v1/models/org/name/repo?Revision=master&FilePath={NAME}"
    file = HttpFile(MODELSCOPE, url, f"ms://org/name/{NAME}", DATA.size)
    assert np.array_equal(fetch_range(file, 5, 50), DATA[5:50])
    at_hub, at_storage = hub.asked("/api/v1/")[0], hub.asked("/storage/")[0]
    assert (at_hub["Authorization"], at_hub["Cookie"]) == ("Bearer ms-secret", "m_session_id=ms-secret")
    assert "ms-secret" not in str(at_storage)


# ---------------------------------------------------------------- blocks


def test_many_small_runs_are_few_requests_and_no_byte_comes_twice(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_file, "BLOCK_BYTES", 64 << 10)
    start, stop = 1000, 901_000
    file = RemoteFile(address(hub)).within(start, stop)
    heads = [*range(start, stop, 4000), *range(start + 2000, stop, 4000)]
    pieces = {at: file.read(at, 2000) for at in heads}
    assert np.array_equal(np.concatenate([pieces[at] for at in sorted(pieces)]), DATA[start:stop])
    assert len(hub.asked("/storage/")) == -(-900_000 // (64 << 10))
    assert hub.served[NAME] == 900_000


def test_workers_that_want_the_same_block_share_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_file, "BLOCK_BYTES", 64 << 10)
    file, found = RemoteFile(address(hub)).within(0, 500_000), {}
    starts = range(0, 500_000, 5_000)

    def work(mine: range) -> None:
        for at in mine:
            found[at] = file.read(at, 5_000)

    threads = [threading.Thread(target=work, args=(starts[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(np.concatenate([found[at] for at in starts]), DATA[:500_000])
    assert hub.served[NAME] == 500_000


def test_memory_is_bounded_and_what_was_dropped_is_fetched_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_file, "BLOCK_BYTES", 32 << 10)
    monkeypatch.setattr(remote_file, "BLOCKS_AHEAD", 1)
    monkeypatch.setattr(remote_file, "CACHE_BYTES", 128 << 10)
    file = RemoteFile(address(hub)).within(0, DATA.size)
    for at in range(0, DATA.size, 16_384):
        assert np.array_equal(file.read(at, 5_000), DATA[at : at + 5_000])
        held = sum(block.nbytes for block in remote_file._blocks.values() if block.done.is_set())
        assert held <= 160 << 10
    assert np.array_equal(file.read(0, 100), DATA[:100])
    assert hub.served[NAME] > DATA.size


def test_a_block_that_failed_is_asked_for_again(hub: Hub) -> None:
    file = RemoteFile(address(hub)).within(0, 5000)
    hub.faults = [Fault("/resolve/", status=404)]
    with pytest.raises(SourceError, match="not found"):
        file.read(0, 100)
    assert np.array_equal(file.read(0, 100), DATA[:100])


def test_reading_beyond_the_end_is_an_error_with_a_name(hub: Hub) -> None:
    with pytest.raises(SourceError, match=re.escape(f"hf://org/name/{NAME}: ends before byte {DATA.size + 1}")):
        RemoteFile(address(hub)).read(DATA.size, 1)
    assert hub.requests == []
