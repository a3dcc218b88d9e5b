"""The whole edit on a real server: against the engine, per image, reloaded, chained, kept."""

from __future__ import annotations

import asyncio

import edit_graph as g
import pytest
import torch

from hywu_core.bases.bundled.checkpoint import bundled
from hywu_core.bases.bundled.engine import BundledEditor
from hywu_core.headless.client import Client


@pytest.fixture(scope="module")
def photo(server):
    return g.put_photo(server.base / "input")


@pytest.fixture(scope="module")
def engine(weights):
    return BundledEditor.load(bundled("editor"), bundled("generator"))


@pytest.fixture(scope="module")
def direct(server, photo):
    """The image of the plain graph."""
    return g.images(server, g.run(server, g.edit_graph()))


def test_the_edit_is_the_engines(server, photo, engine, direct):
    edit = engine.edit(photo, "blur the image", seed=3, steps=4)
    assert g.levels(direct[0], edit.image) <= g.SAME
    without = engine.edit(photo, "blur the image", seed=3, steps=4, strength=0)
    assert g.levels(direct[0], without.image) > 2


def test_merged_gives_the_same_image(server, photo, direct):
    outputs = g.run(server, g.edit_graph(mode="merge"))
    assert g.said(outputs, "apply")["mode"] == "merge"
    assert g.levels(g.images(server, outputs), direct) <= g.SAME


def test_reports_and_norms(server, photo, engine):
    text = "blur the image please"  # a new one: nodes that ComfyUI has kept report nothing
    outputs = g.run(server, g.edit_graph(text))
    assert g.said(outputs, "encode")["warnings"] == []
    report = g.said(outputs, "apply")
    assert report["matched"] == len(list(engine.generator.config.layout.targets()))
    entries = outputs["generate"]["hywu_norms"]
    assert len(entries) == len(engine.generator.config.layout.stacks)
    lora = engine.generator(engine.encoder(photo[None], [text]))
    norms = lora.norms()
    for entry in entries:
        for module, row in zip(entry["modules"], entry["norms"], strict=True):
            for layer, value in zip(entry["layers"], row, strict=True):
                wanted = float(norms[f"{entry['stack']}{layer}.{module}"][0])
                assert value == pytest.approx(wanted, rel=1e-3)
        assert entry["seconds"] >= 0
        assert entry["title"] == text
    cells = [len(entry["layers"]) * len(entry["modules"]) for entry in entries]
    assert cells == sorted(cells, reverse=True)
    assert {entry["max"] for entry in entries} == {max(max(map(max, e["norms"])) for e in entries)}


def test_each_image_of_a_batch_is_as_alone(server, photo):
    other = g.put_photo(server.base / "input", "hywu-other.png", seed=5)
    assert g.levels(other, photo) > 2
    batch = {
        "other": g.node("LoadImage", image="hywu-other.png"),
        "both": g.node("ImageBatch", image1=["photo", 0], image2=["other", 0]),
    }
    texts = ["blur the image", "sharpen the image, please"]
    whole = g.images(
        server, g.run(server, g.edit_graph("\n".join(texts), image=["both", 0], **batch))
    )
    assert whole.shape[0] == 2
    # noise of one image alone is the first of the batch's, so only the first can be compared
    first = g.images(server, g.run(server, g.edit_graph(texts[0])))
    assert g.levels(whole[0], first[0]) <= g.SAME
    swapped = {"both": g.node("ImageBatch", image1=["other", 0], image2=["photo", 0])}
    graph = g.edit_graph("\n".join(texts[::-1]), image=["both", 0], **{**batch, **swapped})
    second = g.images(server, g.run(server, graph))
    alone = g.edit_graph(texts[1], image=["other", 0], other=batch["other"])
    assert g.levels(second[0], g.images(server, g.run(server, alone))[0]) <= g.SAME


@pytest.mark.parametrize("kind", ["ComfyUI", "PEFT", "native"])
def test_a_saved_lora_gives_the_same_when_loaded_again(server, photo, direct, kind):
    save = g.node(
        "HYWUSaveLoRA", lora=["generate", 0], filename_prefix=f"loras/kept-{kind}", format=kind
    )
    outputs = g.run(server, g.edit_graph(keep=save))
    name = outputs["keep"]["text"][0].removeprefix("loras/")
    load = {"load": g.node("HYWULoadLoRA", lora=name)}
    graph = g.edit_graph(**load)
    graph["apply"]["inputs"]["lora"] = ["load", 0]
    assert g.levels(g.images(server, g.run(server, graph)), direct) <= g.SAME
    if kind == "ComfyUI":
        stock = g.node(
            "LoraLoaderModelOnly", model=["editor", 0], lora_name=name, strength_model=1.0
        )
        both = g.node(
            "LoraLoader", model=["editor", 0], clip=["editor", 1], lora_name=name,
            strength_model=1.0, strength_clip=1.0,
        )  # fmt: skip
        for loader in (stock, both):
            outputs = g.run(server, g.edit_graph(model=["stock", 0], stock=loader))
            assert g.levels(g.images(server, outputs), direct) <= g.SAME


def test_bundled_loras_are_offered_and_change_the_image(server, photo, direct):
    for name in ("bundled: shared", "bundled: single blur"):
        graph = g.edit_graph(load=g.node("HYWULoadLoRA", lora=name))
        graph["apply"]["inputs"]["lora"] = ["load", 0]
        assert g.levels(g.images(server, g.run(server, graph)), direct) > 1


def test_strength_and_seed_never_generate_again(server, photo):
    """Not even when ComfyUI has dropped everything it had kept."""

    async def free():
        async with Client(server.url) as client:
            await client.free()

    text = "blur the image a bit"
    first = g.run(server, g.edit_graph(text))
    assert not g.said(first, "generate")["cached"]
    other = g.run(server, g.edit_graph(text, strength=0.5, seed=9))
    assert g.levels(g.images(server, other), g.images(server, first)) > 1
    asyncio.run(free())
    again = g.run(server, g.edit_graph(text, strength=0.5, seed=9))
    assert g.said(again, "generate")["cached"]
    assert torch.equal(g.images(server, again), g.images(server, other))


def test_a_blend_is_both_loras_at_their_shares(server, photo, direct):
    other = {
        "encode2": g.node(
            "HYWUConditionEncode", generator=["generator", 0], image=["photo", 0],
            instruction="sharpen the image, please",
        ),
        "generate2": g.node(
            "HYWUGenerateLoRA", generator=["generator", 0], condition=["encode2", 0]
        ),
    }  # fmt: skip

    def blended(weight):
        blend = g.node(
            "HYWUBlendLoRA", lora_a=["generate", 0], lora_b=["generate2", 0], weight=weight
        )
        graph = g.edit_graph(blend=blend, **other)
        graph["apply"]["inputs"]["lora"] = ["blend", 0]
        return g.images(server, g.run(server, graph))

    second = g.node(
        "HYWUApplyLoRA", model=["apply", 0], lora=["generate2", 0], strength=0.75, mode="merge"
    )
    graph = g.edit_graph(strength=0.25, second=second, **other)
    graph["sample"]["inputs"]["model"] = ["second", 0]
    assert g.levels(blended(0.75), g.images(server, g.run(server, graph))) <= g.SAME
    assert g.levels(blended(0.0), direct) <= g.SAME
    assert g.levels(blended(1.0), direct) > 1


def test_two_in_a_row_on_branches_and_beside_a_stock_loader(server, photo, direct):
    """Half and half in a row is the whole; branches of one MODEL don't see each other."""
    save = g.node(
        "HYWUSaveLoRA", lora=["generate", 0], filename_prefix="loras/half", format="ComfyUI"
    )
    name = g.run(server, g.edit_graph(keep=save))["keep"]["text"][0].removeprefix("loras/")

    def half(model, mode):
        return g.node("HYWUApplyLoRA", model=model, lora=["generate", 0], strength=0.5, mode=mode)

    text, image = "blur the image", ["photo", 0]
    stock = g.node("LoraLoaderModelOnly", model=["editor", 0], lora_name=name, strength_model=0.5)
    more = {
        "second": half(["apply", 0], "merge"), **g.sampling("2", text, ["second", 0], image),
        "stock": stock,
        "third": half(["stock", 0], "unmerged"), **g.sampling("3", text, ["third", 0], image),
        **g.sampling("4", text, ["editor", 0], image),
    }  # fmt: skip
    outputs = g.run(server, g.edit_graph(strength=0.5, mode="unmerged", **more))
    for chained in ("save2", "save3"):
        assert g.levels(g.images(server, outputs, chained), direct) <= g.SAME
    plain, one = g.images(server, outputs, "save4"), g.images(server, outputs)
    assert g.levels(one, direct) > 1
    assert g.levels(plain, direct) > 1
    alone = g.run(server, g.edit_graph(model=["editor", 0]))
    assert torch.equal(g.images(server, alone), plain)
