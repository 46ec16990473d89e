"""What lies around every request: which hosts and web pages may ask, and the count of answers."""

from collections.abc import Sequence
from time import perf_counter
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hubert_lightning.serving.metrics import Metrics

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names by which this machine reaches its own services."""


def host_of(address: str) -> str:
    """Return the host of a `Host` header or an origin, without its port: "[::1]:8000" and "http://[::1]" give "::1"."""
    try:
        return urlsplit(address if "://" in address else f"//{address}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """Refuses requests that a web page of another site sent through its reader's browser.

    A service without passwords on loopback can be reached by every page that is open in a browser of that machine: by
    a request across sites, which has another `Origin` than its `Host`, or by a name that leads to this machine, which
    is no name of it.

    Args:
        app: Application.
        hosts: Names by which the service may be asked; any if empty.
        origins: Origins of other sites whose pages may ask, such as "https://example.org".
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._app = app
        self._hosts, self._origins = {host.lower() for host in hosts}, set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sentence = self._refusal(Headers(scope=scope)) if scope["type"] in ("http", "websocket") else None
        if sentence is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse({"detail": sentence}, 403)(scope, receive, send)

    def _refusal(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts and host_of(host) not in self._hosts:
            return (
                f"the service is not known as {host_of(host)[:100]!r}; ask it as {min(self._hosts)}, or start it with "
                "--allowed-hosts"
            )
        if origin is None or origin in self._origins or origin.partition("://")[2] == host:
            return None
        return "pages of other sites may not use this service; start it with --allowed-origins to let them"


class CountedAnswers:
    """Counts requests by endpoint and status, and measures their time.

    Args:
        app: Application.
        metrics: Metrics of the service.
        endpoints: Paths that are counted by name; all others are counted as "other".
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: Sequence[str]) -> None:
        self._app, self._metrics, self._endpoints = app, metrics, frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
        began, status = perf_counter(), 500

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        finally:
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.request_seconds.labels(endpoint).observe(perf_counter() - began)
