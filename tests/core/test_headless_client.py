"""`hywu comfy run` against a server that speaks ComfyUI's protocol as told: what a real one rarely does.

The answers have the form of ComfyUI's own; tests/host has a real server.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable

import pytest
from PIL import Image

from hywu_core.cli import main
from hywu_core.errors import HYWUError
from hywu_core.headless.client import Client, ServerError, ServerGone, TimedOut, run_sync
from hywu_core.headless.local import free_port

aiohttp = pytest.importorskip("aiohttp", reason="the client needs the `headless` extra")
web = pytest.importorskip("aiohttp.web", reason="comes with aiohttp")

GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}},
}
#: Events after which a prompt is done, "PROMPT" standing for its id.
DONE = [("execution_success", {"prompt_id": "PROMPT"})]


class FakeComfyUI:
    """A server in a thread of its own; the attributes say what it answers, `asked` what it was asked."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = DONE
        self.closes = False
        self.refusal: tuple[int, object] | None = None
        self.node_errors: dict = {}
        self.outputs: dict = {}
        self.files: dict[str, bytes] = {}
        self.late = 0
        self.upload_status = 200
        self.asked: list[tuple[str, object]] = []
        self._prompt = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> FakeComfyUI:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    async def _serve(self) -> None:
        self._loop, self._stop, self._queued = (
            asyncio.get_running_loop(), asyncio.Event(), asyncio.Event(),
        )  # fmt: skip
        app = web.Application()
        app.add_routes([
            web.get("/ws", self._ws), web.post("/prompt", self._queue),
            web.get("/history/{id}", self._history), web.get("/view", self._view),
            web.post("/upload/image", self._upload), web.post("/{command}", self._command),
        ])  # fmt: skip
        runner = web.AppRunner(app, shutdown_timeout=1)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{port}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _ws(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_json({"type": "status", "data": {"sid": "x"}})
        await self._queued.wait()
        await socket.send_bytes(b"\x00\x00\x00\x01a preview")
        for kind, data in self.events if self.refusal is None else ():
            text = json.dumps({"type": kind, "data": data}).replace("PROMPT", self._prompt)
            await socket.send_str(text)
        if not self.closes:
            await socket.receive()
        return socket

    async def _queue(self, request):
        body = await request.json()
        self.asked.append(("prompt", body["prompt"]))
        self._queued.set()
        if self.refusal is not None:
            status, answer = self.refusal
            text = answer if isinstance(answer, str) else json.dumps(answer)
            return web.Response(status=status, text=text)
        self._prompt = body["prompt_id"]
        return web.json_response({"prompt_id": self._prompt, "node_errors": self.node_errors})

    async def _history(self, request):
        self.late -= 1
        record = {"outputs": self.outputs, "status": {"status_str": "success"}}
        return web.json_response({} if self.late >= 0 else {request.match_info["id"]: record})

    async def _view(self, request):
        name = request.query["filename"]
        if name not in self.files:
            return web.Response(status=404)
        return web.Response(body=self.files[name])

    async def _upload(self, request):
        field = await (await request.multipart()).next()
        self.asked.append(("upload", (field.filename, bytes(await field.read()))))
        if self.upload_status != 200:
            return web.Response(status=self.upload_status, text="the disk is full")
        return web.json_response({"name": field.filename, "subfolder": "sub", "type": "input"})

    async def _command(self, request):
        self.asked.append((request.match_info["command"], await request.json()))
        return web.Response()

    def commands(self) -> list[tuple[str, object]]:
        """What it was asked beside prompts and uploads, the prompt's id written PROMPT."""
        known = [(name, body) for name, body in self.asked if name not in ("prompt", "upload")]
        return json.loads(json.dumps(known).replace(self._prompt or "PROMPT", "PROMPT"))


#: What the client does to end a prompt wherever it is.
INTERRUPTED = [["queue", {"delete": ["PROMPT"]}], ["interrupt", {"prompt_id": "PROMPT"}]]


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
    seen = []

    async def follow() -> dict:
        async with Client(server.url + "/") as client:
            return await client.run(GRAPH, lambda *args: seen.append(args))

    assert asyncio.run(follow())["status"] == {"status_str": "success"}
    assert seen == [("2", 3, 8)]


FAILED = {
    "prompt_id": "PROMPT", "node_id": "2", "node_type": "SaveImage",
    "exception_type": "torch.OutOfMemoryError", "exception_message": "no memory\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("event", "code", "words"),
    [
        (("execution_error", FAILED), 5, "Node 2 (SaveImage) failed with OutOfMemoryError: no mem"),
        (("execution_interrupted", {"prompt_id": "PROMPT", "node_id": "1"}), 6, "at node 1"),
        (None, 3, "closed the connection before the prompt ended"),
    ],
)
def test_how_a_prompt_may_end(server, run, tmp_path, capsys, event, code, words):
    server.events, server.closes = [event] if event else [], True
    assert run() == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


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
    server.events = []
    with pytest.raises(TimedOut, match=r"longer than 0\.2 s .*--timeout"):
        run_sync(server.url, GRAPH, timeout=0.2)
    assert server.commands() == INTERRUPTED


def test_cancelling_interrupts_the_prompt(server):
    server.events = []

    async def cancel() -> None:
        async with Client(server.url) as client:
            task = asyncio.create_task(client.run(GRAPH))
            while not server._prompt:
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
