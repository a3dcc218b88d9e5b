"""What goes wrong on a real server: interrupted, deleted, corrupt, out of range. The next prompt works."""

from __future__ import annotations

import asyncio
import json
import math
import time
from pathlib import Path

import edit_graph as g
import psutil
import pytest
import torch
from PIL import Image

from hywu_core.bases.bundled.checkpoint import bundled, editor_identity, load_editor
from hywu_core.generator.checkpoints import load_generator, save_generator
from hywu_core.generator.model import ParameterGenerator
from hywu_core.headless.client import Client, Interrupted, NodeFailed, Refused


@pytest.fixture(scope="module")
def direct(server):
    """The image of the plain graph, which every prompt after trouble must still give."""
    g.put_photo(server.base / "input")
    return g.images(server, g.run(server, g.edit_graph()))


@pytest.fixture(scope="module")
def slow(server, weights):
    """A generator of 200 blocks for the bundled editor: seconds of work for a batch."""
    editor = load_editor(bundled("editor"))
    config = load_generator(bundled("generator")).config
    config = config.with_(
        d_model=64, head_dim=32, num_blocks=200, token_dim=64, dim_accumulation=config.layout.rank,
        encoder={"type": "bundled_editor", "editor": editor_identity(editor)},
    )  # fmt: skip
    torch.manual_seed(1)
    generator = ParameterGenerator(config)
    generator.reset_parameters()
    save_generator(generator, server.base / "models" / "hywu" / "slow.safetensors")
    return "slow.safetensors"


@pytest.fixture
def goes_on(server, direct):
    """After the test the server gives the same image as before it."""
    yield
    assert torch.equal(g.images(server, g.run(server, g.edit_graph())), direct)


def slow_graph(slow: str, size: int, count: int) -> dict:
    """A batch of plain images, other ones each time, through encode and generate."""
    graph = g.edit_graph(image=["many", 0])
    graph["generator"]["inputs"]["checkpoint"] = slow
    graph["many"] = g.node(
        "EmptyImage", width=size, height=size, batch_size=count, color=time.time_ns() % 2**24
    )
    kept = ("generator", "many", "encode", "generate")
    return {k: graph[k] for k in kept} | {"end": g.node("HYWUInspectLoRA", lora=["generate", 0])}


def interrupt_at(server, graph: dict, target: str) -> str:
    """Run a graph and interrupt it at the first progress of a node; returns the error's text."""

    async def go() -> None:
        async with Client(server.url, timeout=120) as client:
            sent = []

            def progress(node: str | None, done: int, total: int) -> None:
                if node == target and done < total and not sent:
                    request = client.call("POST", "/interrupt", json={})
                    sent.append(asyncio.ensure_future(request))

            await client.run(graph, progress)

    with pytest.raises(Interrupted) as caught:
        asyncio.run(go())
    return str(caught.value)


def failure_of(server, graph: dict) -> str:
    """What is said on the input before the run, or by the node in it."""
    with pytest.raises((NodeFailed, Refused)) as caught:
        g.run(server, graph)
    return str(caught.value)


@pytest.mark.parametrize(("target", "size", "count"), [("generate", 32, 64), ("encode", 128, 1024)])
def test_interruption_in_the_middle(server, slow, goes_on, target, size, count):
    started = time.monotonic()
    assert target in interrupt_at(server, slow_graph(slow, size, count), target)
    assert time.monotonic() - started < 60


def test_interrupted_prompts_leave_no_memory_behind(server, slow, goes_on):
    """The images of each take 192 MiB, and the encoder's copy of them as much again."""
    process, marks = psutil.Process(server.process.pid), []
    for _ in range(5):
        interrupt_at(server, slow_graph(slow, 128, 1024), "encode")
        marks.append(process.memory_info().rss >> 20)
    assert marks[-1] - marks[1] < 190, marks


def test_interruption_while_sampling_leaves_no_lora_behind(server, direct, goes_on):
    g.put_photo(server.base / "input", "hywu-large.png", size=512, seed=2)
    graph = g.edit_graph(image=["large", 0], large=g.node("LoadImage", image="hywu-large.png"))
    graph["sample"]["inputs"]["steps"] = 200
    assert "sample" in interrupt_at(server, graph, "sample")
    plain = g.edit_graph(model=["editor", 0])
    del plain["apply"], plain["generate"], plain["encode"], plain["generator"]
    assert g.levels(g.images(server, g.run(server, plain)), direct) > 1


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_checkpoint_that_goes_between_queue_and_run(server, slow, goes_on, damage):
    file = server.base / "models" / "hywu" / f"{damage}.safetensors"
    whole = bundled("generator").read_bytes()
    file.write_bytes(whole)
    later = g.edit_graph()
    later["generator"]["inputs"]["checkpoint"] = file.name

    async def go() -> dict:
        async with Client(server.url) as client:
            await client.queue(slow_graph(slow, 32, 48))
            prompt = await client.queue(later)
            if damage == "deleted":
                file.unlink()
            else:
                file.write_bytes(whole[: len(whole) // 2])
            for _ in range(600):
                record = (await client.json("GET", f"/history/{prompt}")).get(prompt)
                if record:
                    return record
                await asyncio.sleep(0.1)
        raise AssertionError("the prompt did not end in a minute")

    messages = asyncio.run(go())["status"]["messages"]
    (error,) = [details for name, details in messages if name == "execution_error"]
    assert error["node_id"] == "generator"
    assert file.name in error["exception_message"]
    wanted = "no such file" if damage == "deleted" else "not a whole safetensors file"
    assert wanted in error["exception_message"]


def test_a_generator_for_other_encoders_and_editors(server, direct, goes_on):
    folder = server.base / "models" / "hywu"
    for name, encoder, words in (
        ("elsewhere", {"type": "hunyuan_image_3"}, "Load Condition"),
        ("other", {"type": "bundled_editor", "editor": "0" * 16}, "trained for the editor 0000"),
    ):
        made = load_generator(bundled("generator"))
        made.config = made.config.with_(encoder=encoder)
        save_generator(made, folder / f"{name}.safetensors", overwrite=True)
        graph = g.edit_graph()
        graph["generator"]["inputs"]["checkpoint"] = f"{name}.safetensors"
        assert words in failure_of(server, graph)
    # a condition made with one generator, given to another
    graph = g.edit_graph(
        second=g.node("HYWULoadGenerator", checkpoint="other.safetensors", precision="float32")
    )
    graph["generate"]["inputs"]["generator"] = ["second", 0]
    assert "encode it with this generator" in failure_of(server, graph)


def test_strength_that_is_no_number(server, direct, goes_on):
    assert "finite number" in failure_of(server, g.edit_graph(strength=math.nan))
    with pytest.raises(Refused, match="strength"):
        g.run(server, g.edit_graph(strength=math.inf))


@pytest.mark.parametrize("kind", ["ComfyUI", "PEFT", "native"])
@pytest.mark.parametrize("prefix", ["../../out", "/tmp/hywu-out", "..", "a/../../out"])
def test_names_that_lead_out_of_the_output_folder(server, direct, kind, prefix):
    keep = g.node("HYWUSaveLoRA", lora=["generate", 0], filename_prefix=prefix, format=kind)
    before = {path for path in server.base.rglob("*") if "out" in path.name}
    assert "leads out of ComfyUI's output folder" in failure_of(server, g.edit_graph(keep=keep))
    assert {path for path in server.base.rglob("*") if "out" in path.name} == before
    assert not list(Path("/tmp").glob("hywu-out*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "instruction is empty"),
        (" \n\t ", "instruction is empty"),
        ("one\ntwo\nthree", "3 lines of instruction for 1 image;"),
    ],
)
def test_instructions_that_do_not_fit(server, direct, goes_on, text, words):
    assert words in failure_of(server, g.edit_graph(text))


@pytest.mark.parametrize(
    "text", ["x" * 10_000, "改变 🎨 \u202e ñ", "half \ud83d pair", "(a:1.5) {b|c}"]
)
def test_any_unicode_and_any_length(server, direct, text):
    graph = g.edit_graph(text)
    outputs = g.run(server, graph)
    assert g.said(outputs, "encode")["warnings"]
    assert torch.isfinite(g.images(server, outputs)).all()


HALF = "half \ud83d pair"
#: Node and text input -> other inputs; each of them quotes what it can't use.
QUOTING = {
    ("HYWULoRAScope", "module_strengths"): {"start_percent": 0.0, "end_percent": 1.0},
    ("HYWUSaveLoRA", "filename_prefix"): {"lora": ["generate", 0], "format": "native"},
    ("HYWUSaveCondition", "filename_prefix"): {"condition": ["encode", 0]},
    ("HYWUBenchmarkItems", "path"): {"benchmark": "folder", "index": 0, "count": 1},
    ("HYWUBenchmarkItems", "tasks"): {"benchmark": "folder", "path": "samples", "index": 0, "count": 1},
    ("HYWUModelLayout", "include"): {
        "model": ["editor", 0], "rank": 2, "generator_size": "XS", "condition_tokens": 8, "batch_size": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), QUOTING)
def test_half_an_emoji_never_ends_the_queue(server, direct, goes_on, kind, name):
    """ComfyUI's log can't take it, and its worker dies in the attempt: the next prompt would never run."""
    graph = g.edit_graph(hostile=g.node(kind, **QUOTING[kind, name], **{name: HALF}))
    if kind == "HYWULoRAScope":
        graph["apply"]["inputs"]["scope"] = ["hostile", 0]
    if kind == "HYWUBenchmarkItems":
        graph["end"] = g.node("PreviewImage", images=["hostile", 0])
    try:
        said = json.dumps(g.run(server, graph), ensure_ascii=False)
    except (NodeFailed, Refused) as error:
        said = str(error)
    said.encode()


@pytest.mark.parametrize(("mode", "size"), [("RGBA", 40), ("L", 40), ("RGB", 1), ("RGB", 4096)])
def test_images_of_any_kind_are_encoded(server, direct, mode, size):
    name = f"{mode}-{size}.png"
    Image.new(mode, (size, size), 90 if mode == "L" else (9, 90, 40, 128)[: len(mode)]).save(
        server.base / "input" / name
    )
    graph = g.edit_graph(image=["damaged", 0], damaged=g.node("LoadImage", image=name))
    kept = ("generator", "damaged", "encode", "generate")
    graph = {k: graph[k] for k in kept} | {"end": g.node("HYWUInspectLoRA", lora=["generate", 0])}
    outputs = g.run(server, graph)
    assert g.said(outputs, "generate")["loras"] == 1


def test_an_image_of_one_pixel_is_refused_or_edited(server, direct, goes_on):
    """Stock InstructPixToPixConditioning can't; VAE Encode with ReferenceLatent can."""
    Image.new("RGB", (1, 1), (9, 90, 40)).save(server.base / "input" / "pixel.png")
    pixel = g.node("LoadImage", image="pixel.png")
    graph = g.edit_graph(image=["pixel", 0], pixel=pixel)
    assert "at least 8 x 8" in failure_of(server, graph)
    graph["latent"] = g.node("VAEEncode", pixels=["pixel", 0], vae=["editor", 2])
    graph["pair"] = g.node("ReferenceLatent", conditioning=["text", 0], latent=["latent", 0])
    for name in ("positive", "negative"):
        graph["sample"]["inputs"][name] = ["pair", 0]
    graph["sample"]["inputs"]["latent_image"] = ["latent", 0]
    assert g.images(server, g.run(server, graph)).shape == (1, 3, 1, 1)
