"""HunyuanImage-3 on a real server: load, think, condition, LoRA, apply, sample, decode, by stock nodes.

Figures stand against the engine alone; tests/host/inside/test_hunyuan.py has the stages against the
official code.
"""

from __future__ import annotations

import shutil

import edit_graph as g
import pytest
import torch
from hunyuan_golden import (
    BASE,
    GENERATOR,
    SYSTEM,
    distance,
    edit_json,
    generator,
    other_image,
    pipeline,
    source,
)
from safetensors.torch import load_file

import dev
from hywu_core.bases.hunyuan_image3 import Request, Sampler
from hywu_core.cli import main
from hywu_core.headless.graph import find_node, read_graph
from hywu_core.images import write_image

EQUAL = 1e-4
INSTRUCTION = "make the other one brighter, and keep the sky"
STEPS, SEED, NOISE = 3, 42, 7


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


def test_text_to_image(folders):
    asked = graph()
    for name in ("think", "encode", "generate", "apply", "one", "two"):
        del asked[name]
    asked = {k: v for k, v in asked.items() if not k.endswith("_lora")}
    for name in ("image", "image2", "cot"):
        del asked["prompt"]["inputs"][name]
    outputs = g.run(folders, asked)
    noise = torch.randn(1, 8, 16, 16, generator=torch.manual_seed(NOISE))
    alone = pipeline().sample(
        [Request(INSTRUCTION, [], size="256x256", seed=SEED)],
        steps=STEPS, guidance=2.5, flow_shift=3.0, noise=noise,
    )  # fmt: skip
    assert distance(latent(folders, outputs, ""), pipeline().vae.unscaled(alone)) < EQUAL


def test_the_shipped_workflow(folders):
    """On the folders that `hywu hunyuan tiny --comfyui` writes; fewer tokens and steps."""
    shipped = read_graph(dev.ROOT / "workflows" / "api" / "hunyuan_image3.json")
    assert main(["hunyuan", "tiny", "--comfyui", str(folders.base), "--overwrite"]) == 0
    g.put_photo(folders.base / "input", "hywu_coffee.png", size=256)
    shipped[find_node(shipped, "Think")]["inputs"]["max_tokens"] = 10
    shipped[find_node(shipped, "Sample")]["inputs"]["steps"] = 2
    outputs = g.run(folders, shipped)
    (ident,) = (i for i, n in shipped.items() if n["class_type"] == "SaveImage")
    assert g.images(folders, outputs, ident).shape[0] == 1


def test_a_wrong_folder_is_one_sentence(folders):
    asked = graph()
    asked["base"]["inputs"]["system_prompt"] = ""
    with pytest.raises(Exception, match=r"no system_prompt\.py, which holds the system prompt"):
        g.run(folders, asked)
