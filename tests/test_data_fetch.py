"""Downloads from a server on this machine that fails in every way a mirror can."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from tinynn import data
from tinynn.data import fetch as fetching
from tinynn.data import sets
from tinynn.data.published import Remote
from tinynn.errors import DataNotFoundError, OutputError

CONTENT = np.random.default_rng(0).bytes(600_000)


@pytest.fixture
def server(monkeypatch):
    """(address, asked): what each folder of the address answers, and what was asked for."""
    asked = []
    answers = {
        "good": [(200, CONTENT)],
        "gone": [(404, b"")],
        "busy": [(503, b""), (200, CONTENT)],
        "down": [(503, b"")],
        "short": [(200, CONTENT[:1000])],
        "long": [(200, CONTENT + bytes(10_000_000))],
        "other": [(200, bytes(len(CONTENT)))],
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            folder = self.path.split("/")[1]
            asked.append(folder)
            replies = answers[folder]
            code, body = replies[min(asked.count(folder), len(replies)) - 1]
            self.send_response(code)
            self.end_headers()
            with contextlib.suppress(OSError):  # the other side may have seen enough
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(fetching.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}", asked
    running.shutdown()
    running.server_close()
    thread.join()


def remote(server, *folders):
    mirrors = tuple(f"{server[0]}/{folder}/" for folder in folders)
    return Remote("", "file.gz", mirrors, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.mark.parametrize(
    ("mirrors", "asked"),
    [
        (["good"], ["good"]),
        (["gone", "good"], ["gone", "good"]),
        (["busy"], ["busy", "busy"]),
        (["down", "good"], ["down", "down", "down", "good"]),
        (["short", "good"], ["short", "short", "short", "good"]),
        (["long", "other", "good"], ["long", "other", "good"]),
    ],
)
def test_the_right_file_arrives_whole(tmp_path, server, mirrors, asked):
    path = fetching.fetch(remote(server, *mirrors), tmp_path / "new")
    assert path.read_bytes() == CONTENT and server[1] == asked
    assert os.listdir(tmp_path / "new") == ["file.gz"]


def test_nothing_stays_of_what_is_wrong(tmp_path, server):
    (tmp_path / "file.gz").write_bytes(b"old")
    with pytest.raises(DataNotFoundError, match=r"came more.*SHA-256.*came 1000.*404") as error:
        fetching.fetch(remote(server, "long", "other", "short", "gone"), tmp_path)
    assert "cannot be downloaded" in str(error.value)
    assert os.listdir(tmp_path) == ["file.gz"] and (tmp_path / "file.gz").read_bytes() == b"old"


def test_no_such_host_is_asked_once(tmp_path, monkeypatch):
    def resolve(*args, **kwargs):
        asked.append(args)
        raise fetching.socket.gaierror("no network")

    asked: list[object] = []
    monkeypatch.setattr(fetching.socket, "getaddrinfo", resolve)
    wanted = Remote("", "f", ("http://nowhere.invalid/",), 1, "")
    with pytest.raises(DataNotFoundError, match="no network"):
        fetching.fetch(wanted, tmp_path)
    assert len(asked) == 1


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs a closed folder")
def test_a_folder_that_cannot_be_written(tmp_path, server):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot write"):
        fetching.fetch(remote(server, "good"), tmp_path)


def test_a_file_in_the_way_of_the_folder(tmp_path, server):
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot write"):
        fetching.fetch(remote(server, "good"), tmp_path / "cache")


def test_what_is_nowhere_is_downloaded_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYNN_CACHE", str(tmp_path))
    monkeypatch.delenv("TINYNN_DATA", raising=False)
    fetched = []

    def fetch(remote, folder):
        fetched.append(folder / remote.name)
        folder.mkdir(parents=True, exist_ok=True)
        n, images = 2, b"images" in remote.name.encode()
        head = b"\0\0\x08" + (b"\x03" if images else b"\x01") + n.to_bytes(4, "big")
        size = (28).to_bytes(4, "big") * 2 if images else b""
        (folder / remote.name).write_bytes(head + size + bytes(n * (784 if images else 1)))

    monkeypatch.setattr(sets, "fetch", fetch)
    with pytest.warns(UserWarning, match="other data"):
        train, _ = data.mnist(tmp_path)
    assert len(train) == 2 and len(fetched) == 4
    assert fetched[0] == tmp_path / "data" / "mnist" / "train-images-idx3-ubyte.gz"
