"""The verb `hubert serve`: words and units over HTTP."""

import errno
import importlib
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hubert_lightning.console import say
from hubert_lightning.errors import UserError, within
from hubert_lightning.progress_bar import hidden_bars

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)

PACKAGES = ("fastapi", "fastapi_offline", "python_multipart", "prometheus_client", "uvicorn", "websockets")
"""Packages of the extra `serve`."""
MESSAGES_IN_MEMORY = 4
"""Messages of a stream that wait for its turn; then its client has to wait."""


def serve(
    model: Path,
    kmeans: Path | None = None,
    layer: int | None = None,
    units_model: Path | None = None,
    decoder: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_duration: float | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    window: float | None = None,
    max_upload: float = 100.0,
    max_duration: float = 1800.0,
    max_waiting: float = 3600.0,
    max_requests: int = 128,
    max_streams: int = 8,
    patience: float = 30.0,
    allowed_hosts: list[str] | None = None,
    allowed_origins: list[str] | None = None,
    access_log: bool = False,
) -> None:
    """Serve words and units over HTTP and a websocket, on this machine alone unless another --host is given.

    POST /transcribe and /units take a recording; /stream is a websocket for live audio; /docs describes them, and
    /health, /ready and /metrics are for machines. SIGTERM and Ctrl-C end the service after the requests that it has
    accepted.

    Args:
        model: Fine-tuned checkpoint or transformers directory for words; a model in any format, or mfcc, for units.
        kmeans: File of the K-means of units; kmeans.safetensors in the model's directory if not given. Without one, the
            service has no units.
        layer: Transformer layer of units, counted from 1; needed if the K-means does not state the layer.
        units_model: Model of units, if it is not MODEL.
        decoder: Settings of a beam search, a file of `hubert tune-decoder`; greedy decoding if not given.
        host: Address to listen at. With another one than loopback, other machines reach the service, which has neither
            passwords nor encryption.
        port: Port to listen at; 0 for any that is free.
        batch_duration: Seconds of waiting recordings that are encoded together; chosen for the device if not given: one
            recording on a CPU, where larger batches gain little.
        precision: Numeric precision of the encoder.
        window: Seconds of a recording that are encoded at once for units, 300 if not given.
        max_upload: Megabytes of an upload at most.
        max_duration: Seconds of a recording at most.
        max_waiting: Seconds of all recordings that wait or are computed; more are refused for a while. Each second
            takes 64 kB of memory.
        max_requests: Number of requests in progress; more are refused for a while.
        max_streams: Number of streams that are open at the same time.
        patience: Seconds without a byte after which an upload or a stream is given up; for the head of a request, too.
        allowed_hosts: Names by which clients may address the service; any if not given, and on loopback those of this
            machine.
        allowed_origins: Origins of web pages that may use the service, such as https://example.org; pages of the
            service itself alone if not given.
        access_log: Whether a line is logged for each request.

    Raises:
        UserError: A package or a file is missing, the port is in use, or a limit is out of range.
    """
    _check_packages()
    within(0, 65535, port=port)
    within(0, 86_400, batch_duration=batch_duration)
    from hubert_lightning.serving.limits import Limits

    limits = Limits(max_upload, max_duration, max_waiting, max_requests, max_streams, patience)
    with _bound(host, port) as listener, hidden_bars():
        from hubert_lightning.data.workers import share_threads
        from hubert_lightning.serving.models import load_models

        models = load_models(model, kmeans, layer, units_model, decoder, batch_duration, precision, window)
        share_threads()
        address = listener.getsockname()[0]
        names = _names(host, address) if allowed_hosts is None else allowed_hosts
        try:
            from hubert_lightning.serving.application import application
            from hubert_lightning.serving.service import Service

            app = application(Service(models, limits, Path(model).name), names, allowed_origins or ())
            url = f"http://{f'[{address}]' if ':' in address else address}:{listener.getsockname()[1]}"
            listener.listen()  # connections are answered from here on
            endpoints = ", ".join(f"/{name}" for name in models.encoders)
            say(f"hubert: serving {model} at {url} ({endpoints}, /stream; {url}/docs); Ctrl-C or SIGTERM ends it")
            if not ip_address(address).is_loopback:
                log.warning(
                    "%s can be reached from other machines, and the service has neither passwords nor encryption; put "
                    "a proxy that has both before it, or leave --host out",
                    url,
                )
            _run(app, listener, patience, access_log)
        finally:
            models.close()
    say("hubert: stopped; all accepted requests were answered")


def _check_packages() -> None:
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{error.name} is not installed; install what the service needs: pip install 'hubert-lightning[serve]'"
            ) from error


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Take the address before the models are loaded, which lasts; nobody can connect yet."""
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise UserError(f"host {host!r} is no address of this machine ({error}); leave --host out") from error
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a restart, old connections linger
        try:
            listener.bind(address)
        except PermissionError as error:
            raise UserError(f"port {port} needs rights that this user lacks; choose one from 1024 on") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} of {host} is in use; choose another with --port, or end the program that uses it"
                ) from error
            raise UserError(f"host {host!r} is no address of this machine ({error.strerror})") from error
        yield listener


def _names(host: str, address: str) -> Sequence[str]:
    """Names by which clients may ask: on loopback, those of this machine."""
    from hubert_lightning.serving.guard import LOOPBACK

    return (*LOOPBACK, host, address) if ip_address(address).is_loopback else ()


def _run(app: "FastAPI", listener: socket.socket, patience: float, access_log: bool) -> None:
    """Serve until a signal comes, then answer what was accepted."""
    import uvicorn

    from hubert_lightning.serving.connections import PatientConnection
    from hubert_lightning.serving.streams import MAX_MESSAGE

    config = uvicorn.Config(
        app,
        http=partial(PatientConnection, patience),  # type: ignore[arg-type]  # uvicorn calls it
        log_config=None,
        access_log=access_log,
        lifespan="on",
        server_header=False,
        ws_max_size=MAX_MESSAGE,
        ws_max_queue=MESSAGES_IN_MEMORY,
    )
    for name in ("uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers = log.parent.handlers if log.parent else []
        logger.setLevel(logging.INFO if name == "uvicorn.access" else logging.WARNING)
    # uvicorn raises the signal again after it has stopped, which would end this process with an error
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(config).run([listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
