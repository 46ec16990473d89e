"""The endpoints of a service."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from hubert_lightning import __version__
from hubert_lightning.errors import UserError
from hubert_lightning.serving.answers import (
    MEDIA_TYPES,
    ErrorAnswer,
    ServiceAnswer,
    StatusAnswer,
    TranscribeQuery,
    TranscriptAnswer,
    UnitsAnswer,
    UnitsQuery,
    chosen_format,
    transcript_content,
    units_content,
)
from hubert_lightning.serving.connections import WholeRequests
from hubert_lightning.serving.guard import CountedAnswers, Guard
from hubert_lightning.serving.models import Recogniser
from hubert_lightning.serving.service import CLIENT_GONE, Service
from hubert_lightning.serving.streams import serve_stream

DESCRIPTION = """Words and units of recordings. Send a recording in any format as the body of a request, or as a file of
`multipart/form-data`. The websocket `/stream` gives words and units of live audio."""
AUDIO_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "A recording in any format.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The form is no form."},
    408: {"model": ErrorAnswer, "description": "The upload stopped."},
    413: {"model": ErrorAnswer, "description": "The upload is too large, or the recording too long."},
    415: {"model": ErrorAnswer, "description": "The upload is no audio."},
    422: {"model": ErrorAnswer, "description": "The recording or a parameter cannot be used."},
    503: {"model": ErrorAnswer, "description": "The service is busy; `Retry-After` says for how many seconds."},
}
ENDPOINTS = ("/", "/transcribe", "/units", "/health", "/ready", "/metrics", "/docs", "/openapi.json")


def application(service: Service, hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> FastAPI:
    """Make the ASGI application of a service.

    Args:
        service: Models, limits and queue.
        hosts: Names by which the service may be asked; any if empty.
        origins: Origins of other sites whose pages may ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    around = [
        Middleware(WholeRequests, service.limits.patience),
        Middleware(CountedAnswers, service.metrics, ENDPOINTS),
        Middleware(Guard, hosts, origins),
    ]
    if origins:
        around.append(Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"]))
    app = FastAPIOffline(
        redoc_url=None,
        title="hubert_lightning",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        middleware=around,
        exception_handlers={
            StarletteHTTPException: _refused,
            RequestValidationError: _invalid,
            UserError: _unusable,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )
    _add_state(app, service)
    recogniser = service.models.recogniser
    if recogniser is None:
        _add_missing(app, "/transcribe", "this service has no words: start it with a fine-tuned model")
    else:
        _add_transcribe(app, service, recogniser)
    if service.models.units is None:
        _add_missing(app, "/units", "this service has no units: start it with --kmeans")
    else:
        _add_units(app, service)

    @app.websocket("/stream")
    async def stream(socket: WebSocket) -> None:
        await serve_stream(socket, service)

    @app.api_route("/stream", methods=["GET", "POST"], include_in_schema=False)
    async def no_stream() -> None:
        raise HTTPException(
            426, "/stream is a websocket, for live audio; /docs lists what takes recordings", {"Upgrade": "websocket"}
        )

    return app


def _add_transcribe(app: FastAPI, service: Service, recogniser: Recogniser) -> None:
    content: dict[str, Any] = {media_type: {} for media_type in MEDIA_TYPES.values()}

    @app.post(
        "/transcribe",
        tags=["recordings"],
        response_class=Response,
        responses={
            **REFUSALS,
            200: {"model": TranscriptAnswer, "description": "The words.", "content": content},
            406: {"model": ErrorAnswer, "description": "`Accept` names no format of the service."},
        },
        openapi_extra=AUDIO_BODY,
    )
    async def transcribe(request: Request, query: Annotated[TranscribeQuery, Query()]) -> Response:
        """Transcribe a recording: JSON with the time and confidence of every word, text, or subtitles."""
        chosen = chosen_format(query.format, request.headers.get("accept"))
        content = await service.answer(
            request,
            "transcribe",
            lambda upload: partial(transcript_content, recogniser, upload.cut, upload.remarks, chosen),
        )
        return Response(content, media_type=MEDIA_TYPES[chosen])


def _add_units(app: FastAPI, service: Service) -> None:
    @app.post(
        "/units",
        tags=["recordings"],
        response_class=Response,
        responses={
            **REFUSALS,
            200: {"model": UnitsAnswer, "description": "The units.", "content": {"application/json": {}}},
        },
        openapi_extra=AUDIO_BODY,
    )
    async def units(request: Request, query: Annotated[UnitsQuery, Query()]) -> Response:
        """Give one unit per frame of a recording: 20 ms, or 40 ms of a model of 25 Hz."""
        content = await service.answer(
            request, "units", lambda upload: partial(units_content, upload.cut, upload.remarks, query.deduplicate)
        )
        return Response(content, media_type="application/json")


def _add_missing(app: FastAPI, path: str, sentence: str) -> None:
    @app.post(path, include_in_schema=False)
    async def missing() -> None:
        raise HTTPException(404, sentence)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/", tags=["service"])
    async def about() -> ServiceAnswer:
        """Say what the service is, and what it accepts."""
        return ServiceAnswer(
            model=service.name,
            version=__version__,
            device=str(service.models.device),
            endpoints=[*service.models.encoders, "stream"],
            max_upload=service.limits.max_upload,
            max_duration=service.limits.max_duration,
        )

    @app.get("/health", tags=["service"])
    async def health() -> StatusAnswer:
        """Say that the process answers."""
        return StatusAnswer(status="ok")

    @app.get("/ready", tags=["service"], responses={503: {"model": ErrorAnswer, "description": "Not ready."}})
    async def ready() -> StatusAnswer:
        """Say whether requests are computed."""
        if not service.queue.ready:
            raise HTTPException(503, "the service computes nothing; start it again")
        return StatusAnswer(status="ready")

    @app.get("/metrics", tags=["service"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Give counts and durations in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    sentence = error.detail
    if error.status_code == 404 and sentence == "Not Found":
        sentence = f"there is nothing at {request.url.path[:100]}; /docs lists what there is"
    elif error.status_code == 405:
        sentence = f"{request.method[:20]} is not possible at {request.url.path[:100]}; /docs lists what is"
    return JSONResponse({"detail": sentence}, error.status_code, headers=error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": "; ".join(_sentence(row, request.url.path) for row in error.errors())}, 422)


def _sentence(row: Mapping[str, Any], path: str) -> str:
    """Say what is wrong with a parameter.

    Args:
        row: Error of pydantic.
        path: Endpoint.
    """
    name = str(row["loc"][-1])
    if row["type"] == "extra_forbidden":
        return f"{name[:100]!r} is no parameter of {path}; /docs lists what there is"
    return f"{name} is {str(row.get('input'))[:100]!r}: {row['msg'][:1].lower()}{row['msg'][1:]}"


async def _unusable(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 422)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "the service failed on this request; its log says why"}, 500)
