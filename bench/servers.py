"""`hywu comfy batch` over several local ComfyUI servers: its throughput, and what faults cost.

alone     each server by itself, one after another: images per second
together  all of them: images per second, as a share of the sum of alone
faults    many images, the client killed twice, a server killed and started anew: every result once, what was
          made twice, memory of client and servers

The prompts wait as for a device (`--seconds`) and invert the image, so the servers' cores do the transport only.
Runs of the first two count from the first result to the last.

With --edits they are edits by the bundled editor in place of these three, and the servers share this machine's
cores: one server alone has what three together have, and three times its rate is no measure. So

full      every server has its prompts in its queue beforehand, and nobody is there but the servers: what they make
          at most at the same time
batch     the same images by `hywu comfy batch`

take turns, each with the CPU seconds per image of servers and client; every server computes in one thread.

python3 dev.py bench servers [--servers 3] [--count 200] [--seconds 0.5] [--json FILE]
python3 dev.py bench servers --edits [--each 10] [--rounds 3] [--side 512]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from PIL import Image

import dev
from hywu_core.headless.client import Client, new_id
from hywu_core.headless.graph import Graph, read_graph
from hywu_core.headless.local import LocalServer

from .measure import show_json

#: Shares of the run with faults at which the memory is looked at; at the first the dead server is started again.
WATCHED = (0.65, 0.75, 0.85, 0.95)
#: A node that waits as for a device and writes the image's first pixel down, by which images are told apart.
PACK = """
import time
class HYWUBenchWait:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "run", "bench"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "seconds": ("FLOAT", {"default": 0.5}), "log": ("STRING",)}}
    def run(self, image, seconds, log):
        time.sleep(seconds)
        with open(log, "a") as file:
            file.write(" ".join(str(round(float(v) * 255)) for v in image[0, 0, 0]) + chr(10))
        return (1 - image,)
NODE_CLASS_MAPPINGS = {"HYWUBenchWait": HYWUBenchWait}
"""


def waiting(seconds: float, log: Path) -> Graph:
    """A workflow whose prompts wait."""
    inputs = {"image": ["load", 0], "seconds": seconds, "log": str(log)}
    return {
        "load": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "wait": {"class_type": "HYWUBenchWait", "inputs": inputs},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["wait", 0], "filename_prefix": "made"}},
    }  # fmt: skip


def editing(log: Path) -> Graph:
    """The shipped edit by the bundled editor, whose results are counted before they are saved."""
    graph = read_graph(dev.ROOT / "workflows" / "api" / "edit_bundled.json")
    save = next(node for node in graph.values() if node["class_type"] == "SaveImage")
    inputs = {"image": save["inputs"]["images"], "seconds": 0, "log": str(log)}
    graph["made"] = {"class_type": "HYWUBenchWait", "inputs": inputs}
    save["inputs"]["images"] = ["made", 0]
    return graph


class Bench:
    """Servers and images in a folder of their own.

    seconds: that a prompt waits; None for edits. side: of the images, in pixels.
    """

    def __init__(
        self, folder: Path, servers: int, count: int, seconds: float | None, side: int
    ) -> None:
        self.folder, self.count, self.log = folder, count, folder / "made.txt"
        host = dev.prepare_host()
        self.servers, self.client_cpu = [], {}
        for i in range(servers):
            base = folder / f"server{i}"
            (base / "custom_nodes").mkdir(parents=True)
            (base / "custom_nodes" / "wait.py").write_text(PACK)
            make = LocalServer(host.python, host.tree, base)
            self.servers.append(make if seconds is not None else dev.server_of(host, base))
        self.log.touch()
        self.sources = folder / "sources"
        self.sources.mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)
            pixels[0, 0] = i // 256, i % 256, 7
            Image.fromarray(pixels).save(self.sources / f"image{i:04}.png")
        self.graph = editing(self.log) if seconds is None else waiting(seconds, self.log)
        self.workflow = folder / "workflow.json"
        self.workflow.write_text(json.dumps(self.graph))

    def client(
        self, out: Path, servers: Sequence[LocalServer], images: Sequence[Path]
    ) -> subprocess.Popen[bytes]:
        given = [word for server in servers for word in ("--server", server.url)]
        command = [sys.executable, "-m", "hywu_core.cli", "comfy", "batch", *map(str, images)]
        command += ["--workflow", str(self.workflow), *given, "--out", str(out)]
        environment = os.environ | {"PYTHONPATH": str(dev.ROOT)}
        with (self.folder / "client.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def rate(self, name: str, servers: Sequence[LocalServer], count: int) -> float:
        """Images per second of a run over some servers, from the first result to the last; notes the client's CPU
        seconds per image between the two.
        """
        out, images = self.folder / name, sorted(self.sources.iterdir())[:count]
        before = len(self.log.read_text().splitlines())
        client = self.client(out, servers, images)
        seen: list[float] = []
        cpu: list[float] = []
        while client.poll() is None:
            made = len(self.log.read_text().splitlines()) - before
            if made > len(seen):
                with contextlib.suppress(psutil.Error):
                    cpu += [cpu_of(client.pid)] * (made - len(seen))
            seen += [time.monotonic()] * (made - len(seen))
            time.sleep(0.01)
        if client.returncode or len(seen) != count:
            raise SystemExit(f"{name}: exit code {client.returncode}, {len(seen)} of {count} made")
        # the first prompt of each server has no predecessor
        self.client_cpu[name] = round((cpu[-1] - cpu[len(servers) - 1]) / (count - len(servers)), 4)
        return (count - len(servers)) / (seen[-1] - seen[len(servers) - 1])

    def throughput(self, each: int) -> dict[str, Any]:
        alone = [self.rate(f"alone{i}", [s], each) for i, s in enumerate(self.servers)]
        together = self.rate("together", self.servers, each * len(self.servers))
        figures = {"alone": alone, "together": together, "of_the_sum": together / sum(alone)}
        return figures | {"client_cpu_seconds_per_image": self.client_cpu}

    def edits(self, each: int, rounds: int) -> dict[str, Any]:
        """Full queues and `hywu comfy batch` in turns: images per second, and CPU seconds per image."""
        self.full(2)  # loads the models
        turns: list[dict[str, Any]] = []
        for turn in range(rounds):
            full, full_cpu = self.full(each)
            busy = self._cpu()
            batch = self.rate(f"batch{turn}", self.servers, each * len(self.servers))
            cpu = (self._cpu() - busy) / (each * len(self.servers))
            client = self.client_cpu[f"batch{turn}"]
            turns.append({
                "full": full, "batch": batch, "of_full": batch / full, "full_cpu": full_cpu, "batch_cpu": cpu,
                "client_cpu": client, "of_full_by_cpu": full_cpu / (cpu + client),
            })  # fmt: skip
        return {"turns": turns, **{k: median(t[k] for t in turns) for k in turns[0]}}

    def full(self, each: int) -> tuple[float, float]:
        """Images per second of servers whose queues are full from the start, and their CPU seconds per image."""
        images, busy = sorted(self.sources.iterdir()), self._cpu()
        before, count = len(self.log.read_text().splitlines()), each * len(self.servers)
        asyncio.run(self._fill(images[:count]))
        seen: list[float] = []
        while len(seen) < count:
            made = len(self.log.read_text().splitlines()) - before
            seen += [time.monotonic()] * (made - len(seen))
            time.sleep(0.01)
        rate = (count - len(self.servers)) / (seen[-1] - seen[len(self.servers) - 1])
        return rate, (self._cpu() - busy) / count

    async def _fill(self, images: Sequence[Path]) -> None:
        """Upload all, then queue all, one server after the other for each image."""
        load = next(key for key, node in self.graph.items() if node["class_type"] == "LoadImage")
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(s.url)) for s in self.servers]
            named = []
            for i, image in enumerate(images):
                client = clients[i % len(clients)]
                data = image.read_bytes()
                named.append((client, await client.upload_temporary(f"{new_id()}.png", data)))
            for client, name in named:
                graph = copy.deepcopy(self.graph)
                graph[load]["inputs"]["image"] = name
                await client.queue(graph)

    def _cpu(self) -> float:
        """Seconds of all servers."""
        return sum(cpu_of(server.process.pid) for server in self.servers)

    def faults(self) -> dict[str, Any]:
        """Kill the client at 20 % and 45 %, a server at 55 %, which comes back; check every result."""
        out, images = self.folder / "faults", sorted(self.sources.iterdir())
        before, started, resident = len(self.log.read_text().splitlines()), time.monotonic(), []

        def done() -> int:
            file = out / "results.jsonl"
            return file.read_bytes().count(b"\n") if file.exists() else 0

        def until(share: float, client: subprocess.Popen[bytes]) -> None:
            while done() < share * self.count:
                if client.poll() is not None:
                    raise SystemExit(f"the client ended ({client.returncode}) at {done()} results")
                time.sleep(0.02)

        for share in (0.2, 0.45):
            client = self.client(out, self.servers, images)
            until(share, client)
            client.kill()
            client.wait()
        client = self.client(out, self.servers, images)
        until(0.55, client)
        dead = self.servers[0]
        dead.process.kill()
        dead.process.wait()
        for share in WATCHED:
            until(share, client)
            with contextlib.suppress(psutil.Error):
                resident.append(self._resident(client))
            if share == WATCHED[0]:
                dead.start()
        code = client.wait()
        made = Counter(self.log.read_text().splitlines()[before:])
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        servers = Counter(row["server"] for row in rows)
        return {
            "exit_code": code, "results": len(rows), "wrong": self._wrong(out, rows, images),
            "made_twice": sum(made.values()) - len(made), "images_made": len(made),
            "per_server": [servers[s.url] for s in self.servers],
            "seconds": round(time.monotonic() - started, 1), "mib": dict(zip(WATCHED, resident, strict=False)),
        }  # fmt: skip

    def _wrong(self, out: Path, rows: list[dict[str, Any]], images: Sequence[Path]) -> list[str]:
        """Names of images without exactly one line and one file with its own edit."""
        lines, wrong = Counter(row["name"] for row in rows), []
        for image in images:
            result = out / f"{image.stem}.png"
            right = lines[image.stem] == 1 and result.is_file()
            if right:
                source, edit = (np.asarray(Image.open(p)).astype(int) for p in (image, result))
                right = bool(np.abs(source + edit - 255).max() <= 1)
            wrong += [] if right else [image.stem]
        others = {p.stem for p in out.glob("*.png")} | set(lines)
        return wrong + sorted(others - {image.stem for image in images})

    def _resident(self, client: subprocess.Popen[bytes]) -> list[int]:
        """MiB of the client and of each server that has run all the time."""
        pids = [client.pid, *(s.process.pid for s in self.servers[1:])]
        return [psutil.Process(pid).memory_info().rss >> 20 for pid in pids]


def cpu_of(pid: int) -> float:
    """Seconds that a process has computed."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument(
        "--count", type=int, default=200, help="images of the run with faults; 0 leaves it out"
    )
    parser.add_argument("--each", type=int, default=30, help="images per server of the others")
    parser.add_argument("--seconds", type=float, default=0.5, help="that a prompt waits")
    parser.add_argument("--side", type=int, default=256, help="pixels of the images")
    parser.add_argument("--edits", action="store_true", help="by the bundled editor")
    parser.add_argument("--rounds", type=int, default=3, help="of --edits")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.edits:
        os.environ["OMP_NUM_THREADS"] = "1"  # the servers'
        args.count, args.seconds = 0, None
    count = max(args.count, args.each * args.servers)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bench = Bench(Path(folder), args.servers, count, args.seconds, args.side)
        for server in bench.servers:
            stack.callback(server.stop)
            server.start()
        figures = {**vars(args), "json": None, "cores": os.cpu_count()}
        if args.edits:
            figures |= {"edits": bench.edits(args.each, args.rounds)}
        else:
            figures |= {"throughput": bench.throughput(args.each)}
            figures |= {"faults": bench.faults()} if args.count else {}
    show_json(args.json, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
