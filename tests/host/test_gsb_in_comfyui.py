"""The voting page served by a real ComfyUI server, beside its own pages."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
from PIL import Image

from hywu_core.evaluation.gsb import session
from hywu_core.evaluation.gsb.store import Store


def ask(server, path, data=None, **headers):
    """(status, body) of a request to loopback, whatever proxy the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(
        server.url + path, body, {"Content-Type": "application/json", **headers}
    )
    try:
        with opener.open(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.fixture(scope="module")
def voting(server, tmp_path_factory):
    """A session with one pair in the server's user folder; gives its open store."""
    folder = tmp_path_factory.mktemp("gsb")
    paths = []
    for i, name in enumerate(("source", "a", "b")):
        paths.append(folder / f"{name}.png")
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(paths[-1])
    entries = [session.Entry("item", "Make it red", *paths)]
    made = session.create_session(
        server.base / "user" / "hywu" / "gsb" / "first", entries, ("one", "two"), seed=1
    )
    store = Store(made)
    yield store
    store.close()


def test_the_page_is_served(server):
    status, body = ask(server, "/hywu/gsb/")
    assert status == 200
    assert b"gsb.js" in body
    assert ask(server, "/hywu/gsb/gsb.js")[0] == 200
    assert ask(server, "/hywu/gsb/server.py")[0] == 404


def test_a_vote_counts(server, voting):
    token = {"X-HYWU-Token": voting.about["token"]}
    status, body = ask(server, "/hywu/gsb/s/first/state", {"voter": "Ada"}, **token)
    assert status == 200
    pair = json.loads(body)["pair"]
    assert pair["instruction"] == "Make it red"
    ballot = {"voter": "Ada", "pair": pair["id"], "choice": "same"}
    assert ask(server, "/hywu/gsb/s/first/vote", ballot, **token)[0] == 200
    assert [vote.verdict for vote in voting.votes()] == ["same"]
    assert ask(server, "/hywu/gsb/s/first/vote", ballot, **token)[0] == 409


def test_strangers_are_refused(server, voting):
    voter = {"voter": "Eve"}
    token = {"X-HYWU-Token": voting.about["token"]}
    assert ask(server, "/hywu/gsb/s/first/state", voter)[0] == 403
    assert ask(server, "/hywu/gsb/s/..%2Ffirst/state", voter, **token)[0] in (403, 404)
    for headers in ({"Host": "rebound.example"}, {"Origin": "http://evil.example"}):
        status, _ = ask(server, "/hywu/gsb/s/first/state", voter, **token, **headers)
        assert status == 403, headers
