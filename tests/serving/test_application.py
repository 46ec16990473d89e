"""Words and units over HTTP are those of the verbs."""

import json
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from helpers import run_verb
from openapi_spec_validator import validate
from served import ServedFiles, served_with
from torch.testing import assert_close

from hubert_lightning.data.examine import examine
from hubert_lightning.serving.models import Models, load_models


@pytest.mark.parametrize("format", ["json", "text", "srt", "vtt"])
def test_a_transcript_is_that_of_the_verb(
    client: TestClient, served: ServedFiles, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in served.recordings[1:3]:
        assert run_verb("transcribe", served.model, path, "--format", format) == 0
        expected = capsys.readouterr().out
        with path.open("rb") as file:
            answer = client.post("/transcribe", params={"format": format}, files={"file": file})
        assert answer.status_code == 200
        if format == "json":
            transcript = json.loads(expected)
            assert len(transcript["words"]) > 1
            assert {"file": str(path)} | answer.json() == transcript | {"remarks": []}
        else:
            assert answer.text == expected
            assert len(expected) > 20


@pytest.mark.parametrize("deduplicate", [False, True])
def test_units_are_those_of_the_verb(
    client: TestClient, served: ServedFiles, deduplicate: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    option = ["--deduplicate"] if deduplicate else []
    for path in served.recordings[:2]:
        assert run_verb("units", served.model, path, "--kmeans", served.kmeans, *option) == 0
        expected = json.loads(capsys.readouterr().out)
        answer = client.post("/units", params={"deduplicate": deduplicate}, content=path.read_bytes()).json()
        assert len(set(answer["units"])) > 5
        assert answer == {name: expected[name] for name in expected if name != "file"} | {
            "duration": answer["duration"],
            "remarks": [],
        }


def test_a_recording_is_a_form_or_the_body_whatever_its_type_is_said_to_be(
    client: TestClient, served: ServedFiles
) -> None:
    content = served.recordings[0].read_bytes()
    as_form = client.post("/transcribe", files={"anything": ("../../a b.wav", content, "text/plain")}).json()
    assert as_form["text"]
    for content_type in ("audio/wav", "application/octet-stream", "application/x-www-form-urlencoded", ""):
        answer = client.post("/transcribe", content=content, headers={"Content-Type": content_type})
        assert answer.json() == as_form


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "application/json"),
        ("text/vtt", "text/vtt; charset=utf-8"),
        ("text/*", "text/plain; charset=utf-8"),
        ("application/x-subrip;q=0.3, text/plain;q=0.5", "text/plain; charset=utf-8"),
        ("image/png, application/x-subrip", "application/x-subrip"),
    ],
)
def test_the_format_is_the_most_wanted_that_the_client_accepts(
    client: TestClient, served: ServedFiles, accept: str, media_type: str
) -> None:
    content = served.recordings[0].read_bytes()
    answer = client.post("/transcribe", content=content, headers={"Accept": accept})
    assert answer.headers["content-type"] == media_type
    assert answer.status_code == 200


def test_what_the_service_cannot_write_is_not_acceptable(client: TestClient, served: ServedFiles) -> None:
    content = served.recordings[0].read_bytes()
    answer = client.post("/transcribe", content=content, headers={"Accept": "image/png"})
    assert answer.status_code == 406
    assert answer.json()["detail"].startswith("the service has no 'image/png'; accept one of application/json")
    answer = client.post("/transcribe", params={"format": "docx"}, content=content)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("format is 'docx': input should be 'json'")


def test_the_service_states_what_it_has_and_how_it_is(client: TestClient) -> None:
    about = client.get("/").json()
    assert about["model"] == "best.ckpt"
    assert about["endpoints"] == ["transcribe", "units", "stream"]
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}


def test_metrics_count_what_was_asked(models: Models, served: ServedFiles) -> None:
    with served_with(models) as client:
        client.post("/transcribe", content=served.recordings[1].read_bytes())
        client.post("/units", content=b"no audio")
        client.get("/secret-path")
        lines = client.get("/metrics").text.splitlines()
    for line in (
        'hubert_requests_total{endpoint="/transcribe",status="200"} 1.0',
        'hubert_requests_total{endpoint="/units",status="415"} 1.0',
        'hubert_requests_total{endpoint="other",status="404"} 1.0',
        'hubert_audio_seconds_total{endpoint="transcribe"} 2.0',
        "hubert_batch_requests_count 1.0",
        "hubert_open_requests 0.0",
        "hubert_waiting_audio_seconds 0.0",
    ):
        assert line in lines
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)


def test_the_description_is_valid_and_its_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    description = client.get("/openapi.json").json()
    validate(description)
    assert set(description["paths"]) == {"/", "/transcribe", "/units", "/health", "/ready", "/metrics"}
    page = client.get("/docs").text
    assert "//" not in page.replace("// ", "").replace("window.location.protocol + '//'", "")
    for address in ("/static-offline-docs/swagger-ui-bundle.js", "/static-offline-docs/swagger-ui.css"):
        assert address in page
        assert client.get(address).status_code == 200


def test_what_the_models_cannot_give_is_said(served: ServedFiles) -> None:
    with served_with(load_models(served.model)) as client:
        answer = client.post("/units", content=b"")
        assert (answer.status_code, answer.json()["detail"]) == (
            404,
            "this service has no units: start it with --kmeans",
        )
        assert "/units" not in client.get("/openapi.json").json()["paths"]
        assert client.get("/").json()["endpoints"] == ["transcribe", "stream"]


def test_requests_under_other_names_and_from_pages_of_other_sites_are_refused(
    models: Models, served: ServedFiles
) -> None:
    content = served.recordings[0].read_bytes()
    with served_with(models, hosts=("testserver", "::1"), origins=("https://friend.example",)) as client:
        for headers, status in (
            ({}, 200),
            ({"Host": "[::1]:8000"}, 200),
            ({"Host": "evil.example"}, 403),
            ({"Host": ""}, 403),
            ({"Origin": "http://testserver"}, 200),
            ({"Origin": "https://friend.example"}, 200),
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://[::1"}, 403),
        ):
            answer = client.post("/transcribe", content=content, headers=headers)
            assert answer.status_code == status, headers
            if status == 403:
                assert "--allowed-" in answer.json()["detail"]
        answer = client.get("/health", headers={"Origin": "https://friend.example"})
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"


def test_a_path_or_a_method_that_there_is_not(client: TestClient) -> None:
    assert client.get("/nothing").json()["detail"] == "there is nothing at /nothing; /docs lists what there is"
    answer = client.get("/transcribe")
    assert answer.status_code == 405
    assert answer.json()["detail"] == "GET is not possible at /transcribe; /docs lists what is"
    for answer in (client.get("/stream"), client.post("/stream", content=b"a")):
        assert answer.status_code == 426
        assert answer.headers["upgrade"] == "websocket"
        assert answer.json()["detail"].startswith("/stream is a websocket, for live audio")


@pytest.mark.parametrize("endpoint", ["/transcribe", "/units"])
def test_a_parameter_that_there_is_not_is_refused_by_name(client: TestClient, endpoint: str) -> None:
    answer = client.post(endpoint, params={"fromat": "srt"}, content=b"")
    assert answer.status_code == 422
    assert answer.json()["detail"] == f"'fromat' is no parameter of {endpoint}; /docs lists what there is"


def test_a_beam_search_gives_the_text_of_the_verb(
    served: ServedFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "decoder.json"
    settings.write_text(json.dumps({"beam_size": 5}))
    assert run_verb("transcribe", served.model, served.recordings[1], "--decoder", settings) == 0
    expected = capsys.readouterr().out
    models = load_models(served.model, decoder=settings)
    try:
        with served_with(models) as client:
            answer = client.post("/transcribe", params={"format": "text"}, content=served.recordings[1].read_bytes())
    finally:
        models.close()
    assert answer.text == expected
    assert len(expected) > 20


def test_in_bfloat16_letters_and_units_are_those_of_float32_except_near_ties(
    models: Models, served: ServedFiles
) -> None:
    """Models of random weights, whose frames are near a tie more often than those of trained ones."""
    cuts, _, _ = examine(served.recordings)
    faster = load_models(served.model, served.kmeans, precision="bfloat16").encoders
    both = zip(models.encoders["transcribe"](cuts), faster["transcribe"](cuts), strict=True)
    for exact, fast in both:
        first, second = exact.exp().topk(2).values.T
        clear = first - second > 0.2
        assert clear.float().mean() > 0.9
        assert torch.equal(exact.argmax(-1)[clear], fast.argmax(-1)[clear])
        assert_close(fast.exp().mean(0), exact.exp().mean(0), rtol=0, atol=0.005)  # bfloat16 has 8 bits
    for exact, fast in zip(models.encoders["units"](cuts), faster["units"](cuts), strict=True):
        assert (exact == fast).float().mean() > 0.95
