"""The kinds of files that `fuzz` damages: how a whole one is made, and what reads it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from fuzz_folders import folder_kinds
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from hywu_core import (
    Condition,
    GeneratedLoRA,
    GeneratorConfig,
    LoRALayout,
    ParameterGenerator,
    load_generator,
    load_lora,
    save_generator,
)
from hywu_core.bases.bundled.checkpoint import bundled, load_editor
from hywu_core.cli.main import main
from hywu_core.evaluation.benchmarks import find_benchmark, load_questionnaire, read_items
from hywu_core.evaluation.results import Results, open_results, write_manifest
from hywu_core.evaluation.store import Judgement, JudgementStore, StoreName, list_stores, read_name
from hywu_core.files import read_json
from hywu_core.generator.official import save_official
from hywu_core.headless.client import outputs
from hywu_core.headless.graph import read_graph, set_input
from hywu_core.headless.trouble import ServerError, check_record, describe_refusal
from hywu_core.images import load_image
from hywu_core.layout import Module, Stack
from hywu_core.tokens import token_grid

LAYOUT = LoRALayout(
    (
        Stack(("blocks.0", "blocks.1"), (Module("qkv", 6, 18), Module("experts.w1", 6, 5, 3))),
        Stack(("last",), (Module("out", 6, 7),)),
    ),
    2,
    3.0,
)
OFFICIAL = LoRALayout((Stack(("m.0", "m.1"), (Module("attn.qkv", 8, 24),)),), 2, 4.0)
MODEL = nn.ModuleDict(
    {"blocks": nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(6, 18)}) for _ in range(2))}
)


def lora() -> GeneratedLoRA:
    grids = []
    for stack in LAYOUT.stacks:
        grid = token_grid(stack, LAYOUT.rank, 8)
        grids.append(torch.ones(1, grid.num_layers, grid.num_tokens, LAYOUT.rank, 8))
    return GeneratedLoRA.from_grids(LAYOUT, grids, {"instruction": "a hat", "base": "toy"})


def saved_lora(format: str):
    return lambda folder: lora().save(folder / "lora", format)


def kohya(folder: Path) -> Path:
    tensors = {}
    for i in range(2):
        name = f"lora_unet_blocks_{i}_qkv"
        tensors |= {f"{name}.lora_down.weight": torch.ones(2 + i, 6)}
        tensors |= {
            f"{name}.lora_up.weight": torch.ones(18, 2 + i),
            f"{name}.alpha": torch.tensor(1.0),
        }
    save_file(tensors, folder / "kohya.safetensors", metadata={"ss_network_dim": "2"})
    return folder / "kohya.safetensors"


def condition(folder: Path) -> Path:
    parts = {"image": torch.ones(1, 2, 4), "text": torch.ones(1, 3, 5)}
    masks = {"text": torch.tensor([[True, True, False]])}
    return Condition(parts, masks, "f", {"instruction": ["a"]}).save(folder / "condition")


def generator() -> ParameterGenerator:
    config = GeneratorConfig(
        OFFICIAL, {"hidden_states": 8}, token_dim=8, dim_accumulation=2, d_model=16, head_dim=8,
        num_blocks=2, encoder={"type": "toy"}, base="toy", provenance={"steps": 3},
    )  # fmt: skip
    made = ParameterGenerator(config)
    made.reset_parameters()
    return made


def editor(folder: Path) -> Path:
    target = folder / "editor.safetensors"
    target.write_bytes(bundled("editor").read_bytes())
    return target


def image(kind: str):
    def make(folder: Path) -> Path:
        y, x = np.mgrid[0:24, 0:32]
        gray = (x * 7 + y * 3).astype(np.uint8)
        pixels = Image.fromarray(np.stack([gray, gray.T[:24, :].repeat(2, 1)[:, :32], gray], -1))
        if kind == "tiff":
            pixels = Image.fromarray(gray.astype(np.uint16) * 200)
        exif = Image.Exif()
        exif[0x0112] = 6
        path = folder / f"image.{kind}"
        pixels.save(path, **({"exif": exif} if kind in ("jpg", "png", "webp") else {}))
        return path

    return make


def workflow(folder: Path) -> Path:
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "Photo"}},
        "2": {"class_type": "KSampler", "inputs": {"seed": 1, "image": ["1", 0]}},
    }
    (folder / "workflow.json").write_text(json.dumps(graph))
    return folder / "workflow.json"


def read_workflow(path: Path) -> None:
    set_input(read_graph(path), "KSampler.seed=7")


def record(folder: Path) -> Path:
    told = {"node_id": "1", "node_type": "A", "exception_type": "b.C", "exception_message": "no"}
    status = {"status_str": "error", "completed": False, "messages": [["execution_error", told]]}
    errors = {
        "2": {"class_type": "A", "errors": [{"message": "m", "extra_info": {"input_name": "i"}}]}
    }
    data = {
        "outputs": {"1": {"text": ["a"]}},
        "status": status,
        "error": {"message": "x"},
        "node_errors": errors,
    }
    (folder / "record.json").write_text(json.dumps(data))
    return folder / "record.json"


def read_record(path: Path) -> None:
    data = read_json(path, dict)
    describe_refusal(data)
    list(outputs(data))
    with contextlib.suppress(ServerError):
        check_record(data)


def items(folder: Path) -> Path:
    (folder / "items").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "items" / "a.png")
    rows = [
        {
            "source": "a.png",
            "target": "a.png",
            "instruction": f"blur {i}",
            "task": "blur",
            "key": f"k{i}",
        }
        for i in range(3)
    ]
    text = "\n".join(map(json.dumps, rows)) + "\n"
    (folder / "items" / "items.jsonl").write_text(text)
    return folder / "items"


def benchmark(name: str):
    def make(folder: Path) -> Path:
        shutil.copytree(find_benchmark(name).sample, folder / name)
        return folder / name

    return make


def results(folder: Path) -> Path:
    data = items(folder)
    made = Results(folder / "mine", find_benchmark("folder"))
    made.root.mkdir()
    write_manifest(made, read_items("folder", data), {"kind": "copy"}, data, 0, {"tasks": None})
    return made.root


def judgements(folder: Path) -> Path:
    name = StoreName("gpt", "chat-1", "wu-eval", "ours-1")
    (folder / "judgements").mkdir()
    with JudgementStore(folder / "judgements", name, writable=True) as store:
        for i in range(3):
            store.append(Judgement(f"t/en/{i}", "wu-eval", "p", "q", "answered", "{}"))
    return folder / "judgements"


def read_judgements(folder: Path) -> None:
    for file in sorted(folder.glob("*.jsonl")):
        JudgementStore(folder, read_name(file))
    list_stores(folder)


def questionnaire(folder: Path) -> Path:
    text = json.dumps({"wu-eval": "score <instruction>", "more": "x"})
    (folder / "prompts.json").write_text(text)
    return folder / "prompts.json"


def command(name: str, *more: str):
    """A command over a file: it must end with 0 or 1, and say one line where it is 1."""

    def read(path: Path) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([name, str(path), *more])
        said = err.getvalue().strip().split("\n")
        assert code == 0 or (code == 1 and said[-1].startswith(f"hywu {name}: ")), said

    return read


KINDS = (
    ("native LoRA", saved_lora("native"), load_lora),
    ("ComfyUI LoRA", saved_lora("comfyui"), load_lora),
    ("PEFT folder", saved_lora("peft"), load_lora),
    ("kohya LoRA", kohya, lambda path: load_lora(path, base=MODEL)),
    ("kohya LoRA in part", kohya, lambda path: load_lora(path, base=MODEL, skip_missing=True)),
    ("condition", condition, Condition.load),
    ("generator file", lambda folder: save_generator(generator(), folder / "g"), load_generator),
    ("official folder", lambda folder: save_official(generator(), folder / "one"), load_generator),
    (
        "official shards",
        lambda folder: save_official(generator(), folder / "many", shard_bytes=9000),
        load_generator,
    ),
    ("editor", editor, load_editor),
    ("inspect a generator", lambda folder: save_generator(generator(), folder / "g"), command("inspect")),
    ("inspect a LoRA", saved_lora("native"), command("inspect", "--norms")),
    ("inspect a PEFT folder", saved_lora("peft"), command("inspect", "--full")),
    ("inspect a condition", condition, command("inspect")),
    ("inspect results", results, command("inspect")),
    ("inspect judgements", lambda folder: next(judgements(folder).iterdir()), command("inspect", "--json")),
    *((f"{kind} image", image(kind), load_image) for kind in ("png", "jpg", "webp", "tiff", "bmp", "gif")),
    ("workflow", workflow, read_workflow),
    ("server's record", record, read_record),
    ("items", items, lambda path: read_items("folder", path)),
    ("gedit", benchmark("gedit"), lambda path: read_items("gedit", path)),
    ("imgedit", benchmark("imgedit"), lambda path: read_items("imgedit", path)),
    ("results", results, open_results),
    ("judgements", judgements, read_judgements),
    ("prompts", questionnaire, lambda path: load_questionnaire("wu-eval", path)),
    *folder_kinds(generator),
)  # fmt: skip
