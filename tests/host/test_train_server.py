"""Training in a real server: the shipped workflow, and a MODEL that isn't ours, stopped and gone on with."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import edit_graph as g
import numpy as np
import pytest
from pairs import make_pairs
from PIL import Image

import dev
from hywu_core.bases.bundled.checkpoint import bundled, load_editor
from hywu_core.files import read_header
from hywu_core.headless.client import NodeFailed, run_sync
from hywu_core.headless.graph import find_node, read_graph
from hywu_core.headless.local import get_json
from hywu_core.training.state import FORMAT

HERE = Path(__file__).parent

WIDGETS = {
    "pairs": "colour", "generator_size": "XS", "rank": 2, "batch_size": 4, "accumulation": 2,
    "learning_rate": 1e-3, "image_size": 64, "crops": 1, "source_input": "none", "precision": "auto",
    "checkpointing": True, "sample_every": 0, "sample_steps": 2, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_sd3(server, comfyui, weights) -> None:
    """A MODEL that reads the bundled CLIP's tokens, its VAE, and pairs to train on."""
    width = load_editor(bundled("editor")).config.condition_parts["words"]
    script = dev.ROOT / "tests" / "helpers" / "tiny_sd3.py"
    models = server.base / "models"
    subprocess.run([comfyui.python, script, comfyui.tree, models, str(width)], check=True)
    make_pairs(server.base / "input" / "colour")


def training(name: str, steps: int) -> dict[str, dict]:
    return {
        "unet": g.node("UNETLoader", unet_name="tiny_sd3.safetensors", weight_dtype="default"),
        "vae": g.node("VAELoader", vae_name="tiny.safetensors"),
        "editor": g.node("HYWULoadBundledEditor"),
        "train": g.node(
            "HYWUTrainGenerator", model=["unet", 0], vae=["vae", 0], clip=["editor", 1], name=name,
            steps=steps, **WIDGETS,
        ),
    }  # fmt: skip


def sampled(server, unused: str) -> np.ndarray:
    """An image of the base model as it is; at cfg 1 the negative text only makes the node run again."""
    graph = training("unused", 1)
    del graph["train"]
    graph |= {
        "text": g.node("CLIPTextEncode", text="a", clip=["editor", 1]),
        "unused": g.node("CLIPTextEncode", text=unused, clip=["editor", 1]),
        "latent": g.node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sample": g.node(
            "KSampler", model=["unet", 0], seed=5, steps=2, cfg=1.0,
            sampler_name="euler", scheduler="simple", positive=["text", 0], negative=["unused", 0],
            latent_image=["latent", 0], denoise=1.0,
        ),
        "decode": g.node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": g.node("SaveImage", images=["decode", 0], filename_prefix="base"),
    }  # fmt: skip
    return g.images(server, g.run(server, graph)).numpy()


def post(server, path: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(
        urllib.request.Request(f"{server.url}/{path}", data=b"{}", method="POST"), timeout=5
    )


def log_rows(server, name: str) -> int:
    path = server.base / "output" / "hywu_training" / name / "log.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def test_a_model_that_is_not_ours_is_trained_and_stays_as_it_is(server, tiny_sd3):
    before = sampled(server, "before")
    outputs = g.run(server, training("sd3", 4), timeout=600)
    report = g.said(outputs, "train")
    assert report["base"].startswith("OpenAISignatureMMDITWrapper-")
    assert (report["steps"], report["parts"], report["skipped_rows"]) == (4, 2, [])
    assert len(outputs["train"]["images"]) == 2
    choices = get_json(f"{server.url}/object_info/HYWULoadGenerator", timeout=60)
    assert "sd3.safetensors" in choices["HYWULoadGenerator"]["input"]["required"]["checkpoint"][0]
    assert np.array_equal(sampled(server, "after"), before)


def test_a_generator_reads_the_models_own_hidden_states(server, tiny_sd3):
    """Trained, loaded, encoded, generated, applied and sampled in one server."""
    graph = training("hidden", 4)
    graph["train"]["inputs"]["reads"] = "model"
    g.run(server, graph, timeout=600)
    g.put_photo(server.base / "input", "hidden.png", 64)
    del graph["train"]
    inputs = {"model": ["unet", 0], "clip": ["editor", 1], "vae": ["vae", 0]}
    graph |= {
        "load": g.node("HYWULoadGenerator", checkpoint="hidden.safetensors", precision="auto"),
        "photo": g.node("LoadImage", image="hidden.png"),
        "encode": g.node(
            "HYWUConditionEncode", generator=["load", 0], image=["photo", 0],
            instruction="make it warm", **inputs,
        ),
        "generate": g.node("HYWUGenerateLoRA", generator=["load", 0], condition=["encode", 0]),
        # four steps of training: a LoRA that hardly shows in 8 bits as it is
        "apply": g.node(
            "HYWUApplyLoRA", model=["unet", 0], lora=["generate", 0], strength=20.0, mode="auto"
        ),
        "text": g.node("CLIPTextEncode", text="make it warm", clip=["editor", 1]),
        "latent": g.node("VAEEncode", pixels=["photo", 0], vae=["vae", 0]),
    }  # fmt: skip
    for tag, model in (("base", ["unet", 0]), ("edit", ["apply", 0])):
        graph |= {
            f"sample_{tag}": g.node(
                "KSampler", model=model, seed=5, steps=2, cfg=1.0, sampler_name="euler",
                scheduler="simple", positive=["text", 0], negative=["text", 0],
                latent_image=["latent", 0], denoise=1.0,
            ),
            f"decode_{tag}": g.node("VAEDecode", samples=[f"sample_{tag}", 0], vae=["vae", 0]),
            f"save_{tag}": g.node(
                "SaveImage", images=[f"decode_{tag}", 0], filename_prefix=f"hidden_{tag}"
            ),
        }  # fmt: skip
    outputs = g.run(server, graph)
    report = g.said(outputs, "encode")
    assert (report["tokens"], report["warnings"]) == (16, [])
    assert g.said(outputs, "apply")["skipped"] == 0
    base, edit = (g.images(server, outputs, f"save_{tag}") for tag in ("base", "edit"))
    assert g.levels(base, edit) >= 1
    # the text as a stock node's CONDITIONING is the same condition
    encode = graph["encode"]["inputs"]
    del encode["clip"]
    encode |= {"conditioning": ["text", 0], "instruction": ""}
    outputs = g.run(server, graph)
    report = g.said(outputs, "encode")
    assert (report["text_from"], report["warnings"]) == ("conditioning", [])
    assert g.said(outputs, "generate")["cached"]
    # a second image is read, though the generator was trained with one
    encode["image2"] = ["photo", 0]
    outputs = g.run(server, graph)
    assert g.said(outputs, "encode")["tokens"] == 32
    assert "trained with 1 image per item" in g.said(outputs, "encode")["warnings"][0]
    assert not g.said(outputs, "generate")["cached"]
    del graph["encode"]["inputs"]["vae"]
    with pytest.raises(NodeFailed, match="connect vae"):
        run_sync(server.url, graph, timeout=120)


def test_the_stop_button_keeps_a_state_and_the_same_graph_goes_on(server, tiny_sd3):
    steps = 12

    def stop_after_two_steps() -> None:
        for _ in range(3000):
            if log_rows(server, "stopped") >= 2:
                post(server, "interrupt")
                return
            time.sleep(0.02)

    thread = threading.Thread(target=stop_after_two_steps)
    thread.start()
    with pytest.raises(Exception, match="interrupt"):
        run_sync(server.url, training("stopped", steps), timeout=600)
    thread.join()
    folder = server.base / "output" / "hywu_training" / "stopped"
    state = read_header(folder / "state.safetensors")
    assert state["format"] == FORMAT
    assert 2 <= state["step"] < steps
    assert not (server.base / "models" / "hywu" / "stopped.safetensors").exists()
    report = g.said(g.run(server, training("stopped", steps), timeout=600), "train")
    assert report["steps"] == log_rows(server, "stopped") == steps


def test_the_shipped_workflow_trains_and_edits_in_one_run(server, weights):
    graph = read_graph(dev.ROOT / "workflows" / "api" / "train_your_own.json")
    widgets = graph[find_node(graph, "Train")]["inputs"]
    assert widgets["pairs"] == "samples"
    widgets |= {"steps": 6, "crops": 1, "image_size": 32}  # a few minutes otherwise
    record, _ = run_sync(server.url, graph, timeout=900)
    report = json.loads(record["outputs"][find_node(graph, "Train")]["text"][0])
    assert report["base"] == "hywu-bundled-editor-2"
    assert (report["pairs"], report["steps"], report["parts"]) == (8, 6, 1)
    assert 2e6 < report["generator_weights"] < 4e6
    edits = []
    for title in ("Edited: golden", "Edited: moonlight"):
        item = record["outputs"][find_node(graph, title)]["images"][0]
        with Image.open(server.base / "output" / item["subfolder"] / item["filename"]) as file:
            edits.append(np.asarray(file.convert("RGB"), dtype=np.float64))
    assert edits[0].shape == edits[1].shape == (256, 256, 3)
    assert np.abs(edits[0] - edits[1]).max() >= 1  # each instruction has a LoRA of its own
