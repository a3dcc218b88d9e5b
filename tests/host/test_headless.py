"""`hywu comfy run` against a real server, with stock nodes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from proxy import Proxy

from hywu_core.cli import main
from hywu_core.headless.client import (
    Cleared,
    Client,
    Interrupted,
    Removed,
    Restarted,
    ServerError,
    TimedOut,
    run_sync,
)
from hywu_core.headless.local import LocalServer, free_port, get_json

INVERT = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "missing.png"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "inverted"}},
}


def slow_graph(steps: int = 300) -> dict:
    """Many blurs of a large image: a tenth of a second each on a fast machine, a node each, so that it can be
    interrupted.
    """
    graph: dict = {
        "0": {"class_type": "EmptyImage", "inputs": {
            "width": 1024, "height": 1024, "batch_size": 1, "color": time.time_ns() % 2**24}}
    }  # fmt: skip
    for step in range(1, steps + 1):
        graph[str(step)] = {"class_type": "ImageBlur", "inputs": {
            "image": [str(step - 1), 0], "blur_radius": 15, "sigma": 5.0}}  # fmt: skip
    graph["end"] = {"class_type": "PreviewImage", "inputs": {"images": [str(steps), 0]}}
    return graph


@pytest.fixture
def workflow(tmp_path):
    path = tmp_path / "invert.json"
    path.write_text(json.dumps(INVERT))
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (16, 8), (10, 20, 30)).save(path)
    return path


def command(server, workflow, out, *more) -> int:
    url = getattr(server, "url", server)
    return main(
        ["comfy", "run", str(workflow), "--server", url, "--out", str(out), *map(str, more)]
    )


def test_uploads_runs_and_downloads(server, workflow, photo, tmp_path):
    assert command(server, workflow, tmp_path / "out", "--image", photo) == 0
    (result,) = (tmp_path / "out").glob("*.png")
    assert Image.open(result).getpixel((3, 3)) == (245, 235, 225)


def test_set_changes_an_input(server, workflow, photo, tmp_path):
    out = tmp_path / "out"
    prefix = "SaveImage.filename_prefix=other"
    assert command(server, workflow, out, "--image", photo, "--set", prefix) == 0
    assert [path.name.startswith("other") for path in out.iterdir()] == [True]


def test_validation_names_node_and_input(server, workflow, tmp_path, capsys):
    assert command(server, workflow, tmp_path / "out") == 4
    assert "node 1 (LoadImage), input image" in capsys.readouterr().err


def test_a_partly_valid_workflow_is_refused(server, tmp_path, photo, capsys):
    bad = {"4": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    path = tmp_path / "partly.json"
    path.write_text(json.dumps({**INVERT, **bad}))
    assert command(server, path, tmp_path / "out", "--image", photo) == 4
    error = capsys.readouterr().err
    assert "node 4 (SaveImage), input images" in error
    assert not (tmp_path / "out").exists()


def test_a_failing_node_is_one_sentence(server, tmp_path, photo, capsys):
    graph = {
        **INVERT,
        "5": {"class_type": "EmptyLatentImage", "inputs": {
            "width": 64, "height": 64, "batch_size": 1}},
        "6": {"class_type": "SaveLatent", "inputs": {
            "samples": ["5", 0], "filename_prefix": "../../escape"}},
    }  # fmt: skip
    path = tmp_path / "fails.json"
    path.write_text(json.dumps(graph))
    assert command(server, path, tmp_path / "out", "--image", photo) == 5
    assert "Node 6 (SaveLatent) failed" in capsys.readouterr().err


def test_no_server_says_so(workflow, photo, tmp_path, capsys):
    url = f"http://127.0.0.1:{free_port()}"
    assert command(url, workflow, tmp_path / "out", "--image", photo) == 3
    assert url in capsys.readouterr().err


def test_timeout_interrupts_and_the_server_goes_on(server):
    with pytest.raises(TimedOut, match="--timeout"):
        run_sync(server.url, slow_graph(), timeout=1.0)
    quick = {"1": {"class_type": "EmptyImage", "inputs": {
        "width": 8, "height": 8, "batch_size": 1, "color": 1}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}  # fmt: skip
    record, _ = run_sync(server.url, quick, timeout=60)
    assert record["status"]["status_str"] == "success"


def test_cancelling_interrupts_on_the_server(server):
    async def cancel() -> None:
        async with Client(server.url) as client:
            task = asyncio.create_task(client.run(slow_graph()))
            await asyncio.sleep(1.0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(cancel())
    deadline = time.monotonic() + 30
    while get_json(f"{server.url}/queue")["queue_running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert get_json(f"{server.url}/queue") == {"queue_running": [], "queue_pending": []}


def test_somebody_else_interrupts(server):
    async def interrupted() -> None:
        async with Client(server.url) as client, Client(server.url) as other:
            task = asyncio.create_task(client.run(slow_graph()))
            await asyncio.sleep(1.0)
            await other.call("POST", "/interrupt", json={})
            await task

    with pytest.raises(Interrupted, match="interrupted at node"):
        asyncio.run(interrupted())


def test_server_that_dies_is_reported(comfyui, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(Client.__init__.__kwdefaults__, "patience", 4.0)
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(slow_graph()))
    with LocalServer(comfyui.python, comfyui.tree, tmp_path / "base") as dying:
        killer = threading.Timer(2.0, dying.process.kill)
        killer.start()
        assert command(dying, path, tmp_path / "out") == 3
        killer.join()
    assert dying.url in capsys.readouterr().err


@pytest.mark.parametrize("socket", ["drop", "mute"])
def test_a_proxy_that_drops_or_mutes_the_websocket_costs_no_result(server, tmp_path, socket):
    path = tmp_path / "slow.json"
    steps = 12  # outlasts the half second after which the proxy begins
    graph = slow_graph(steps)
    graph["kept"] = {"class_type": "SaveImage", "inputs": {
        "images": [str(steps), 0], "filename_prefix": "kept"}}  # fmt: skip
    path.write_text(json.dumps(graph))
    with Proxy(server.url, prefix="/comfy", socket=socket) as proxy:
        assert command(proxy, path, tmp_path / "out") == 0
        assert proxy.sockets > (1 if socket == "drop" else 0)
    assert [file.name.startswith("kept") for file in (tmp_path / "out").iterdir()].count(True) == 1


def test_a_server_behind_a_token(server, workflow, photo, tmp_path, capsys, monkeypatch):
    with Proxy(server.url, token="s3cret token") as proxy:
        assert command(proxy, workflow, tmp_path / "out", "--image", photo) == 1
        assert "HTTP 401: it wants a login" in capsys.readouterr().err
        monkeypatch.setenv("COMFY_TOKEN", "s3cret token")
        assert command(proxy, workflow, tmp_path / "out", "--image", photo) == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


async def _behind(server, act) -> None:
    """Run a prompt that waits behind a long one; act: (client, its id) -> awaited while it waits."""
    async with Client(server.url) as first, Client(server.url) as second:
        running = asyncio.create_task(first.run(slow_graph()))
        await asyncio.sleep(1.0)
        waiting = asyncio.create_task(second.run(slow_graph()))
        await asyncio.sleep(1.0)
        try:
            await act(first)
            await asyncio.wait_for(waiting, 120)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


def test_a_prompt_that_is_removed_from_the_queue(server):
    async def remove(client: Client) -> None:
        deadline = time.monotonic() + 60
        while not (pending := (await client.json("GET", "/queue"))["queue_pending"]):
            assert time.monotonic() < deadline, (
                "the second prompt was never queued behind the first"
            )
            await asyncio.sleep(0.2)
        await client.call("POST", "/queue", json={"delete": [row[1] for row in pending]})

    with pytest.raises(Removed, match="removed from the queue"):
        asyncio.run(_behind(server, remove))


def test_a_record_that_is_cleared_before_it_is_fetched(server, monkeypatch):
    """Somebody clears the history whenever the client is about to look."""
    whole = Client.history

    async def cleared(client: Client, prompt: str) -> dict:
        # a record that is put between the clearing and the look is cleared as well
        while record := await whole(client, prompt):
            await client.call("POST", "/history", json={"clear": True})
        return record

    monkeypatch.setattr(Client, "history", cleared)
    with pytest.raises(Cleared, match="record of it was cleared"):
        run_sync(server.url, slow_graph(4))


def test_a_server_that_starts_anew(comfyui, tmp_path):
    port, ended = free_port(), []

    async def follow() -> None:
        async with Client(f"http://127.0.0.1:{port}", patience=240) as client:
            await client.run(slow_graph())

    def run() -> None:
        try:
            asyncio.run(follow())
        except ServerError as error:
            ended.append(error)

    options = {"port": port}
    with LocalServer(comfyui.python, comfyui.tree, tmp_path / "base", **options) as one:
        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(3.0)
        one.process.kill()
        one.process.wait(10)
        with LocalServer(comfyui.python, comfyui.tree, tmp_path / "base", **options):
            thread.join(60)
    assert [type(error) for error in ended] == [Restarted]


def test_the_commands_of_the_docs_edit_the_photograph(server, photo, tmp_path):
    """docs/headless.md's curl, with a name that another photograph on the server has."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    root = Path(__file__).parents[2]
    text = (root / "docs" / "headless.md").read_text(encoding="utf-8")
    script = text.partition("## curl")[2].partition("```bash\n")[2].partition("```")[0]
    script = script.replace("http://127.0.0.1:8188", server.url)
    script = script.replace("workflows/api/edit_bundled.json", str(tmp_path / "graph.json"))
    (tmp_path / "graph.json").write_text(json.dumps(INVERT))
    assert command(server, tmp_path / "graph.json", tmp_path / "out", "--image", photo) == 0
    Image.new("RGB", (16, 8), (200, 100, 50)).save(photo)
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = Image.open(tmp_path / "out.png").getpixel((3, 3))
    # ComfyUI cuts digits off where others round
    assert max(abs(a - b) for a, b in zip(found, (55, 155, 205), strict=True)) <= 1
