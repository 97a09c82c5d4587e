"""A local Hub that fails on purpose, and tokens for it."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from local_hub import LocalHub

TOKENS = {
    "hf_mine0000000000000000000000000000000": {"name": "me", "role": "write", "orgs": ["lab"]},
    "hf_reader00000000000000000000000000000": {"name": "me", "role": "read", "orgs": []},
    "hf_other000000000000000000000000000000": {"name": "other", "role": "write", "orgs": []},
}
MINE, READER, OTHER = TOKENS


class FaultyHub(LocalHub):
    """A local Hub that fails as `faults` says: the first that matches a request is removed.

    A fault is (method, part of the path, action). The action is a status or a starlette Response
    to answer with, "drop" (close the connection before acting), "lose" (act, then close it without
    a reply), "cut" (send half the body, then close it), "corrupt" (flip the last byte of the body)
    or a function to call before acting.
    """

    def __init__(self, root: Path, tokens: dict):
        super().__init__(root, tokens)
        self.faults: list[tuple] = []
        faults = self.faults

        class FaultyProtocol(H11Protocol):
            """uvicorn's protocol, which gives each connection's application its transport."""

            def connection_made(self, transport) -> None:
                super().connection_made(transport)
                self.app = FaultyApp(self.app, faults, transport)

        self.config.http = FaultyProtocol


class FaultyApp:
    """The Hub's application (ASGI) on one connection."""

    def __init__(self, app, faults: list[tuple], transport):
        self.app, self.faults, self.transport = app, faults, transport

    def next_action(self, scope):
        """Remove and return the action of the first fault that matches; None if none does."""
        address = scope["raw_path"].decode() + "?" + scope["query_string"].decode()
        for fault in self.faults:
            method, part, action = fault
            if method == scope["method"] and part in address:
                self.faults.remove(fault)
                return action
        return None

    async def __call__(self, scope, receive, send) -> None:
        action = self.next_action(scope)
        if isinstance(action, int):
            action = Response(status_code=action)
        if isinstance(action, Response):
            return await action(scope, receive, send)
        if action in ("drop", "lose", "cut"):
            if action != "drop":
                await self.app(scope, receive, self.cut(send) if action == "cut" else discard)
            return await self.close(receive)
        if callable(action):
            await asyncio.to_thread(action)
        await self.app(scope, receive, corrupt(send) if action == "corrupt" else send)

    async def close(self, receive) -> None:
        """Close the connection, and wait until uvicorn knows."""
        self.transport.close()
        while (await receive())["type"] != "http.disconnect":
            pass

    def cut(self, send):
        """Return a `send` that lets half of the body through."""
        left = 0

        async def send_half(message) -> None:
            nonlocal left
            if message["type"] == "http.response.start":
                left = content_length(message) // 2
                return await send(message)
            body = message.get("body", b"")[:left]
            left -= len(body)
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        return send_half


def content_length(message) -> int:
    return int(dict(message["headers"])[b"content-length"])


async def discard(message) -> None:
    """Send nothing."""


def corrupt(send):
    """Return a `send` that flips a bit of the last byte of the body."""
    left = 0

    async def send_corrupted(message) -> None:
        nonlocal left
        if message["type"] == "http.response.start":
            left = content_length(message)
        elif body := message.get("body", b""):
            left -= len(body)
            if left == 0:
                message = message | {"body": body[:-1] + bytes([body[-1] ^ 1])}
        await send(message)

    return send_corrupted


@pytest.fixture
def hub_server(tmp_path, monkeypatch) -> Iterator[FaultyHub]:
    """A local Hub of its own, to which the clients of this process are pointed."""
    server = FaultyHub(tmp_path / "hub", TOKENS)
    server.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield server
    threading.Thread(target=server.stop, daemon=True).start()  # takes 0.2 s
