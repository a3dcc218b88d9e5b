"""Voting sessions: blinding, durability, security, concurrency; on real servers."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from vote_server import Server, make

from hywu_core.cli import main
from hywu_core.cli.eval import gsb as command
from hywu_core.errors import HYWUError
from hywu_core.evaluation.gsb import session
from hywu_core.evaluation.gsb.report import report
from hywu_core.evaluation.gsb.server import serve
from hywu_core.evaluation.gsb.store import Conflict, Store

aiohttp = pytest.importorskip("aiohttp", reason="the voting server needs the `eval` extra")
yarl = pytest.importorskip("yarl", reason="comes with aiohttp")

#: Forks a server for each line on its standard input, so that 200 starts don't import 200 times.
FORK = (
    "import aiohttp.web, os, sys; from pathlib import Path; from hywu_core.evaluation.gsb.server import serve\n"
    "for line in sys.stdin:\n"
    "    child = os.fork()\n"
    "    if child == 0:\n"
    "        serve(Path(sys.argv[1]), '127.0.0.1', 0, [],\n"
    "              lambda url: print(os.getpid(), url, flush=True))\n"
    "    os.waitpid(child, 0)\n"
)
ROOT = Path(__file__).resolve().parents[2]


class ForkedServers(Server):
    """Servers one after another, each a process of its own that is killed with SIGKILL."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORK, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self) -> int:
        self.process.stdin.write("start\n")
        self.process.stdin.flush()
        pid, url = self.process.stdout.readline().split()
        self.open(url)
        return int(pid)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path):
    with Server(make(tmp_path)) as running:
        yield running


S = "s/session/"


def test_nothing_the_client_gets_names_a_method(server):
    status, body = server.ask(S + "state", {"voter": "v"})
    assert status == 200
    pair = json.loads(body)["pair"]
    seen = body
    for name in ("source", "left", "right"):
        status, image = server.ask(S + "image/" + pair[name])
        assert status == 200
        seen += image
    assert b"SECRET" not in seen
    assert b"edit/en" not in seen


def test_sides_are_balanced_stable_and_differ_between_voters(tmp_path):
    store = Store(make(tmp_path, 10))
    orders = [session.assignment(store, f"v{i}") for i in range(8)]
    assert all(sum(left for _, left in order) == 5 for order in orders)
    assert session.assignment(store, "v0") == orders[0]
    assert len({tuple((p.pair, left) for p, left in order) for order in orders}) == 8
    store.close()


def test_choices_become_verdicts_about_the_first_method(tmp_path):
    store = Store(make(tmp_path, 4))
    for pair, a_left in session.assignment(store, "v"):
        session.vote(store, "v", pair.pair, "left" if a_left else "right")
    assert report(store)[0]["good"] == 4
    last = store.voted("v")[-1]
    with pytest.raises(Conflict):
        store.undo("v", store.voted("v")[0])
    store.undo("v", last)
    assert report(store)[0]["good"] == 3
    with pytest.raises(HYWUError, match="no pair of yours"):
        session.vote(store, "v", "unknown", "left")
    store.close()


def test_a_second_tab_is_told_and_not_counted(server, tmp_path):
    pair = json.loads(server.ask(S + "state", {"voter": "v"})[1])["pair"]["id"]
    vote = {"voter": "v", "pair": pair, "choice": "left"}
    assert server.ask(S + "vote", vote)[0] == 200
    status, body = server.ask(S + "vote", {**vote, "choice": "right"})
    assert status == 409
    assert b"another tab" in body
    store = Store(tmp_path / "session")
    assert len(store.votes()) == 1
    store.close()


def test_requests_that_must_be_refused(server, tmp_path):
    body = {"voter": "v"}
    assert server.ask(S + "state", body, **{"X-HYWU-Token": "wrong"})[0] == 403
    assert server.ask("s/other/state", body)[0] == 403
    assert server.ask(S + "state", body, Host="evil.example")[0] == 403
    assert server.ask(S + "state", body, Origin="http://evil.example")[0] == 403
    assert server.ask(S + "state", body, Origin="http://[")[0] == 403
    assert server.ask(S + "state", body, **{"Content-Type": "text/plain"})[0] == 415
    assert server.ask(S + "state", b"{" + b" " * 5000)[0] == 413
    for bad in (b"{", b"[]", b'{"voter": 3}', b'{"voter": ""}', b"[" * 4000, b"\xff"):
        status, answer = server.ask(S + "state", bad)
        assert status == 400
        assert b"Traceback" not in answer
    for path in (
        "../session.sqlite3",
        "..%2Fsession.sqlite3",
        "%2e%2e%2fsession.sqlite3",
        "..%5Csession.sqlite3",
        "%2Fetc%2Fpasswd",
        "x%00",
    ):
        for prefix in (S + "image/", ""):
            status, answer = server.ask(prefix + path)
            assert status in (400, 403, 404, 405)
            assert b"SQLite" not in answer


def test_without_the_token_no_vote_changes_and_no_image_is_served(server, tmp_path):
    pair = json.loads(server.ask(S + "state", {"voter": "v"})[1])["pair"]
    vote = {"voter": "v", "pair": pair["id"], "choice": "left"}
    following = json.loads(server.ask(S + "vote", vote)[1])["pair"]["id"]
    for wrong in (
        "",
        "x",
        server.token[:-1],
        server.token + "x",
        server.token.swapcase(),
        "\u00e9",
    ):
        token = {"X-HYWU-Token": wrong}
        assert server.ask(S + "vote", {**vote, "pair": following}, **token)[0] == 403
        assert server.ask(S + "undo", {"voter": "v", "pair": pair["id"]}, **token)[0] == 403
        assert server.ask(S + "image/" + pair["left"], **token)[0] == 403
        assert server.ask("s/other/vote", vote, **token)[0] == 403
    store = Store(tmp_path / "session")
    assert [v.pair for v in store.votes()] == [pair["id"]]
    store.close()


def test_an_image_that_is_not_listed_is_not_served(server, tmp_path):
    images = tmp_path / "session" / "images"
    Image.new("RGB", (4, 4)).save(images / "more.png")
    assert server.ask(S + "image/more")[0] == 404
    listed = next(p.stem for p in images.iterdir() if p.stem != "more")
    assert server.ask(S + "image/" + listed)[0] == 200


def test_votes_on_a_session_that_was_removed_are_not_acknowledged(server, tmp_path):
    pair = json.loads(server.ask(S + "state", {"voter": "v"})[1])["pair"]["id"]
    (tmp_path / "session").rename(tmp_path / "elsewhere")
    vote = {"voter": "v", "pair": pair, "choice": "left"}
    assert server.ask(S + "vote", vote)[0] == 403
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "session")
    assert server.ask(S + "vote", vote)[0] == 403  # another file by the same name


def test_a_vote_is_taken_back_over_the_page(server, tmp_path):
    first = json.loads(server.ask(S + "state", {"voter": "v"})[1])["pair"]["id"]
    vote = {"voter": "v", "pair": first, "choice": "left"}
    second = json.loads(server.ask(S + "vote", vote)[1])["pair"]["id"]
    assert second != first
    status, body = server.ask(S + "undo", {"voter": "v", "pair": first})
    assert status == 200
    assert json.loads(body)["pair"]["id"] == first
    status, body = server.ask(S + "undo", {"voter": "v", "pair": first})
    assert status == 409
    assert json.loads(body)["error"]
    store = Store(tmp_path / "session")
    assert store.votes() == []
    store.close()


def test_an_error_of_the_server_shows_nothing_of_its_inside(server, monkeypatch, caplog):
    def broken(store, voter):
        raise RuntimeError("the database's secret path")

    monkeypatch.setattr(session, "state", broken)
    status, body = server.ask(S + "state", {"voter": "v"})
    assert status == 500
    assert json.loads(body) == {"error": "The server failed; its log says why."}
    assert "the database's secret path" in caplog.text


def test_host_names_that_were_allowed_are_answered(tmp_path):
    with Server(make(tmp_path), hosts=("votes.example",)) as server:
        body = {"voter": "v"}
        assert server.ask(S + "state", body, Host="votes.example:80")[0] == 200
        assert server.ask(S + "state", body, Host="other.example")[0] == 403
        assert server.ask(S + "state", body, Host="[::1")[0] == 403


def test_a_stopped_server_leaves_port_and_votes_and_can_start_again(tmp_path):
    folder = make(tmp_path)
    with Server(folder) as server:
        port = int(server.base.split(":")[2].split("/")[0])
        with pytest.raises(OSError, match="attempting to bind"):
            serve(folder, "127.0.0.1", port, [], lambda url: None)
        pair = json.loads(server.ask(S + "state", {"voter": "v"})[1])["pair"]["id"]
        assert server.ask(S + "vote", {"voter": "v", "pair": pair, "choice": "same"})[0] == 200
    with pytest.raises(aiohttp.ClientConnectionError):
        server.ask(S + "state", {"voter": "v"})
    with Server(folder) as again:
        state = json.loads(again.ask(S + "state", {"voter": "v"})[1])
        assert state["pair"]["id"] != pair


@pytest.mark.skipif(os.name == "nt", reason="a process can't send itself Ctrl-C alone on Windows")
def test_serve_prints_the_link_and_ctrl_c_ends_it(tmp_path, monkeypatch, capsys):
    folder, said, seen, printed = make(tmp_path), [], [], threading.Event()

    def say(text: str) -> None:
        said.append(text)
        printed.set()

    def visit_then_press_ctrl_c() -> None:
        assert printed.wait(60)
        page = said[0].removeprefix("Voting page: ").partition("#")[0]
        try:
            with urllib.request.urlopen(page, timeout=30) as answer:
                seen.append(answer.read().decode())
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(command, "say", say)
    visitor = threading.Thread(target=visit_then_press_ctrl_c)
    visitor.start()
    assert main(["eval", "gsb", "serve", str(folder), "--port", "0"]) == 130
    visitor.join()
    assert "interrupted" in capsys.readouterr().err
    assert "<html" in seen[0]
    store = Store(folder)
    assert said[0].endswith(f"#session:{store.about['token']}")
    store.close()
    assert main(["eval", "gsb", "serve", str(tmp_path)]) == 1
    assert "no voting session" in capsys.readouterr().err


def test_fifty_voters_at_once_lose_and_double_nothing(server, tmp_path):
    async def voter(client, name):
        _, body = await server.send(client, S + "state", {"voter": name})
        while pair := json.loads(body)["pair"]:
            vote = {"voter": name, "pair": pair["id"], "choice": "same"}
            # The same vote twice at once, as two tabs would send it.
            answers = await asyncio.gather(
                *(server.send(client, S + "vote", vote) for _ in range(2))
            )
            assert sorted(status for status, _ in answers) == [200, 409]
            body = next(body for status, body in answers if status == 200)

    async def everyone():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=100)) as client:
            await asyncio.gather(*(voter(client, f"v{i}") for i in range(50)))

    asyncio.run(everyone())
    store = Store(tmp_path / "session")
    counted = Counter((vote.voter, vote.pair) for vote in store.votes())
    store.close()
    assert len(counted) == 200
    assert set(counted.values()) == {1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX's")
def test_killed_200_times_no_acknowledged_vote_is_lost(tmp_path):
    """kill -9 before, between and during votes; what was answered is there, and nothing twice.

    A voter whose vote got no answer sends it again, as the page's user would: it may have counted.
    """
    folder = make(tmp_path, 4)
    rng = random.Random(0)
    store = Store(folder)
    plans = {f"v{i}": [p.pair for p, _ in session.assignment(store, f"v{i}")] for i in range(4000)}
    acknowledged: list[tuple[str, str]] = []
    votes = iter([(voter, pair) for voter, pairs in plans.items() for pair in pairs])
    unanswered: list[tuple[str, str]] = []
    died = 0

    async def until_dead(server: Server, pid: int, kill: threading.Timer, between: int) -> None:
        async with aiohttp.ClientSession() as client:
            again = list(unanswered)
            for number, (voter, pair) in enumerate(itertools.chain(again, votes), 1):
                unanswered[:] = [(voter, pair)]
                body = {"voter": voter, "pair": pair, "choice": "left"}
                try:
                    status, _ = await server.send(client, S + "vote", body)
                except (aiohttp.ClientError, ConnectionError):
                    return
                assert status == 200 or (number <= len(again) and status == 409)
                acknowledged.append((voter, pair))
                unanswered.clear()
                if number == between:
                    os.kill(pid, signal.SIGKILL)  # no vote is on its way
                    return
                if not between and kill.ident is None:
                    kill.start()

    with ForkedServers(folder) as servers:
        for number in range(200):
            pid = servers.start()
            between = rng.randint(1, 4) if number % 3 == 2 else 0
            kill = threading.Timer(rng.uniform(0, 0.05), os.kill, (pid, signal.SIGKILL))
            if number % 3 == 0:  # the others die after a first vote, however slow the machine is
                kill.start()
            try:
                asyncio.run(until_dead(servers, pid, kill, between))
                died += 1
            finally:
                if not between:
                    if kill.ident is None:
                        kill.start()
                    kill.join()
    kept = Counter((vote.voter, vote.pair) for vote in store.votes())
    store.close()
    assert len(acknowledged) >= 130
    assert died == 200
    assert set(kept.values()) == {1}
    assert len(set(acknowledged)) == len(acknowledged)
    assert set(acknowledged) <= set(kept) <= {*acknowledged, *unanswered}
