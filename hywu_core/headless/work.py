"""What a pool of servers handles: a prompt for any of them, a prompt on one, and a server as the pool sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from .address import Address
from .client import Client
from .follow import Follower
from .graph import Graph
from .trouble import ServerError

#: Seconds before a server in trouble is tried again, at first.
FIRST_PAUSE = 1.0


@dataclass(eq=False)
class Work:
    """A prompt for any server.

    graph: in API format, this prompt's own.
    image: (node, input) that loads an uploaded image.
    read: gives that image as (bytes, suffix).
    collect: takes what is wanted of the history record, before the server is given more.
    begun: called with (server's address, prompt's id, upload's name) before anything of it is there.
    found: what `begun` was told by a process that ended since; it is followed where it still is.
    """

    graph: Graph
    image: tuple[str, str]
    read: Callable[[], tuple[bytes, str]]
    collect: Callable[[Client, dict[str, Any]], Awaitable[Any]]
    begun: Callable[[str, str, str], None] = lambda *_: None
    found: tuple[str, str, str] | None = None
    tries: int = 0
    deaths: int = 0
    #: Servers that refused it; that failed at it.
    refused: set[str] = field(default_factory=set)
    avoid: set[str] = field(default_factory=set)


@dataclass
class Finished:
    """Where a prompt ran, the seconds from upload to collected, and what `collect` gave."""

    server: str
    prompt: str
    seconds: float
    result: Any


class Run:
    """A work on a server."""

    def __init__(self, work: Work) -> None:
        self.work, self.upload = work, ""
        self.follower: Follower | None = None
        self.queued = self.stolen = self.contested = False

    @property
    def waits(self) -> bool:
        """Whether another server may have it."""
        return self.queued and not (self.follower.began or self.stolen or self.contested)


class Server:
    """One server as the pool sees it. lost: ids of prompts that it had when it went away."""

    def __init__(self, address: str, options: dict[str, Any]) -> None:
        self.url, self.client = Address(address).url, lambda: Client(address, **options)
        self.up, self.unfit, self.pause = asyncio.Event(), False, FIRST_PAUSE
        self.up.set()
        self.accepted = self.refusals = self.done = 0
        self.runs: list[Run] = []
        self.lost: list[str] = []
        self.trouble: ServerError | None = None
