"""`hywu hunyuan`: the whole path from folders, and what it refuses before weights are read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hunyuan_golden import BASE, GENERATOR, GOLDEN, SYSTEM, golden
from PIL import Image

from hywu_core import Condition
from hywu_core.bases.hunyuan_image3 import Sampler, checkpoint
from hywu_core.bases.hunyuan_image3.attention import KVCache
from hywu_core.cli.main import main
from hywu_core.formats import load_lora
from hywu_core.generator.checkpoints import open_checkpoint

IMAGE = str(GOLDEN / "edit_source_0.webp")


def ask(*more: str) -> list[str]:
    metadata = golden("edit").metadata
    return [
        "--image", IMAGE, "--instruction", metadata["prompt"], "--cot", metadata["cot"], "--size",
        metadata["image_size"], "--seed", str(metadata["seed"]), "--system-prompt", SYSTEM, "--precision",
        "float32", *more,
    ]  # fmt: skip


def test_edit_with_a_generator(tmp_path, capsys):
    out, lora = tmp_path / "edit.png", tmp_path / "lora.safetensors"
    command = ["hunyuan", "edit", str(BASE), *ask("--out", str(out), "--steps", "3")]
    assert main([*command, "--generator", str(GENERATOR), "--save-lora", str(lora)]) == 0
    assert f"{out}: 256 x 256" in capsys.readouterr().out
    assert load_lora(lora).provenance["base"] == "base"
    levels = np.array(Image.open(out)).astype(int)
    assert levels.shape == (256, 256, 3)
    # the generator runs in its official precision here, the golden LoRA in float32
    assert np.abs(levels[::3, ::3] - golden("edit")["lora.image"].numpy()).mean() < 8
    assert main(command) == 1
    assert "exists; add --overwrite" in capsys.readouterr().err


def test_the_generators_own_budget(tmp_path, capsys):
    """It is kept to, with the same LoRA; too small a one is refused with the least that works."""
    made = []
    command = ["hunyuan", "edit", str(BASE), "--generator", str(GENERATOR)]
    small = ["--generator-memory-budget", "1.2MB", "--budget", "0.009"]
    for name, more in (("whole", []), ("small", small)):
        lora = tmp_path / f"{name}.safetensors"
        files = ["--out", str(tmp_path / f"{name}.png"), "--save-lora", str(lora), "--steps", "1"]
        assert main([*command, *ask(*files, *more)]) == 0
        made.append(load_lora(lora))
    said = capsys.readouterr().out
    assert "1 of 1 blocks stay on the device" in said
    assert "the base model leaves the device while the LoRA is generated" in said
    for target in made[0]:
        assert torch.equal(made[0][target].A, made[1][target].A)
        assert torch.equal(made[0][target].B, made[1][target].B)
    out = ["--out", str(tmp_path / "x.png"), "--generator-memory-budget", "1kB"]
    assert main([*command, *ask(*out)]) == 1
    assert "memory_budget" in capsys.readouterr().err


def test_a_budget_of_weights(tmp_path, capsys):
    """The same condition, bit by bit; too small a budget is refused with the least that works."""
    made = []
    for name, more in (("whole", []), ("small", ["--budget", "0.009", "--rest", "ram"])):
        out = tmp_path / name
        assert main(["hunyuan", "condition", str(BASE), *ask("--out", str(out), *more)]) == 0
        made.append(Condition.load(f"{out}.safetensors").parts["hidden_states"])
    assert torch.equal(*made)
    command = ["hunyuan", "condition", str(BASE), *ask("--out", str(tmp_path / "x"))]
    assert main([*command, "--budget", "0.001"]) == 1
    assert "The budget is 1,000,000 bytes" in capsys.readouterr().err


def test_edit_without_a_generator_is_the_base_model(tmp_path):
    out = tmp_path / "plain.png"
    assert main(["hunyuan", "edit", str(BASE), *ask("--out", str(out), "--steps", "3")]) == 0
    with Image.open(out) as image:
        golden("edit").check_image("plain.image", image.convert("RGB"))


def test_condition(tmp_path, capsys):
    out = tmp_path / "condition"
    assert main(["hunyuan", "condition", str(BASE), *ask("--out", str(out))]) == 0
    assert "502 tokens x 64" in capsys.readouterr().out
    made = Condition.load(f"{out}.safetensors")
    golden("edit").check("condition", made.parts["hidden_states"], 1e-4)
    # else a graph with this generator would refuse it
    assert made.origin["encoder"] == open_checkpoint(GENERATOR).config.encoder["type"]


def test_the_generator_is_on_another_machine(tmp_path, capsys):
    """Condition, LoRA and image by three commands, of which the second needs no base: the image of one command."""
    paths = {
        name: str(tmp_path / name) for name in ("c.safetensors", "l.safetensors", "a.png", "b.png")
    }
    edit = ["hunyuan", "edit", str(BASE), *ask("--steps", "2")]
    exact = ["--generator-dtype", "float32"]
    assert main([*edit, "--generator", str(GENERATOR), *exact, "--out", paths["a.png"]]) == 0
    assert main(["hunyuan", "condition", str(BASE), *ask("--out", paths["c.safetensors"])]) == 0
    generate = ["generate", "--checkpoint", str(GENERATOR), "--condition", paths["c.safetensors"]]
    assert main([*generate, "--dtype", "float32", "--out", paths["l.safetensors"]]) == 0
    more = ["--budget", "0.009"]  # the LoRA beside the weights
    assert main([*edit, "--lora", paths["l.safetensors"], "--out", paths["b.png"], *more]) == 0
    one, other = (np.array(Image.open(paths[name])) for name in ("a.png", "b.png"))
    assert np.array_equal(one, other)
    capsys.readouterr()
    assert (
        main([*edit, "--lora", str(tmp_path / "no.safetensors"), "--out", str(tmp_path / "c.png")])
        == 1
    )
    assert "no.safetensors" in capsys.readouterr().err


def test_inspect(capsys):
    assert main(["hunyuan", "inspect", str(BASE), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["shards"], found["layers"]) == ("instruct", 3, 3)
    assert found["bytes"] == sum(f.stat().st_size for f in BASE.glob("*.safetensors"))
    assert main(["hunyuan", "inspect", str(BASE)]) == 0
    assert "instruct" in capsys.readouterr().out


def test_think_and_text_to_image_on_a_tiny_folder(tmp_path, capsys):
    tiny, out = tmp_path / "tiny", tmp_path / "image.webp"
    assert main(["hunyuan", "tiny", str(tiny)]) == 0
    command = [
        "hunyuan", "edit", str(tiny / "base"), "--generator", str(tiny / "generator"), "--instruction",
        "a red hat", "--think", "--size", "128x128", "--precision", "float32", "--steps", "1",
        "--out", str(out),
    ]  # fmt: skip
    assert main(command) == 0
    assert "<think>" in capsys.readouterr().out
    assert Image.open(out).size == (128, 128)


def test_a_thought_that_is_stopped_is_said(tmp_path, monkeypatch, capsys):
    def stopped(self, step, logits, generator):
        if step == 3:
            raise KeyboardInterrupt
        return 64  # the letter a

    monkeypatch.setattr(Sampler, "__call__", stopped)
    command = ["--instruction", "red", "--system-prompt", SYSTEM, "--think", "--out", "x.png"]
    assert main(["hunyuan", "edit", str(BASE), *command]) == 130
    assert "written so far: <think>aaa\n" in capsys.readouterr().out
    assert KVCache.live() == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "x.gif"], "must end in"),
        (["--out", "x.png", "--image", *[IMAGE] * 4], "4 source images"),
        (["--out", "x.png", "--image", "no.png"], "no such file"),
        (["--out", "x.png", "--size", "250x250"], "multiples of 16"),
        (["--out", "x.png", "--cot", "no.txt"], "chain of thought can't be read"),
        (["--out", "x.png", "--cot", "a " * 4000], "the checkpoint reads 4,096"),
        (["--out", "x.png", "--instruction", " "], "instruction is empty"),
        (["--out", "x.png", "--save-lora", "l.safetensors"], "name it with --generator"),
        (["--out", "x.png", "--generator", "nowhere"], "no such file or folder"),
        (["--out", "x.png", "--generator", "here", "--lora", "there"], "use one of them"),
        (
            ["--out", "x.png", "--generator-dtype", "fp8", "--generator-memory-budget", "1GB"],
            "one of the two",
        ),
    ],
)
def test_refused_before_weights_are_read(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint.Folder, "fill", None)
    assert main(["hunyuan", "edit", str(BASE), *ask(), *options]) == 1
    assert said in capsys.readouterr().err


def test_tiny_into_a_comfyui(tmp_path, capsys):
    command = ["hunyuan", "tiny", "--comfyui", str(tmp_path)]
    assert main(command) == 1
    assert "has no folder models" in capsys.readouterr().err
    (tmp_path / "models").mkdir()
    assert main(command) == 0
    assert main(["hunyuan", "inspect", str(tmp_path / "models/hunyuan_image_3/tiny")]) == 0
    assert main(["inspect", str(tmp_path / "models/hywu/tiny-hunyuan")]) == 0
    assert main(command) == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main(["hunyuan", "tiny"]) == 1
