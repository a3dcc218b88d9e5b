"""HunyuanImage-3 on a real server: load, think, condition, LoRA, apply, sample, decode, by stock nodes.

Against the engine alone, and against the official code's values, whose noise and forced words the server
has from tests/helpers/golden_pack.
"""

from __future__ import annotations

import asyncio
import json
import shutil

import aiohttp
import edit_graph as g
import numpy as np
import pytest
import torch
from hunyuan_golden import (
    BASE,
    CONDITION,
    GENERATOR,
    LATENTS,
    SYSTEM,
    distance,
    distilled_folder,
    edit_json,
    generator,
    golden,
    other_image,
    pipeline,
    source,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import dev
from hywu_core.bases.hunyuan_image3 import Request, Sampler
from hywu_core.cli import main
from hywu_core.condition import Condition
from hywu_core.formats import load_lora
from hywu_core.headless.client import NodeFailed
from hywu_core.headless.graph import find_node, read_graph
from hywu_core.images import write_image

EQUAL = 1e-4
INSTRUCTION = "make the other one brighter, and keep the sky"
STEPS, SEED, NOISE = 3, 42, 7
#: Seeds that the golden pack knows: a case's initial noise; its text's noise and words; the letter a, always.
GIVEN = {"edit": 9001, "distilled": 9002, "text_to_image": 9003, "auto": 9004, "256x256": 9005}
ALWAYS_A = 9006


@pytest.fixture(scope="module")
def folders(server):
    """The tiny folder, its generator and two images where the server looks for them."""
    models = server.base / "models"
    shutil.copytree(BASE, models / "hunyuan_image_3" / "golden", dirs_exist_ok=True)
    folder = models / "hywu" / "golden-hunyuan"
    shutil.copytree(GENERATOR, folder, dirs_exist_ok=True)
    edit_json(folder / "config.json", rope_precision="float32")
    for name, image in (("one", source()), ("two", other_image())):
        (server.base / "input").mkdir(exist_ok=True)
        write_image(image, server.base / "input" / f"hunyuan_{name}.png")
    distilled_folder(models / "hunyuan_image_3" / "distilled")
    known = {
        GIVEN["edit"]: {"noise": golden("edit")["sample.noise.2"]},
        GIVEN["distilled"]: {"noise": golden("distilled")["sample.noise.2"]},
        GIVEN["text_to_image"]: {"noise": golden("text_to_image")["sample.noise.0"]},
        ALWAYS_A: {"push": torch.tensor([[-1, 64]])},
    }
    for run in golden("cot").metadata["runs"]:
        push = [[int(step), token] for step, token in run["bias_at_new_token"].items()]
        noise = golden("cot")[f"{run['image_size']}.vae_noise"]
        known[GIVEN[run["image_size"]]] = {"vae_noise": noise, "push": torch.tensor(push)}
    (server.base / "golden").mkdir()
    for seed, values in known.items():
        save_file(values, server.base / "golden" / f"{seed}.safetensors")
    return server


def graph(**more) -> dict[str, dict]:
    return {
        "base": g.node(
            "HYWULoadHunyuanImage3", folder="golden", precision="float32", router="float32",
            system_prompt=SYSTEM,
        ),
        "generator": g.node("HYWULoadGenerator", checkpoint="golden-hunyuan", precision="float32"),
        "one": g.node("LoadImage", image="hunyuan_one.png"),
        "two": g.node("LoadImage", image="hunyuan_two.png"),
        "think": g.node(
            "HYWUHunyuanThink", model=["base", 0], instruction=INSTRUCTION, size="256x256", seed=SEED,
            task="think_recaption", max_tokens=20, temperature=0.0, image=["one", 0], image2=["two", 0],
        ),
        "prompt": g.node(
            "HYWUHunyuanEditPrompt", hunyuan=["base", 2], instruction=INSTRUCTION, size="256x256",
            seed=SEED, image=["one", 0], image2=["two", 0], cot=["think", 0],
        ),
        "encode": g.node(
            "HYWUConditionEncode", generator=["generator", 0], image=["one", 0],
            instruction=INSTRUCTION, model=["base", 0], conditioning=["prompt", 0],
        ),
        "generate": g.node("HYWUGenerateLoRA", generator=["generator", 0], condition=["encode", 0]),
        "apply": g.node(
            "HYWUApplyLoRA", model=["base", 0], lora=["generate", 0], strength=1.0, mode="auto"
        ),
        **sampling("", ["base", 0]),
        **sampling("_lora", ["apply", 0]),
        **more,
    }  # fmt: skip


def sampling(tag: str, model: list) -> dict[str, dict]:
    """Stock nodes to a saved latent and a saved image."""
    return {
        f"sample{tag}": g.node(
            "KSampler", model=model, seed=NOISE, steps=STEPS, cfg=2.5, sampler_name="euler",
            scheduler="simple", positive=["prompt", 0], negative=["prompt", 1],
            latent_image=["prompt", 2], denoise=1.0,
        ),
        f"latent{tag}": g.node(
            "SaveLatent", samples=[f"sample{tag}", 0], filename_prefix=f"hunyuan{tag}"
        ),
        f"decode{tag}": g.node("VAEDecode", samples=[f"sample{tag}", 0], vae=["base", 1]),
        f"save{tag}": g.node("SaveImage", images=[f"decode{tag}", 0], filename_prefix="hunyuan"),
    }  # fmt: skip


def latent(server, outputs, tag: str) -> torch.Tensor:
    item = outputs[f"latent{tag}"]["latents"][0]
    return load_file(server.base / "output" / item["subfolder"] / item["filename"])["latent_tensor"]


def test_the_whole_graph_is_the_engines(folders):
    """With two sources, a thought, with and without the LoRA."""
    outputs = g.run(folders, graph())
    p = pipeline()
    request = Request(INSTRUCTION, [source(), other_image()], size="256x256", seed=SEED)
    request = p.think(request, sampler=Sampler(), most=20)
    end = "" if request.ratio is None else f"<img_ratio_{request.ratio}>"
    assert outputs["think"]["text"][0] == request.cot + end
    condition = p.condition([request])
    lora = generator()(condition)
    # as KSampler draws it
    noise = torch.randn(1, 8, 16, 16, generator=torch.manual_seed(NOISE))
    for tag, given in (("", None), ("_lora", lora)):
        alone = p.sample([request], given, steps=STEPS, guidance=2.5, flow_shift=3.0, noise=noise)
        made = latent(folders, outputs, tag)
        assert distance(made, p.vae.unscaled(alone)) < EQUAL
        image = g.images(folders, outputs, f"save{tag}")
        assert g.levels(image, p.decode(alone)) <= g.SAME
    assert outputs["encode"]["hywu_warnings"] == []
    assert g.said(outputs, "encode")["text_from"] == "conditioning"
    report = g.said(outputs, "apply")
    assert report["mode"] == "unmerged"
    assert report["matched"] == report["active"] == 21


def test_a_second_run_with_another_seed_thinks_and_generates_nothing_anew(folders):
    again = graph()
    for tag in ("", "_lora"):
        again[f"sample{tag}"]["inputs"]["seed"] = NOISE + 1
    record = g.run_sync(folders.url, again, timeout=240)[0]
    assert {"latent", "latent_lora"} <= record["outputs"].keys()
    # newer ComfyUIs send the reports of kept results again, so that outputs don't tell
    kept = next(
        m["nodes"] for kind, m in record["status"]["messages"] if kind == "execution_cached"
    )
    assert {"think", "encode", "generate", "apply"} <= set(kept)
    assert not {"sample", "sample_lora"} & set(kept)


def golden_graph(name: str) -> dict[str, dict]:
    """A case of the official code's, with and without a LoRA: its chain of thought, seed and noise."""
    metadata = golden(name).metadata
    asked = graph(cot=g.node("PrimitiveStringMultiline", value=metadata["cot"] or ""))
    del asked["think"], asked["two"], asked["prompt"]["inputs"]["image2"]
    asked["prompt"]["inputs"] |= {
        "instruction": metadata["prompt"], "size": metadata["image_size"], "seed": metadata["seed"], "cot": ["cot", 0],
    }  # fmt: skip
    for tag in ("", "_lora"):
        asked[f"sample{tag}"]["inputs"] |= {"seed": GIVEN[name], "steps": metadata["steps"]}
    return asked


def check_golden(server, outputs, name: str, tags=("", "_lora")) -> None:
    """Latents and images of a case's last step."""
    values = golden(name)
    for tag in tags:
        kind = "lora" if tag else "plain"
        made = latent(server, outputs, tag) * pipeline().config.vae.scaling_factor
        values.check(f"{kind}.step.{values.metadata['steps'] - 1}.next", made, LATENTS)
        image = g.images(server, outputs, f"save{tag}")[0].movedim(0, -1).mul(255).round().byte()
        values.check_image(f"{kind}.image", Image.fromarray(image.numpy()))


def test_the_official_edit(folders, tmp_path):
    """Condition, LoRA, latents and images; the LoRA also of a condition that was made by a command."""
    asked, edit = golden_graph("edit"), golden("edit")
    metadata = edit.metadata
    folder, image = tmp_path / "golden", tmp_path / "one.png"
    shutil.copytree(BASE, folder)
    write_image(source(), image)
    made = folders.base / "models" / "hywu_conditions" / "golden.safetensors"
    made.parent.mkdir(exist_ok=True)
    command = [
        "hunyuan",
        "condition",
        str(folder),
        "--image",
        str(image),
        "--instruction",
        metadata["prompt"],
    ]
    command += ["--cot", metadata["cot"], "--size", "256x256", "--seed", str(metadata["seed"])]
    command += ["--system-prompt", SYSTEM, "--precision", "float32", "--out", str(made)]
    assert main(command) == 0
    asked |= {
        "condition": g.node("HYWUSaveCondition", condition=["encode", 0], filename_prefix="golden"),
        "lora": g.node("HYWUSaveLoRA", lora=["generate", 0], filename_prefix="golden", format="native"),
        "brought": g.node("HYWULoadCondition", condition="golden.safetensors"),
        "generate2": g.node("HYWUGenerateLoRA", generator=["generator", 0], condition=["brought", 0]),
        "lora2": g.node("HYWUSaveLoRA", lora=["generate2", 0], filename_prefix="brought", format="native"),
    }  # fmt: skip
    outputs = g.run(folders, asked)
    check_golden(folders, outputs, "edit")
    condition = Condition.load(folders.base / "output" / outputs["condition"]["text"][0])
    edit.check("condition", condition.parts["hidden_states"], CONDITION)
    for name in ("lora", "lora2"):
        lora = load_lora(folders.base / "output" / outputs[name]["text"][0])
        for key in (k for k in edit.values if k.startswith("lora.model.")):
            pair = lora[key.removeprefix("lora.").rpartition(".lora_")[0]]
            edit.check(key, pair.A if key.endswith("A") else pair.B, CONDITION)


@pytest.mark.parametrize("run", [0, 1])
def test_the_official_text(folders, run):
    metadata = golden("cot").metadata
    wanted, asked = metadata["runs"][run], graph()
    size = wanted["image_size"]
    asked = {name: asked[name] for name in ("base", "one", "think")}
    asked["think"]["inputs"] |= {
        "instruction": metadata["prompt"],
        "size": size,
        "seed": GIVEN[size],
    }
    del asked["think"]["inputs"]["image2"]
    asked["state"] = g.node("GoldenState", after=["think", 0])
    outputs = g.run(folders, asked)
    assert g.said(outputs, "state")["tokens"] == wanted["new_tokens"]
    end = "<img_ratio_4>" if size == "auto" else ""
    assert outputs["think"]["text"][0] == wanted["cot_text"] + end


def test_text_to_image(folders):
    asked, metadata = golden_graph("text_to_image"), golden("text_to_image").metadata
    for name in ("encode", "generate", "apply", "one", "generator"):
        del asked[name]
    asked = {k: v for k, v in asked.items() if not k.endswith("_lora")}
    del asked["prompt"]["inputs"]["image"]
    outputs = g.run(folders, asked)
    check_golden(folders, outputs, "text_to_image", ("",))
    alone = pipeline().sample(
        [Request(metadata["prompt"], [], size="256x256", seed=metadata["seed"])],
        steps=2, guidance=2.5, flow_shift=3.0, noise=golden("text_to_image")["sample.noise.0"],
    )  # fmt: skip
    assert distance(latent(folders, outputs, ""), pipeline().vae.unscaled(alone)) < EQUAL


def test_the_distilled_model(folders):
    """No negative branch: cfg 1, and the guidance is a token."""
    asked = golden_graph("distilled")
    asked["base"]["inputs"]["folder"] = "distilled"
    for tag in ("", "_lora"):
        asked[f"sample{tag}"]["inputs"]["cfg"] = 1.0
    check_golden(folders, g.run(folders, asked), "distilled")


def test_a_batch_of_two_with_two_sources_each(folders):
    """Different images, instructions, lengths, seeds and LoRAs: each as the engine makes it alone."""
    cot = "<think>in the end</think><recaption>an other thing</recaption>"
    first = source()
    second = Image.fromarray(255 - np.array(first))
    write_image(second, folders.base / "input" / "hunyuan_three.png")
    reference = other_image()
    requests = [
        Request("make it red", [first, reference], "", "256x256", 5),
        Request("the other one, and keep the sky as it was", [second, reference], cot, "256x256", 6),
    ]  # fmt: skip
    asked = graph(
        three=g.node("LoadImage", image="hunyuan_three.png"),
        batch=g.node("ImageBatch", image1=["one", 0], image2=["three", 0]),
        # of the first an empty thought, of the second its own
        cot=g.node("PrimitiveStringMultiline", value=f"\n---\n{cot}"),
    )
    del asked["think"]
    lines = "\n".join(request.instruction for request in requests)
    asked["prompt"]["inputs"] |= {
        "instruction": lines,
        "seed": 5,
        "image": ["batch", 0],
        "cot": ["cot", 0],
    }
    asked["encode"]["inputs"] |= {"image": ["batch", 0], "instruction": "-"}
    outputs = g.run(folders, asked)
    noise = torch.randn(2, 8, 16, 16, generator=torch.manual_seed(NOISE))
    for tag in ("", "_lora"):
        made = latent(folders, outputs, tag)
        assert made.shape[0] == 2
        for i, request in enumerate(requests):
            lora = generator()(pipeline().condition([request])) if tag else None
            alone = pipeline().sample(
                [request], lora, steps=STEPS, guidance=2.5, flow_shift=3.0, noise=noise[i : i + 1]
            )
            assert distance(made[i : i + 1], pipeline().vae.unscaled(alone)) < EQUAL


async def interrupted(server, asked: dict, at: int) -> tuple[int, list[dict]]:
    """Interrupt Think at a token; returns the last that was told, and what its node was given to show."""
    last, shown, sent = 0, [], False
    async with (
        aiohttp.ClientSession(server.url) as session,
        session.ws_connect("/ws", params={"clientId": "watcher"}) as socket,
    ):
        await session.post("/prompt", json={"prompt": asked, "client_id": "watcher"})
        async for message in socket:
            event = json.loads(message.data) if message.type is aiohttp.WSMsgType.TEXT else {}
            kind, data = event.get("type"), event.get("data") or {}
            assert kind not in ("execution_success", "execution_error"), data
            if kind == "progress" and data["node"] == "think":
                last = data["value"]
                if last >= at and not sent:
                    await session.post("/interrupt", json={})
                    sent = True
            if kind == "hywu_text":
                shown.append(data)
            if kind == "execution_interrupted":
                assert data["node_id"] == "think"
                return last, shown
    raise AssertionError("the server closed the socket")


def test_a_thought_is_interrupted(folders):
    """Within a token, its memory freed, its text on the node, in the log and in a file; the next one works."""
    asked = {name: node for name, node in graph().items() if name in ("base", "one", "think")}
    asked["think"]["inputs"] |= {"seed": ALWAYS_A, "max_tokens": 3000, "task": "think"}
    del asked["think"]["inputs"]["image2"]
    asked["state"] = g.node("GoldenState", after=["think", 0])
    last, shown = asyncio.run(interrupted(folders, asked, 20))
    state = g.said(g.run(folders, {"state": g.node("GoldenState")}), "state")
    assert state["kept"] == 0
    assert state["late"] <= 1
    written = len(state["tokens"])
    # newer releases don't tell every step
    assert 20 <= last <= written < 3000
    assert {data["node"] for data in shown} == {"think"}
    texts = [data["output"]["text"][0] for data in shown]
    assert all(one.startswith("<think>a") for one in texts)
    text, (said,) = texts[-1], shown[-1]["output"]["hywu_warnings"]
    assert text == f"<think>{'a' * written}</think>"
    assert f"after {written} tokens" in said
    name = said.partition("kept in ")[2].partition(" of the output")[0]
    assert (folders.base / "output" / name).read_text("utf-8") == text
    assert text in folders.log.read_text("utf-8")
    # the text goes on as a thought, and nothing of the interrupted one is kept by ComfyUI
    asked["think"]["inputs"]["max_tokens"] = 3
    assert g.run(folders, asked)["think"]["text"][0] == "<think>aaa</think>"


def test_a_wrong_folder_is_one_sentence(folders):
    asked = graph()
    asked["base"]["inputs"]["system_prompt"] = ""
    with pytest.raises(Exception, match=r"no system_prompt\.py, which holds the system prompt"):
        g.run(folders, asked)


def test_the_shipped_workflow(folders):
    """On the folders that `hywu hunyuan tiny --comfyui` writes; fewer tokens and steps.

    Another model needs one widget: the generator is the one that fits it.
    """
    shipped = read_graph(dev.ROOT / "workflows" / "api" / "hunyuan_image3.json")
    assert main(["hunyuan", "tiny", "--comfyui", str(folders.base), "--overwrite"]) == 0
    g.put_photo(folders.base / "input", "hywu_coffee.png", size=256)
    shipped[find_node(shipped, "Think")]["inputs"]["max_tokens"] = 10
    shipped[find_node(shipped, "Sample")]["inputs"]["steps"] = 2
    (ident,) = (i for i, n in shipped.items() if n["class_type"] == "SaveImage")
    with pytest.raises(
        NodeFailed, match="2 generators fit .*: golden-hunyuan, tiny-hunyuan; choose"
    ):
        g.run(folders, shipped)
    shutil.rmtree(folders.base / "models" / "hywu" / "golden-hunyuan")
    for folder in ("tiny", "golden"):
        shipped[find_node(shipped, "HunyuanImage-3")]["inputs"]["folder"] = folder
        if folder == "golden":  # its folder has no system_prompt.py
            shipped[find_node(shipped, "HunyuanImage-3")]["inputs"]["system_prompt"] = SYSTEM
        outputs = g.run(folders, shipped)
        assert g.images(folders, outputs, ident).shape[0] == 1
