"""Connections of clients that are slow, leave, or say nothing: others are served, and the log has no traceback."""

import json
import re
import socket
import struct
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from helpers import wait_until
from served import ServedFiles, finished, service
from websockets.asyncio.client import connect

pytestmark = pytest.mark.slow
POST = b"POST /units HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
RESET = struct.pack("ii", 1, 0)
"""Value of SO_LINGER with which a connection is reset when it is closed."""


class Running(NamedTuple):
    """A service in a process of its own, its address, and its log."""

    process: BaseProcess
    address: str
    output: Path


@pytest.fixture(scope="module")
def running(served: ServedFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    output = tmp_path_factory.mktemp("service") / "output.txt"
    with service(served, output, "--patience", "0.5") as (process, address):
        yield Running(process, address, output)


def connected(address: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=120)


def received(client: socket.socket) -> bytes:
    """All bytes until the service ends the connection."""
    return b"".join(iter(lambda: client.recv(65_536), b""))


def metric(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics").text
    return sum(map(float, re.findall(rf"^{name} (.*)$", text, re.M)))


def test_a_client_that_leaves_during_its_upload_is_no_failure(running: Running) -> None:
    gone = r"hubert_requests_total\{endpoint=\"/units\",status=\"499\"\}"
    for number, is_half_closed in enumerate([True, False], start=1):
        with connected(running.address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            client.sendall(POST % 1000 + b"RIFF")
            if is_half_closed:
                client.shutdown(socket.SHUT_WR)
        wait_until(lambda number=number: metric(running.address, gone) == number, running.process)  # type: ignore[misc]
    assert "Traceback" not in running.output.read_text()


def test_an_early_answer_is_not_lost_although_the_request_goes_on(served: ServedFiles, tmp_path: Path) -> None:
    size = 2**24
    head = (POST % size).replace(b"/units", b"/units?format=srt").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    # with the default patience, since a loaded machine may need longer than that of `running` for this upload
    with service(served, tmp_path / "output.txt") as (_, address), connected(address) as client:
        client.sendall(head + bytes(size))
        head, _, body = received(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 422 ")
    assert json.loads(body)["detail"].startswith("'format' is no parameter of /units")


@pytest.mark.parametrize(
    ("sent", "answer"),
    [(b"", b""), (b"GET /health HT", b"the head of the request did not end in 0.5 s; send it again")],
)
def test_a_connection_without_a_request_is_ended(running: Running, sent: bytes, answer: bytes) -> None:
    with connected(running.address) as client:
        client.sendall(sent)
        assert received(client).endswith(answer)


def test_an_upload_that_stops_is_refused(running: Running) -> None:
    with connected(running.address) as client:
        client.sendall(POST % 1000 + b"RIFF")
        head, _, body = received(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["detail"] == "the upload stopped for 0.5 s; send it again"


def test_a_stream_whose_client_has_gone_is_written_to_no_more(running: Running) -> None:
    async def leave() -> None:
        query = "/stream?step=0.1&lookahead=0.1&history=0.1"
        async with connect(running.address.replace("http", "ws") + query) as stream:
            await stream.recv()
            for _ in range(4):
                await stream.send(bytes(2**20))
            stream.transport.abort()

    finished(leave())
    wait_until(lambda: metric(running.address, "hubert_streams") == 0, running.process)
    assert "socket.send() raised" not in running.output.read_text()
    assert "Traceback" not in running.output.read_text()
