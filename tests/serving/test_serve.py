"""The verb: what keeps a service from starting is said in a sentence, and a signal ends it after its last answer."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import fork_server
import httpx
import pytest
from helpers import refused
from served import ServedFiles, finished, service
from websockets.asyncio.client import connect

from hubert_lightning.serving.serve import PACKAGES


@pytest.mark.slow
def test_a_signal_ends_a_service_after_the_requests_that_it_has_accepted(served: ServedFiles, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    content = served.recordings[3].read_bytes()

    async def ask(process: BaseProcess, address: str) -> list[int]:
        async with httpx.AsyncClient(timeout=120) as client:
            posts = [asyncio.create_task(client.post(f"{address}/units", content=content)) for _ in range(12)]
            accepted = 0.0
            while accepted < len(posts):
                metrics = (await client.get(f"{address}/metrics")).text
                counts = re.findall(r"^hubert_(?:open_requests|requests_total.*/units.*) (.*)$", metrics, re.M)
                accepted = sum(map(float, counts))
            process.terminate()
            return [answer.status_code for answer in await asyncio.gather(*posts)]

    with service(served, output, "--access-log", "true") as (process, address):
        assert address.startswith("http://127.0.0.1:")
        assert finished(ask(process, address)) == [200] * 12
        assert fork_server.ended(process, 60) == 0
    assert output.read_text().endswith("hubert: stopped; all accepted requests were answered\n")
    assert "Traceback" not in output.read_text()
    assert output.read_text().count('"POST /units HTTP/1.1" 200') == 12
    assert "neither passwords nor encryption" not in output.read_text()


@pytest.mark.slow
def test_a_service_of_other_machines_warns_and_streams(served: ServedFiles, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"

    async def listen(address: str) -> list[str]:
        async with connect(address.replace("http", "ws") + "/stream") as stream:
            await stream.send(bytes(2 * 16_000 * 3))
            await stream.send("end")
            return [json.loads(message)["type"] async for message in stream]

    with service(served, output, "--host", "0.0.0.0") as (process, address):
        types = finished(listen(address.replace("0.0.0.0", "127.0.0.1")))
        os.kill(process.pid, signal.SIGINT)
        assert fork_server.ended(process, 60) == 0
    assert types == ["ready", "units", "units", "units", "end"]
    assert f"{address} can be reached from other machines" in output.read_text()


def test_a_port_in_use_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused(capsys, "serve", "no-such-model", "--port", str(port)) == (
            f"hubert: port {port} of 127.0.0.1 is in use; choose another with --port, or end the program that uses it\n"
        )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "256.1.2.3"], "host '256.1.2.3' is no address of this machine"),
        (["--host", "192.0.2.1"], "host '192.0.2.1' is no address of this machine"),
        (["--port", "70000"], "port is 70000; it is a number from 0 to 65535"),
        (["--max-duration", "100", "--max-waiting", "50"], "max_waiting is 50 s and max_duration 100 s, so"),
        ([], "no-such-model does not exist; give a .ckpt of"),
    ],
)
def test_what_keeps_a_service_from_starting_is_a_sentence(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "serve", "no-such-model", *(options or ["--port", "0"]))
    assert said.startswith(f"hubert: {sentence}")
    assert len(said.splitlines()) == 1


def test_a_model_without_head_or_k_means_has_nothing_to_serve(
    served: ServedFiles, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["serve", str(run / "last.ckpt"), "--port", "0"]
    assert "has no CTC head, so it cannot transcribe, and there is no K-means" in refused(capsys, *typed)
    typed += ["--kmeans", str(served.kmeans)]
    assert "give the model that it was fitted on" in refused(capsys, *typed)
    assert "leave --decoder out" in refused(capsys, *typed, "--decoder", str(tmp_path / "decoder.json"))
    typed = ["serve", str(served.model), "--port", "0", "--layer", "1"]
    assert "layer is an option for units, which need a K-means" in refused(capsys, *typed)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_of_the_extra_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert refused(capsys, "serve", "model.ckpt") == (
        f"hubert: {package} is not installed; install what the service needs: pip install 'hubert-lightning[serve]'\n"
    )
