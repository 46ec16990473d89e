"""Connections: how long one may send nothing, and how it ends after an early answer."""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

IDLE = 2.0
"""Seconds without a byte after which no more of an answered request is read."""


class PatientConnection(H11Protocol):
    """A connection of HTTP/1.1 that is closed if it sends no complete head of a request in time.

    uvicorn waits for the end of a head without limit, so that such connections could take all file descriptors.

    Args:
        patience: Seconds for a head, at least; at most twice as many.
        *args: Arguments of uvicorn's protocol.
        **kwargs: Its keyword arguments.
    """

    def __init__(self, patience: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._patience = patience
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._look(None, waited=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look(self, last: RequestResponseCycle | None, waited: bool) -> None:
        """Close the connection if it still waits for the same head as at the last look.

        Args:
            last: Latest request at the last look.
            waited: Whether it was answered, so that the connection waited for the next one.
        """
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # streams have their own patience
            return
        waits = self.cycle is None or self.cycle.response_complete
        if waits and waited and self.cycle is last:
            if self.conn.trailing_data[0]:
                self.send_400_response(f"the head of the request did not end in {self._patience:g} s; send it again")
            else:
                self.transport.close()
            return
        self._timer = self.loop.call_later(self._patience, self._look, self.cycle, waits)


class WholeRequests:
    """Reads the rest of a request that is answered before its end.

    The system resets a connection that is closed with unread bytes, and a reset can overtake the answer.

    Args:
        app: Application.
        patience: Seconds for the rest of a request, at most.
    """

    def __init__(self, app: ASGIApp, patience: float) -> None:
        self._app, self._patience = app, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ended = False

        async def receive_noted() -> Message:
            nonlocal ended
            message = await receive()
            ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def send_at_end(message: Message) -> None:
            if ended or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})
            try:
                async with asyncio.timeout(self._patience):
                    while not ended:
                        async with asyncio.timeout(IDLE):
                            await receive_noted()
            except TimeoutError:
                pass
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, receive_noted, send_at_end)
