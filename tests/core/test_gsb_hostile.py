"""The voting server: addresses that voters use, clients that hang up, sessions that are damaged."""

from __future__ import annotations

import json
import logging
import os
import socket
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from vote_server import Server, make

from hywu_core.cli import main
from hywu_core.errors import HYWUError
from hywu_core.evaluation.gsb.server import allowed_hosts, serve
from hywu_core.evaluation.gsb.session import create_session
from hywu_core.evaluation.gsb.store import NotKept, Store

S = "s/session/"
BODY = {"voter": "v"}


def stop(url: str) -> None:
    raise AssertionError(f"it serves at {url}")


@pytest.mark.parametrize(
    "given",
    ["votes.example", "Votes.Example", "votes.example:8199", "https://votes.example", "http://VOTES.example:80/x",
     "votes.example.", " votes.example "],
)  # fmt: skip
def test_a_host_name_counts_however_it_is_written(tmp_path, given):
    with Server(make(tmp_path), hosts=(given,)) as server:
        for name in ("votes.example", "VOTES.example:8199", "votes.example."):
            assert server.ask(S + "state", BODY, Host=name)[0] == 200
        for name in ("other.example", "votes.example.evil.example", "xvotes.example"):
            assert server.ask(S + "state", BODY, Host=name)[0] == 403


@pytest.mark.parametrize("host", ["votes.example", "Votes.EXAMPLE", "votes.example."])
def test_the_name_that_is_listened_on_counts_too(host):
    assert "votes.example" in allowed_hosts(host, ())


@pytest.mark.parametrize("given", ["", "http://", "a b", "[::1", "ex*mple.org", "user@host"])
def test_what_is_no_host_name_is_an_error(tmp_path, given):
    with pytest.raises(HYWUError, match="--allow-host"):
        serve(make(tmp_path), "127.0.0.1", 0, [given], stop)


@pytest.mark.parametrize("port", ["70000", "-1", "65536"])
def test_a_port_that_is_none_is_an_error(tmp_path, capsys, port):
    assert main(["eval", "gsb", "serve", str(make(tmp_path)), "--port", port]) == 1
    assert f"--port is {port}" in capsys.readouterr().err


def test_a_host_that_cannot_be_listened_on_is_an_error(tmp_path, capsys):
    folder = make(tmp_path)
    assert main(["eval", "gsb", "serve", str(folder), "--host", "no.such.host.invalid"]) == 1
    assert main(["eval", "gsb", "serve", str(folder), "--host", "192.0.2.1"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "192.0.2.1" in said


def test_on_every_address_the_link_works_and_the_risk_is_said(tmp_path):
    said: list[str] = []
    with Server(make(tmp_path), host="0.0.0.0", told=said) as server:
        assert "//0.0.0.0" not in server.url
        assert server.ask(S + "state", BODY)[0] == 200
        for name in ("192.168.7.9:8199", "10.0.0.5", "[fe80::1]:8199", "localhost"):
            assert server.ask(S + "state", BODY, Host=name)[0] == 200
        # a name can be pointed at this machine by a stranger, a number can't
        assert server.ask(S + "state", BODY, Host="evil.example")[0] == 403
    assert any("whoever reaches this machine" in line and "not encrypted" in line for line in said)


def test_on_loopback_numbers_of_others_are_refused_and_nothing_is_warned_of(tmp_path):
    said: list[str] = []
    with Server(make(tmp_path), told=said) as server:
        assert server.ask(S + "state", BODY, Host="192.168.7.9")[0] == 403
        assert server.ask(S + "state", BODY, Host="LOCALHOST:80")[0] == 200
    assert not said
    assert allowed_hosts("127.0.0.2", []) >= {"127.0.0.2", "localhost"}


def test_the_page_keeps_its_own_policy_where_a_server_sends_a_weaker_one(tmp_path):
    with Server(make(tmp_path)) as server:
        page = server.ask("")[1].decode()
    assert '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'' in page
    assert page.index("Content-Security-Policy") < page.index("<link")
    assert page.index("Content-Security-Policy") < page.index("<script")


@pytest.mark.parametrize("sent", [b'{"voter": "v"', b""])
def test_a_request_that_breaks_off_is_no_fault_of_the_server(tmp_path, caplog, sent):
    caplog.set_level(logging.DEBUG)
    with Server(make(tmp_path)) as server:
        host, port = server.base.split("/")[2].split(":")
        head = (
            f"POST /gsb/s/session/vote HTTP/1.1\r\nHost: {host}:{port}\r\nX-HYWU-Token: {server.token}\r\n"
            "Content-Type: application/json\r\nContent-Length: 4000\r\n\r\n"
        )
        for _ in range(5):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + sent)
                time.sleep(0.05)
        time.sleep(0.3)
        assert server.ask(S + "state", BODY)[0] == 200
    told = [r for r in caplog.records if r.levelno >= logging.ERROR or r.exc_info]
    assert not told


# -- damaged sessions ----------------------------------------------------------------------------


DAMAGES = {
    "no token": "DELETE FROM about WHERE key='token'",
    "no seed": "DELETE FROM about WHERE key='seed'",
    "a part that is no number": "UPDATE about SET value='many' WHERE key='pairs_per_voter'",
    "a negative part": "UPDATE about SET value='-3' WHERE key='pairs_per_voter'",
    "no votes": "DROP TABLE votes",
    "no undone": "DROP TABLE undone",
    "no pairs": "DELETE FROM pairs",
    "a path for an image": "UPDATE pairs SET a='../../session' WHERE rowid=1",
    "bytes for a text": "UPDATE pairs SET instruction=x'ff' WHERE rowid=1",
    "a vote on no pair": "INSERT INTO votes (voter, pair, verdict, a_on_left, time) VALUES ('v','x','good',1,0)",
    "an empty token": "UPDATE about SET value='' WHERE key='token'",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("step", ["serve", "report", "export"])
def test_a_damaged_session_is_one_sentence(tmp_path, capsys, damage, step):
    folder = make(tmp_path)
    with sqlite3.connect(folder / "session.sqlite3") as db:
        db.execute("PRAGMA foreign_keys=OFF")
        db.execute(DAMAGES[damage])
    db.close()
    more = ["--out", str(tmp_path / "v.csv")] if step == "export" else []
    more = ["--host", "no.such.host.invalid"] if step == "serve" else more
    assert main(["eval", "gsb", step, str(folder), *more]) == 1
    said = capsys.readouterr().err
    assert "session.sqlite3" in said
    assert "Traceback" not in said


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, which Windows can't")
@pytest.mark.parametrize("way", ["pages", "bytes"])
def test_a_full_disk_keeps_acknowledged_votes_and_the_next_one_works(tmp_path, way):
    import resource

    store, kept = Store(make(tmp_path, pairs=40)), []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    if way == "pages":
        store._db.execute(f"PRAGMA max_page_count={pages}")
    else:
        store.add_vote("first", next(iter(store.pairs)), "good", True)
        kept.append("first")
        written = (store.folder / "session.sqlite3-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (written + 100, limits[1]))
    try:
        with pytest.raises(NotKept, match=r"session.sqlite3: can't be written"):
            for number in range(20_000):
                store.add_vote(f"v{number}", next(iter(store.pairs)), "good", True)
                kept.append(f"v{number}")
        with pytest.raises(NotKept):  # and again, not "within a transaction"
            store.add_vote("again" * 2000, next(iter(store.pairs)), "good", True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        store._db.execute("PRAGMA max_page_count=1000000")
    store.add_vote("last", next(iter(store.pairs)), "good", True)
    store.close()
    again = Store(store.folder)
    assert [vote.voter for vote in again.votes()] == [*kept, "last"]
    again.close()


def test_a_vote_that_was_not_kept_is_said_without_the_servers_paths(tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise NotKept("/secret/session.sqlite3: can't be written (database or disk is full).")

    with Server(make(tmp_path)) as server:
        monkeypatch.setattr(Store, "add_vote", full)
        pair = json.loads(server.ask(S + "state", BODY)[1])["pair"]["id"]
        status, body = server.ask(S + "vote", {**BODY, "pair": pair, "choice": "left"})
        assert status == 507
        assert "not kept" in json.loads(body)["error"]
        assert b"secret" not in body
        assert "/secret/session.sqlite3" in caplog.text
        monkeypatch.undo()
        assert server.ask(S + "vote", {**BODY, "pair": pair, "choice": "left"})[0] == 200


def test_two_sessions_into_one_folder_at_once_are_one(tmp_path):
    entries = make_entries(tmp_path)
    ended: list[object] = []
    start = threading.Barrier(6)

    def create(number: int) -> None:
        start.wait()
        try:
            create_session(tmp_path / "votes", entries, ("a", f"b{number}"))
            ended.append(number)
        except HYWUError as error:
            ended.append(str(error))

    threads = [threading.Thread(target=create, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [n for n in ended if isinstance(n, int)]
    assert all("exists already" in text for text in ended if isinstance(text, str))
    store = Store(tmp_path / "votes")
    assert store.about["method_b"] == f"b{won}"
    store.close()


def make_entries(root: Path):
    from PIL import Image

    from hywu_core.evaluation.gsb.session import Entry

    paths = [root / f"{name}.png" for name in "sab"]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    return [Entry(f"edit/en/{n}", "x", *paths) for n in range(3)]


@pytest.mark.parametrize("name", ["half \ud83d", "x" * 300, "a\nb\x1b[2J"])
def test_a_session_of_a_hostile_name_is_served(tmp_path, name):
    entries = make_entries(tmp_path)
    create_session(tmp_path / "votes", entries, ("a", "b"), name)
    with Server(tmp_path / "votes") as server:
        state = json.loads(server.ask(S + "state", BODY)[1])
    assert state["name"] == name.encode("utf-8", "backslashreplace").decode()
