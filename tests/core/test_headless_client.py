"""`hywu comfy run` against a server that speaks ComfyUI's protocol as told: what a real one rarely does.

The answers have the form of ComfyUI's own; tests/host has a real server.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from hywu_core.cli import main
from hywu_core.errors import HYWUError
from hywu_core.headless import follow
from hywu_core.headless.client import Client, ServerError, ServerGone, TimedOut, run_sync
from hywu_core.headless.local import free_port
from hywu_core.headless.saving import save_new

pytest.importorskip("aiohttp", reason="the client needs the `headless` extra")

from fake_comfyui import DONE, INTERRUPTED, FakeComfyUI

GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
}


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """The client looks five times as often as usual."""
    monkeypatch.setattr(follow, "WITH_SOCKET", follow.WITH_SOCKET / 5)
    monkeypatch.setattr(follow, "WITHOUT_SOCKET", follow.WITHOUT_SOCKET / 5)


@pytest.fixture
def server():
    with FakeComfyUI() as running:
        yield running


@pytest.fixture
def run(server, tmp_path) -> Callable[..., int]:
    """Run GRAPH by the command line; outputs go to tmp_path/out."""
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))

    def command(*more: object) -> int:
        given = ["--server", server.url, "--out", str(tmp_path / "out")]
        return main(["comfy", "run", str(tmp_path / "graph.json"), *given, *map(str, more)])

    return command


def outputs_of(tmp_path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_uploads_follows_and_saves_every_output(server, run, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (4, 4)).save(photo)
    images = [
        {"filename": name, "subfolder": "", "type": "output"} for name in ("../x.png", "x.png")
    ]
    server.files = {"../x.png": b"one", "x.png": b"two"}
    server.outputs = {
        "2": {"images": images, "animated": [False]},
        "3": {"text": ['{"psnr": 1}', "plain"], "flag": True},
    }
    server.late = 2  # the record is written a moment after the end is announced
    assert run("--image", photo, "--set", "SaveImage.images=5") == 0
    assert outputs_of(tmp_path) == {
        "x.png": b"one",
        "x-2.png": b"two",
        "3-text-3.json": b'{"psnr": 1}',
        "3-text-4.txt": b"plain",
    }
    assert "4 outputs in" in capsys.readouterr().out
    assert server.asked[0] == ("upload", ("photo.png", photo.read_bytes()))
    ((_, graph),) = [a for a in server.asked if a[0] == "prompt"]
    assert graph["1"]["inputs"]["image"] == "sub/photo.png"
    assert graph["2"]["inputs"]["images"] == 5
    assert server.commands() == []


def test_progress_is_that_of_our_prompt(server):
    step = {"value": 3, "max": 8, "node": "2"}
    server.events = [
        ("progress", {**step, "prompt_id": "somebody else's"}),
        ("progress", {**step, "prompt_id": "PROMPT"}),
        ("execution_error", {"prompt_id": "somebody else's"}),
        *DONE,
    ]
    seen, kinds = [], []

    async def follow() -> dict:
        async with Client(server.url + "/") as client:
            return await client.run(
                GRAPH, lambda *args: seen.append(args), lambda kind, data: kinds.append(kind)
            )

    assert asyncio.run(follow())["status"]["status_str"] == "success"
    assert seen == [("2", 3, 8)]
    assert kinds == ["progress", *(kind for kind, _ in DONE)]


FAILED = {
    "prompt_id": "PROMPT", "node_id": "2", "node_type": "SaveImage",
    "exception_type": "torch.OutOfMemoryError", "exception_message": "no memory\n",
}  # fmt: skip


INTERRUPTION = {"prompt_id": "PROMPT", "node_id": "1"}
RECORDED = {"status_str": "error", "completed": False}


@pytest.mark.parametrize("told", ["by the websocket", "by the record", "without a websocket"])
@pytest.mark.parametrize(
    ("event", "code", "words"),
    [
        (("execution_error", FAILED), 5, "Node 2 (SaveImage) failed with OutOfMemoryError: no mem"),
        (("execution_interrupted", INTERRUPTION), 6, "at node 1"),
    ],
)
def test_how_a_prompt_may_end(server, run, tmp_path, capsys, event, code, words, told):
    server.events, server.lost = [event], told == "by the websocket"
    if told != "by the websocket":
        server.events, server.status = (
            [],
            {**RECORDED, "messages": [["execution_start", {}], event]},
        )
        server.mute = 404 if told == "without a websocket" else 0
    assert run() == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("socket", ["closed in mid-run", "mute", "refused"])
def test_the_end_is_found_without_the_websocket(server, run, tmp_path, socket):
    """The server ran the prompt; its events got lost on the way."""
    server.events, server.closes = [], socket == "closed in mid-run"
    server.mute = 401 if socket == "refused" else 0
    # long enough for a closed one to be opened again
    server.late = 15 if server.closes else 3
    server.outputs = {"2": {"text": ["made"]}}
    assert run() == 0
    assert list(outputs_of(tmp_path).values()) == [b"made"]
    assert server.sockets > (1 if socket == "closed in mid-run" else 0)


def test_a_record_may_hold_what_a_node_failed_with(server, run, capsys):
    """ComfyUI's JSON has NaN where a graph had it."""
    server.events = []
    failed = ["execution_error", {**FAILED, "current_inputs": {"strength": float("nan")}}]
    server.status = {**RECORDED, "messages": [failed]}
    assert run() == 5
    assert "Node 2 (SaveImage) failed" in capsys.readouterr().err


def test_a_proxy_that_stumbles_is_asked_again(server, run, tmp_path):
    server.events, server.broken, server.outputs = [], 3, {"2": {"text": ["made"]}}
    assert run() == 0
    server.broken, server.broken_status = 2, 200  # a page in place of an answer
    assert run() == 0
    assert list(outputs_of(tmp_path).values()) == [b"made", b"made"]


def test_a_busy_server_is_asked_again(server, run, tmp_path):
    server.busy, server.busy_view, server.files = 2, 1, {"x.png": b"one"}
    server.outputs = {"2": {"images": [{"filename": "x.png"}]}}
    assert run() == 0
    assert outputs_of(tmp_path) == {"x.png": b"one"}


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf"])
def test_a_timeout_that_is_none(server, run, capsys, seconds):
    assert run(f"--timeout={seconds}") == 1
    assert "must be a number of seconds above 0" in capsys.readouterr().err
    assert server.asked == []


def test_a_prompt_whose_acceptance_got_lost_is_followed(server, run, tmp_path):
    server.loses_answer, server.outputs = True, {"2": {"text": ["made"]}}
    assert run() == 0
    assert list(outputs_of(tmp_path).values()) == [b"made"]


RUNS = [("executing", {"prompt_id": "PROMPT", "node": "1"})]


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ({"events": [], "running": False}, 8, "removed from the queue"),
        ({"events": RUNS, "running": False}, 9, "record of it was cleared"),
        ({"events": DONE, "running": False}, 9, "record of it was cleared"),
        ({"events": [], "running": False, "closes": True}, 10, "was restarted"),
        (
            {"events": [], "running": False, "closes": True, "other_records": True},
            8,
            "removed from the queue",
        ),
        ({"events": [], "running": False, "broken": 2}, 10, "was restarted"),
    ],
)
def test_a_prompt_that_is_nowhere_any_more(server, run, tmp_path, capsys, how, code, words):
    server.lost = True
    for name, value in how.items():
        setattr(server, name, value)
    assert run() == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_server_that_went_away(server):
    async def follow() -> None:
        async with Client(server.url, patience=1.0) as client:
            await client.run(GRAPH)

    server.events, server.broken = [], 1000
    with pytest.raises(ServerGone, match="answered HTTP 502"):
        asyncio.run(follow())


SECRET = "s3cret pass&word"


@pytest.mark.parametrize("by", ["bearer", "query", "user"])
def test_servers_behind_a_login(server, run, tmp_path, capsys, monkeypatch, by):
    host = server.url.removeprefix("http://")
    address, server.login = {
        "bearer": (server.url, f"Bearer {SECRET}"),
        "query": (f"{server.url}/?token={quote(SECRET)}", f"?token={SECRET}"),
        "user": (
            f"http://me:{quote(SECRET)}@{host}",
            "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode(),
        ),
    }[by]
    if by == "bearer":
        monkeypatch.setenv("MY_TOKEN", SECRET)
    given = ["--server", address, "--token-env", "MY_TOKEN"]
    server.outputs = {"2": {"text": ["made"]}}
    assert run(*given) == 0
    assert list(outputs_of(tmp_path).values()) == [b"made"]
    server.login = "another"
    assert run(*given) == 1
    error = capsys.readouterr().err
    assert "HTTP 401: the login given is not taken" in error
    assert run() == 1
    assert "HTTP 401: it wants a login" in capsys.readouterr().err
    server.login, server.refusal = "", (500, f"no {SECRET} nor {quote(SECRET)}")
    assert run(*given) == 4
    error += capsys.readouterr().err
    assert run("--server", address.replace(host, f"127.0.0.1:{free_port()}")) == 3
    error += capsys.readouterr().err
    assert SECRET not in error
    assert quote(SECRET) not in error


@pytest.mark.parametrize(
    "name", ["my photo.png", "fête d’été.png", "图" * 60 + ".png", 'a"b%20.png']
)
def test_names_travel_as_they_are(server, run, tmp_path, name):
    photo = tmp_path / name
    Image.new("RGB", (4, 4)).save(photo, "PNG")
    server.files = {name: b"one"}
    server.outputs = {"2": {"images": [{"filename": name}]}}
    assert run("--image", photo) == 0
    assert server.asked[0][1][0] == name.replace('"', "_")
    assert list(outputs_of(tmp_path)) == [name.replace('"', "_")]


def test_out_is_looked_at_first(server, run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert run("--out", out) == 1
        assert "file is no folder; name another" in capsys.readouterr().err
    assert server.asked == []


def test_runs_at_once_into_one_folder_overwrite_nothing(tmp_path):
    def save(worker: int) -> list[Path]:
        return [save_new(tmp_path / "x.png", f"{worker} {n}".encode()) for n in range(20)]

    with ThreadPoolExecutor(4) as pool:
        paths = [path for found in pool.map(save, range(4)) for path in found]
    assert len(set(paths)) == 80
    assert len({path.read_bytes() for path in paths}) == 80
    assert len(list(tmp_path.iterdir())) == 80


def test_values_are_of_the_type_that_the_node_declares(server, run):
    server.info = {
        "SaveImage": {"input": {"required": {"images": ["BOOLEAN", {}]}, "optional": None}},
        "LoadImage": {"input": {"required": {"image": [["a.png", 12, True]]}}},
    }
    assert run("--set", "SaveImage.images=False", "--set", "LoadImage.image=12") == 0
    graph = server.asked[-1][1]
    assert graph["2"]["inputs"]["images"] is False
    assert graph["1"]["inputs"]["image"] == 12


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_interrupt_the_prompt(server, tmp_path, number):
    server.events, server.lost = [], True
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    command = [sys.executable, "-m", "hywu_core.cli", "comfy", "run", str(tmp_path / "graph.json")]
    with subprocess.Popen([*command, "--server", server.url], stderr=subprocess.PIPE) as running:
        while not server.prompt:
            time.sleep(0.05)
        time.sleep(0.3)
        running.send_signal(number)
        assert running.wait(30) == 130
    assert server.commands() == INTERRUPTED


NODE_ERRORS = {
    "2": {
        "class_type": "SaveImage",
        "errors": [
            {"message": "Required input is missing", "details": "images",
             "extra_info": {"input_name": "images"}},
            {"message": "Value too small"},
        ],
    }
}  # fmt: skip
SAID = (
    "node 2 (SaveImage), input images: Required input is missing (images); "
    "node 2 (SaveImage): Value too small."
)


def test_a_refused_workflow_names_nodes_and_inputs(server, run, capsys):
    server.refusal = (400, {"error": {"message": "invalid prompt"}, "node_errors": NODE_ERRORS})
    assert run() == 4
    assert SAID in capsys.readouterr().err
    server.refusal = (400, {"error": "no_prompt", "node_errors": {}})
    assert run() == 4
    assert "refused the workflow: no_prompt." in capsys.readouterr().err
    server.refusal = (502, "<html>proxy</html>")
    assert run() == 4
    assert "<html>proxy</html>" in capsys.readouterr().err
    assert server.commands() == []


def test_a_workflow_that_would_run_in_part_is_taken_back(server, run, capsys):
    server.node_errors = NODE_ERRORS
    assert run() == 4
    assert f"A part of the workflow is not valid: {SAID}" in capsys.readouterr().err
    assert server.commands() == INTERRUPTED


def test_what_takes_too_long_is_interrupted(server):
    server.events, server.lost = [], True
    with pytest.raises(TimedOut, match=r"longer than 0\.2 s .*--timeout"):
        run_sync(server.url, GRAPH, timeout=0.2)
    assert server.commands() == INTERRUPTED


def test_cancelling_interrupts_the_prompt(server):
    server.events, server.lost = [], True

    async def cancel() -> None:
        async with Client(server.url) as client:
            task = asyncio.create_task(client.run(GRAPH))
            while not server.prompt:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    assert server.commands() == INTERRUPTED


def test_what_the_server_cannot_do_is_said(server, run, tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert run("--image", tmp_path / "none.png") == 1
    assert "none.png: there is no such image" in capsys.readouterr().err
    server.upload_status = 500
    assert run("--image", tmp_path / "a.png") == 1
    assert "/upload/image answered HTTP 500: the disk is full." in capsys.readouterr().err
    server.outputs = {"2": {"images": [{"filename": "gone.png"}]}}
    assert run() == 1
    assert "The output gone.png can't be fetched: HTTP 404." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_free_asks_for_both(server):
    async def free() -> None:
        async with Client(server.url) as client:
            await client.free()

    asyncio.run(free())
    assert server.commands() == [["free", {"unload_models": True, "free_memory": True}]]


@pytest.mark.parametrize(
    "answer",
    [{}, [], {"name": 3}, {"name": {}}, {"name": "a.png", "subfolder": {"a": 1}}, {"name": "a.png", "subfolder": [1]}],
)  # fmt: skip
def test_an_upload_whose_name_the_server_does_not_say(server, run, tmp_path, capsys, answer):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    server.upload_answer = answer
    assert run("--image", tmp_path / "a.png") == 1
    assert "doesn't say the name of the uploaded image" in capsys.readouterr().err
    assert not server.prompt


def test_nobody_there(tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServerGone, match=r"can't be reached or went away"):
        run_sync(url, GRAPH)

    async def upload() -> None:
        async with Client(url) as client:
            await client.upload(tmp_path / "a.png")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ServerGone, match=f"No ComfyUI answers at {url}.*--server"):
        asyncio.run(upload())
    assert issubclass(ServerGone, ServerError)
    assert issubclass(ServerError, HYWUError)
