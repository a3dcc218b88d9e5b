"""Prompts over several ComfyUI servers: a few ahead on each, the rest for whoever has nothing to do.

A server that dies, starts anew or is full is left alone for a pause that doubles; what it had goes to the
others, and what it still has when it comes back is taken out there.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ..errors import HYWUError, get_logger
from .client import Client, new_id
from .follow import Follower
from .trouble import (
    Busy,
    Cleared,
    Denied,
    Refused,
    Removed,
    Restarted,
    ServerError,
    ServerGone,
    TimedOut,
)
from .work import FIRST_PAUSE, Finished, Run, Server, Work

log = get_logger(__name__)

#: Seconds before a server in trouble is tried again, at most.
LONGEST_PAUSE = 60.0
#: Prompts that a server which took none may refuse before it gets no more, where others take them.
REFUSALS = 3
#: Times that a server may go away under the same running prompt, which may well be why.
DEATHS = 3
#: Seconds between two looks of a server that has nothing to do at what others have.
LOOK = 0.5


class Pool:
    """`async with Pool(servers) as pool: await pool.run(work)`, for `capacity` works at once and more.

    servers: addresses, see `Address`.
    ahead: prompts that wait in each server's queue behind the running one.
    timeout: seconds that a prompt may run.
    patience: seconds without any answer after which a server counts as gone.
    give_up: seconds without any server after which all fails.
    tries: of a work that a server fails at.
    Raises HYWUError on addresses that can't be used.
    """

    def __init__(
        self, servers: Sequence[str], *, token: str | None = None, ahead: int = 1,
        timeout: float | None = None, patience: float = 10.0, give_up: float = 600.0, tries: int = 2,
    ) -> None:  # fmt: skip
        self.ahead, self.timeout, self.give_up, self.tries = ahead, timeout, give_up, tries
        options = {"token": token, "patience": patience}
        self._servers = [Server(address, options) for address in servers]
        self.urls = [server.url for server in self._servers]
        if not servers or len(set(self.urls)) < len(servers):
            raise HYWUError("--server: name at least one server, and each once.")
        self.capacity = len(servers) * (1 + ahead)
        self._waiting: deque[Work] = deque()
        self._ends: dict[Work, asyncio.Future[Finished]] = {}
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._releases: list[asyncio.Task[None]] = []
        self._closed = False
        #: Why there is no server left.
        self.failed: ServerError | None = None

    def describe(self) -> str:
        """Servers at work of all."""
        return f"{sum(s.up.is_set() for s in self._fit())}/{len(self._servers)}"

    def done(self) -> dict[str, int]:
        """Address -> prompts done there."""
        return {server.url: server.done for server in self._servers}

    async def __aenter__(self) -> Pool:
        slots = [server for server in self._servers for _ in range(1 + self.ahead)]
        self._tasks = [asyncio.create_task(self._serve(server)) for server in slots]
        self._tasks.append(asyncio.create_task(self._watch()))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Take back what is on the servers."""
        self._closed, tasks = True, set(self._tasks)
        while tasks:
            for task in tasks:
                task.cancel()
            # wait_for of Python before 3.12 may drop a cancellation
            _, tasks = await asyncio.wait(tasks, timeout=20)
        await asyncio.gather(*self._releases, return_exceptions=True)
        for end in self._ends.values():
            end.cancel()

    async def run(self, work: Work) -> Finished:
        """Run on one of the servers. Raises ServerError, and what `read` and `collect` raise."""
        if self.failed:
            raise self.failed
        end = self._ends[work] = asyncio.get_running_loop().create_future()
        self._put(work, last=work.found is None)
        try:
            return await end
        finally:
            del self._ends[work]
            with contextlib.suppress(ValueError):
                self._waiting.remove(work)

    async def empty(self, uploads: Sequence[tuple[str, str]]) -> None:
        """Take the bytes of (server's address, upload's name) that a process left which was killed."""
        for server in self._servers:
            if names := [name for url, name in uploads if url == server.url]:
                async with server.client() as client:
                    await asyncio.gather(*map(client.empty, names))

    # -- what runs where -----------------------------------------------------------------------------

    def _put(self, work: Work, last: bool = False) -> None:
        if work in self._ends and not self._ends[work].done():
            (self._waiting.append if last else self._waiting.appendleft)(work)
        self._news.set()

    def _settle(self, work: Work, end: Finished | BaseException) -> None:
        future = self._ends.get(work)
        if future is None or future.done():
            return
        if isinstance(end, BaseException):
            future.set_exception(end)
        else:
            future.set_result(end)

    def _fit(self) -> list[Server]:
        return [server for server in self._servers if not server.unfit]

    def _take(self, server: Server) -> Work | None:
        """The next work for a server: what it has already, else what no other must have."""
        up = {s.url for s in self._fit() if s.up.is_set()}
        for work in sorted(self._waiting, key=lambda w: not (w.found and w.found[0] == server.url)):
            elsewhere = work.found and work.found[0] != server.url
            others = up - work.avoid - work.refused
            if (
                (elsewhere and work.found[0] in up)
                or server.url in work.refused
                or (server.url in work.avoid and others)
            ):
                continue
            self._waiting.remove(work)
            if elsewhere:
                work.found = None
            return work
        return None

    async def _next(self, server: Server) -> Work:
        while True:
            await server.up.wait()
            if self._closed:
                raise asyncio.CancelledError
            work = None if server.unfit else self._take(server) or await self._steal(server)
            if work is not None:
                return work
            self._news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), LOOK)

    async def _steal(self, thief: Server) -> Work | None:
        """What waits behind another prompt on the server with most, where the thief has nothing at all."""
        for victim in sorted(self._fit(), key=lambda s: -len(s.runs)):
            if thief.runs or victim is thief or not victim.up.is_set():
                continue
            for run in reversed(victim.runs):
                if run.waits and thief.url not in run.work.refused | run.work.avoid:
                    return await self._withdraw(victim, run)
        return None

    async def _withdraw(self, victim: Server, run: Run) -> Work | None:
        run.contested = True
        try:
            async with victim.client() as client:
                run.stolen = await client.withdraw(run.follower.prompt)
        except HYWUError:
            pass  # in trouble, which its own slot finds out
        finally:
            run.contested = False
        run.follower.look()
        return run.work if run.stolen else None

    # -- one server --------------------------------------------------------------------------------

    async def _serve(self, server: Server) -> None:
        """One slot of a server: a work after the other."""
        async with server.client() as client:
            while True:
                run = Run(await self._next(server))
                server.runs.append(run)
                try:
                    await self._attempt(client, server, run)
                except asyncio.CancelledError:
                    if run.follower is not None:
                        await client.take_back(run.follower.prompt)
                    raise
                finally:
                    server.runs.remove(run)
                    if run.upload and (server.up.is_set() or isinstance(server.trouble, Busy)):
                        # in a task of its own, which the end of this one doesn't end
                        self._releases = [task for task in self._releases if not task.done()]
                        emptied = self.empty([(server.url, run.upload)])
                        self._releases.append(asyncio.create_task(emptied))
                    self._news.set()

    async def _attempt(self, client: Client, server: Server, run: Run) -> None:
        """Run a work to its end here, or back to the others."""
        work, started = run.work, time.monotonic()
        try:
            record = await self._prompt(client, server, run)
            result = await work.collect(client, record)
        except Denied as error:
            server.unfit, server.trouble = True, error
            self._put(work)
        except Busy as error:
            self._put(work)
            self._rest(server, error)
        except Refused as error:
            self._refused(server, work, error)
        except (Removed, Cleared, Restarted, ServerGone) as error:
            if isinstance(error, ServerGone):
                server.lost += [run.follower.prompt] if run.queued else []
                self._rest(server, error)
            if not run.stolen:
                self._lost(server, run, error)
        except ServerError as error:
            if isinstance(error, TimedOut):
                await client.take_back(run.follower.prompt)
            work.tries += 1
            work.avoid.add(server.url)
            self._again(work, error, work.tries >= self.tries)
        except Exception as error:  # of `read` and `collect`: the caller's, not this slot's
            self._settle(work, error)
        else:
            server.done += 1
            seconds = time.monotonic() - started
            self._settle(work, Finished(server.url, run.follower.prompt, seconds, result))

    async def _prompt(self, client: Client, server: Server, run: Run) -> dict[str, Any]:
        """Upload, queue, follow; or follow what is there already."""
        work, graph, found = run.work, None, run.work.found
        work.found = None
        if found is not None:
            run.upload = found[2]
        if found is not None and await client.knows(found[1]):
            prompt = found[1]
        else:
            if found is not None:
                await client.empty(found[2])
            data, suffix = work.read()
            # a name of its own, so that no cache on the server can mistake it
            prompt, graph = new_id(), work.graph
            run.upload = f"hywu_{prompt}{suffix}"
            work.begun(server.url, prompt, run.upload)
            node, key = work.image
            graph[node]["inputs"][key] = await client.upload_temporary(run.upload, data)
        run.follower = follower = Follower(client, prompt, limit=self.timeout)
        async with follower.listening():
            if graph is not None:
                await client.enter(graph, follower)
            run.queued = True
            server.accepted += 1
            server.refusals, server.pause = 0, FIRST_PAUSE
            return await follower.end()

    # -- trouble -----------------------------------------------------------------------------------

    def _again(self, work: Work, error: ServerError, over: bool) -> None:
        if over:
            self._settle(work, error)
        else:
            self._put(work)

    def _lost(self, server: Server, run: Run, error: ServerError) -> None:
        """The work goes to the others; not for ever, where a server went away whenever it ran."""
        if (run.queued and run.follower.began) or isinstance(error, Removed):
            run.work.deaths += 1
            run.work.avoid.add(server.url)
        self._again(run.work, error, run.work.deaths >= DEATHS)

    def _refused(self, server: Server, work: Work, error: Refused) -> None:
        work.refused.add(server.url)
        server.refusals += 1
        others = any(s.accepted for s in self._servers if s is not server)
        if server.refusals >= REFUSALS and not server.accepted and others:
            server.unfit, server.trouble = True, error
            log.warning("%s gets no more, it refuses what others take: %s", server.url, error)
        self._again(work, error, {s.url for s in self._fit()} <= work.refused)

    def _rest(self, server: Server, error: ServerError) -> None:
        """Leave a server alone for a while; trouble before it takes a prompt makes the next pause longer."""
        server.trouble = error
        if server.up.is_set():
            server.up.clear()
            self._tasks.append(asyncio.create_task(self._revive(server)))
            log.warning("%s rests: %s", server.url, error)

    async def _revive(self, server: Server) -> None:
        async with server.client() as client:
            while not (server.up.is_set() or self._closed):
                await asyncio.sleep(server.pause)
                server.pause = min(2 * server.pause, LONGEST_PAUSE)
                try:
                    await asyncio.wait_for(client.json("GET", "/queue"), 10)
                    while server.lost:  # others have it by now
                        if await client.knows(server.lost[-1]):
                            await client.interrupt(server.lost[-1])
                        server.lost.pop()
                except Denied as error:
                    server.unfit, server.trouble = True, error
                except (HYWUError, asyncio.TimeoutError):
                    continue
                server.up.set()
                self._news.set()

    async def _watch(self) -> None:
        """Fail what waits when no server has been there for long."""
        since = math.inf
        while True:
            await asyncio.sleep(LOOK)
            if any(s.up.is_set() for s in self._fit()):
                since, self.failed = math.inf, None
                continue
            since = min(since, time.monotonic())
            if self._fit() and time.monotonic() - since < self.give_up:
                continue
            self.failed = next(s.trouble for s in self._servers if s.trouble)
            for work in list(self._waiting):
                self._settle(work, self.failed)
