"""A long run of one real ComfyUI server: prompts, interruptions, files exchanged under it, hostile texts.

  python dev.py soak            or, where there is a ComfyUI,  python tests/helpers/soak.py --prompts 300

Every prompt that wasn't interrupted must give the images that a fresh server gives for it from files that
nobody exchanged; memory and open files stay flat; the queue is empty at the end; the log has no traceback
beside those that ComfyUI writes of a node's own error. Exit code 1 where one of these isn't so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import edit_graph as g  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from random_weights import make_random  # noqa: E402

import dev  # noqa: E402
from hywu_core.bases.bundled.checkpoint import VARIABLE, bundled  # noqa: E402
from hywu_core.files import read_tensors  # noqa: E402
from hywu_core.formats import load_lora  # noqa: E402
from hywu_core.generator.checkpoints import load_generator, save_generator  # noqa: E402
from hywu_core.headless.client import Client, Interrupted, NodeFailed, Refused  # noqa: E402
from hywu_core.headless.local import LocalServer  # noqa: E402
from hywu_core.headless.trouble import Removed  # noqa: E402

#: MiB and open files by which the server may grow after the first fifth of the prompts.
MEMORY, FILES = 160, 12
HALF = "half \ud83d pair"
TEXTS = (
    "blur the image", "make it older", "改变 🎨 \u202e ñ", HALF, "x" * 10_000, "(a:1.5) {b|c}", "a\x00b\x1b[31m",
    "'; DROP TABLE lora; --", "${jndi:ldap://x}", "<img src=x onerror=alert(1)>", "\u2028 \u0085 \ufeff end",
)  # fmt: skip
#: Node, its hostile inputs, and others it needs.
HOSTILE = (
    ("HYWULoRAScope", {"module_strengths": HALF}, {"start_percent": 0.0, "end_percent": 1.0}),
    ("HYWULoRAScope", {"module_strengths": "[" * 5000}, {"start_percent": 0.0, "end_percent": 1.0}),
    ("HYWUSaveLoRA", {"filename_prefix": HALF}, {"lora": ["generate", 0], "format": "native"}),
    ("HYWUSaveLoRA", {"filename_prefix": "../../out"}, {"lora": ["generate", 0], "format": "PEFT"}),
    ("HYWUSaveLoRA", {"filename_prefix": "n" * 4000}, {"lora": ["generate", 0], "format": "ComfyUI"}),
    ("HYWUSaveCondition", {"filename_prefix": "nul\x00l"}, {"condition": ["encode", 0]}),
    ("HYWUBenchmarkItems", {"path": "/etc/passwd"}, {"benchmark": "folder", "tasks": "", "index": 0, "count": 1}),
    ("HYWUBenchmarkItems", {"tasks": HALF}, {"benchmark": "folder", "path": "samples", "index": 0, "count": 1}),
    ("HYWULoadLoRA", {"lora": f"{HALF}.safetensors"}, {}),
    ("HYWULoadGenerator", {"checkpoint": "../../../etc/passwd"}, {"precision": "auto"}),
)  # fmt: skip
SWAPPED = "soak-swapped.safetensors"
#: Version -> the name of a file of it that stays as it is.
KEPT = {"a": "soak-a.safetensors", "b": "soak-b.safetensors"}


@dataclass(frozen=True)
class Edit:
    """What an image depends on. how: the LoRA generated, from a file, by the stock loader, or none."""

    how: str
    text: str
    generator: str
    lora: str

    def graph(self, kept: bool) -> dict[str, dict]:
        """kept: from the files that stay, else from those that are exchanged."""
        graph = g.edit_graph(self.text)
        graph["generator"]["inputs"]["checkpoint"] = KEPT[self.generator] if kept else SWAPPED
        if self.how == "generated":
            return graph
        for name in ("generator", "encode", "generate"):
            del graph[name]
        lora = KEPT[self.lora] if kept else SWAPPED
        if self.how == "file":
            graph["load"] = g.node("HYWULoadLoRA", lora=lora)
            graph["apply"]["inputs"]["lora"] = ["load", 0]
        elif self.how == "stock":
            graph["apply"] = g.node(
                "LoraLoaderModelOnly", model=["editor", 0], lora_name=lora, strength_model=1.0
            )
        else:
            del graph["apply"]
            graph["sample"]["inputs"]["model"] = ["editor", 0]
        return graph


@dataclass
class Soak:
    """prompts, interruptions: how many; seed: of everything that is drawn; swaps: share of the prompts after
    which a file is exchanged; memory: MiB by which the server may grow.
    """

    server: LocalServer
    prompts: int
    interruptions: int
    seed: int = 0
    swaps: float = 0.15
    memory: int = MEMORY
    counts: Counter = field(default_factory=Counter)
    made: list[tuple[Edit, torch.Tensor]] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.process = psutil.Process(self.server.process.pid)
        self.folders = {
            "generator": self.server.base / "models" / "hywu",
            "lora": self.server.base / "models" / "loras",
        }
        self.now = {"generator": "a", "lora": "a"}
        self.log_begins = self.server.log.stat().st_size

    # -- the files -----------------------------------------------------------------------------------

    def swap(self, what: str, version: str) -> None:
        """Another file under the same name: as a whole, or copied over the old one; its times kept or not."""
        folder = self.folders[what]
        source, target = folder / KEPT[version], folder / SWAPPED
        times = target.stat() if target.exists() else None
        if self.rng.random() < 0.5 or times is None:
            part = folder / "soak.part"
            shutil.copyfile(source, part)
            os.replace(part, target)
        else:
            shutil.copyfile(source, target)
        if times and self.rng.random() < 0.5:
            os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
            self.counts["swapped with times kept"] += 1
        self.now[what] = version
        self.counts[f"{what} swapped"] += 1

    # -- the prompts ---------------------------------------------------------------------------------

    def edit(self, number: int) -> Edit:
        how = self.rng.choice(("generated", "generated", "generated", "file", "stock", "plain"))
        text = self.rng.choice((*TEXTS, f"request {number}", f"another one, {number}"))
        return Edit(how, text, self.now["generator"], self.now["lora"])

    async def one(self, client: Client, edit: Edit) -> None:
        record = await client.run(edit.graph(kept=False))
        self.made.append((edit, g.images(self.server, record["outputs"])))
        self.counts["finished"] += 1

    async def hostile(self, client: Client) -> None:
        """A node that gets what it can't use, beside a whole edit; what it says can be encoded."""
        kind, bad, more = self.rng.choice(HOSTILE)
        graph = g.edit_graph(hostile=g.node(kind, **more, **bad))
        for name in ("generator", "encode", "generate"):
            graph[name]["inputs"] |= {"checkpoint": SWAPPED} if name == "generator" else {}
        if kind == "HYWULoRAScope":
            graph["apply"]["inputs"]["scope"] = ["hostile", 0]
        elif kind == "HYWUBenchmarkItems":
            graph["end"] = g.node("PreviewImage", images=["hostile", 0])
        elif kind == "HYWULoadLoRA":
            graph["end"] = g.node("HYWUInspectLoRA", lora=["hostile", 0])
        elif kind == "HYWULoadGenerator":
            graph["encode"]["inputs"]["generator"] = ["hostile", 0]
        try:
            await client.run(graph)
            self.counts["hostile, taken"] += 1
        except (NodeFailed, Refused) as error:
            str(error).encode()
            self.counts["hostile, refused"] += 1

    async def interrupted(self, client: Client) -> None:
        """A prompt stopped in the middle, or taken out of the queue while another one runs."""
        how = self.rng.choice(("sample", "sample", "encode", "removed"))
        graph = g.edit_graph(f"interrupted {self.rng.random()}")
        if how == "encode":
            colour = self.rng.randrange(2**24)
            graph["many"] = g.node(
                "EmptyImage", width=128, height=128, batch_size=512, color=colour
            )
            graph["encode"]["inputs"]["image"] = ["many", 0]
            kept = ("generator", "many", "encode", "generate")
            graph = {name: graph[name] for name in kept}
            graph["end"] = g.node("HYWUInspectLoRA", lora=["generate", 0])
        else:
            graph["sample"]["inputs"]["steps"] = 3000
        sent: list[asyncio.Future] = []
        began = asyncio.Event()
        # the prompt that runs is stopped when the waiting one is gone, or that would begin
        alone = how != "removed"

        def progress(node: str | None, done: int, total: int) -> None:
            began.set()
            if node in (how, "sample") and done < total and alone and not sent:
                request = client.call("POST", "/interrupt", json={})
                sent.append(asyncio.ensure_future(request))

        running = asyncio.ensure_future(client.run(graph, progress))
        if how == "removed":
            # a prompt that is queued behind nothing would run at once
            await asyncio.wait(
                {running, asyncio.ensure_future(began.wait())}, return_when=asyncio.FIRST_COMPLETED
            )
            waiting = await client.queue(g.edit_graph("never to run"))
            await client.call("POST", "/queue", json={"delete": [waiting]})
            alone = True
        try:
            await running
            self.counts["interrupted too late"] += 1
        except (Interrupted, Removed):
            self.counts[f"interrupted, {how}"] += 1
        await asyncio.gather(*sent)
        if how == "removed":
            await asyncio.sleep(0.2)
            assert not await client.history(waiting), "a prompt taken out of the queue ran"

    async def _all(self) -> dict[str, Any]:
        kinds = ["interrupt"] * self.interruptions
        kinds += ["edit"] * (self.prompts - self.interruptions - self.prompts // 8)
        kinds += ["hostile"] * (self.prompts - len(kinds))
        self.rng.shuffle(kinds)
        async with Client(self.server.url, timeout=300) as client:
            together: list[Any] = []
            for number, kind in enumerate(kinds):
                if kind == "edit":
                    together.append(self.one(client, self.edit(number)))
                    if len(together) < 3 and self.rng.random() < 0.4:
                        continue
                waiting, together = together, []
                await asyncio.gather(*waiting)
                if kind == "hostile":
                    await self.hostile(client)
                elif kind == "interrupt":
                    await self.interrupted(client)
                self.marks.append((self.process.memory_info().rss >> 20, self.process.num_fds()))
                if self.rng.random() < self.swaps:
                    what = self.rng.choice(("generator", "lora"))
                    self.swap(what, "b" if self.now[what] == "a" else "a")
            await asyncio.gather(*together)
            return await client.json("GET", "/queue")

    def run(self) -> list[str]:
        """What was wrong, one line each."""
        queue = asyncio.run(self._all())
        wrong = [f"the queue isn't empty: {queue}"] if any(queue.values()) else []
        early, end = self.marks[len(self.marks) // 5], self.marks[-1]
        for name, limit, a, b in zip(
            ("MiB of memory", "open files"), (self.memory, FILES), early, end, strict=True
        ):
            self.counts[f"{name}, early"], self.counts[f"{name}, at the end"] = a, b
            wrong += [f"{name}: {a} early, {b} at the end"] if b - a > limit else []
        return wrong + self.unexpected()

    def unexpected(self) -> list[str]:
        """Tracebacks in the log that aren't of a node's own error."""
        text = self.server.log.read_bytes()[self.log_begins :].decode("utf-8", "replace")
        wrong = ["the log couldn't be written"] if "--- Logging error ---" in text else []
        blocks = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n)+(.*)", text)
        self.counts["tracebacks of our own errors"] = sum("HYWUError" in end for end in blocks)
        return wrong + [f"traceback: {end[:300]}" for end in blocks if "HYWUError" not in end]

    def compare(self, server: LocalServer) -> list[str]:
        """Every image against that of a server which nothing has happened to; where the files' two versions
        gave one image, a missed exchange couldn't be seen.
        """
        blind = []
        for how in ("generated", "file", "stock"):
            edits = [Edit(how, TEXTS[0], version, version) for version in KEPT]
            one, two = (g.images(server, g.run(server, e.graph(kept=True))) for e in edits)
            blind += [f"{how}: both versions give one image"] if torch.equal(one, two) else []
        wanted: dict[Edit, torch.Tensor] = {}
        for edit in dict.fromkeys(edit for edit, _ in self.made):
            wanted[edit] = g.images(server, g.run(server, edit.graph(kept=True)))
        self.counts["different images compared"] = len(wanted)
        return blind + [
            f"{edit!r}"[:200] + f": {g.levels(image, wanted[edit]):g} levels apart"
            for edit, image in self.made
            if not torch.equal(image, wanted[edit])
        ]


def put_files(base: Path) -> None:
    """Two generators and two LoRA files that stay, of the bundled ones; the second's effect is another."""
    g.put_photo(base / "input")
    (base / "models" / "loras").mkdir(parents=True, exist_ok=True)
    for name, task in ((KEPT["a"], "blur"), (KEPT["b"], "age")):
        # in the format that the stock loader reads too; of others it applies nothing
        lora = load_lora(bundled(f"single_{task}"))
        lora.save(base / "models" / "loras" / name, "comfyui", overwrite=True)
    for name in KEPT.values():
        generator = load_generator(bundled("generator"))
        if name == KEPT["b"]:
            # what a digest of samples saw as the same: other signs in the output projection
            with torch.no_grad():
                generator.model.proj_out_B.weight.neg_()
        folder = base / "models" / "hywu"
        save_generator(generator, folder / name, overwrite=True)
    one, two = (read_tensors(base / "models" / "hywu" / name)[0] for name in KEPT.values())
    assert one.keys() == two.keys()


def soak(server: LocalServer, prompts: int, interruptions: int, **more: Any) -> Soak:
    """A soak of a running server, ready to `run`; its files are in place."""
    put_files(server.base)
    made = Soak(server, prompts, interruptions, **more)
    for what in made.now:
        made.swap(what, "a")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--interruptions", type=int, default=60, help="of these prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    host, started = dev.prepare_host(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hywu_soak_") as folder:
        os.environ[VARIABLE] = str(make_random(Path(folder) / "weights"))
        with dev.server_of(host, Path(folder) / "soaked") as server:
            made = soak(server, args.prompts, args.interruptions, seed=args.seed)
            wrong = made.run()
        with dev.server_of(host, Path(folder) / "fresh") as server:
            put_files(server.base)
            wrong += made.compare(server)
    print(json.dumps({**made.counts, "seconds": round(time.monotonic() - started)}, indent=1))
    for line in wrong:
        print(line.encode("utf-8", "backslashreplace").decode())
    print(f"{args.prompts} prompts, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
