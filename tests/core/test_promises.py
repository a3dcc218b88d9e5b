"""What users' folders hold already: digests, file names, recipes and options, byte for byte.

The literals were written by the code of November 2026, before its rooms were rearranged. A change here is
a change of files, caches, results and scripts of users: never adjust a literal to the code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import LAYOUT
from PIL import Image
from tiny_editor import TINY
from torch import nn

from hywu_core import Condition, GeneratedLoRA, GeneratorConfig, ParameterGenerator, cli
from hywu_core.bases.bundled.checkpoint import editor_identity, load_editor, save_editor
from hywu_core.bases.bundled.model import Editor
from hywu_core.encoders.bundled import EditorEncoder
from hywu_core.encoders.transformers import TransformersEncoder
from hywu_core.evaluation.benchmarks import BENCHMARKS, load_questionnaire
from hywu_core.evaluation.benchmarks.base import Question
from hywu_core.evaluation.editors.bundled import _digest as files_digest
from hywu_core.evaluation.editors.comfy import ComfyEditor
from hywu_core.evaluation.items import Item, ItemList
from hywu_core.evaluation.judges.local import _folder_hash
from hywu_core.evaluation.results import Results, read_manifest, write_manifest
from hywu_core.evaluation.run import ImageHashes
from hywu_core.evaluation.store import Judgement, JudgementStore, StoreName
from hywu_core.experiments.conflict.plan import ConflictPlan
from hywu_core.experiments.conflict.runs import Runs
from hywu_core.experiments.conflict.runs import write_json as write_run_json
from hywu_core.files import read_header, save_tensors
from hywu_core.fingerprint import of_file
from hywu_core.formats.peft import adapter_config
from hywu_core.generator.checkpoints import checkpoint_digest, save_generator
from hywu_core.generator.official import save_official
from hywu_core.layout import LoRALayout, Module, Stack
from hywu_core.tokens import token_grid
from hywu_core.training.base import frozen_digest
from hywu_core.training.schedule import TrainConfig

OPTIONS = Path(__file__).parent / "promises" / "options.json"

OFFICIAL = LoRALayout((Stack(("m.0", "m.1"), (Module("self_attn.qkv_proj", 8, 24),)),), 2, 4.0)


def ramp(*shape: int, dtype=torch.float32) -> torch.Tensor:
    """The same values everywhere: no random generator is asked."""
    count = int(np.prod(shape))
    return (torch.arange(count, dtype=torch.float64) * 0.37 % 1 - 0.5).reshape(shape).to(dtype)


def sha(data: bytes | str) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()[:16]


def metadata(path: Path) -> str:
    """Digest of the safetensors header with its names, shapes, places and our JSON; not of versions."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    # safetensors writes the entries of the metadata in any order, the tensors in one
    header["__metadata__"] = sorted(header["__metadata__"].items())
    return sha(json.dumps(header))


def lora(layout: LoRALayout = LAYOUT) -> GeneratedLoRA:
    grids = []
    for stack in layout.stacks:
        grid = token_grid(stack, layout.rank, 8)
        grids.append(ramp(1, grid.num_layers, grid.num_tokens, layout.rank, 8))
    return GeneratedLoRA.from_grids(layout, grids, {"instruction": "a hat", "base": "toy"})


def fill(module: nn.Module) -> nn.Module:
    for value in module.state_dict().values():
        value.copy_(ramp(*value.shape))
    return module


def generator() -> ParameterGenerator:
    config = GeneratorConfig(
        OFFICIAL, {"hidden_states": 8}, token_dim=8, dim_accumulation=2, d_model=16, head_dim=8,
        num_blocks=1, encoder={"type": "toy"}, base="toy", provenance={"steps": 3},
    )  # fmt: skip
    return fill(ParameterGenerator(config))


def small_editor() -> Editor:
    return fill(Editor(replace(TINY, buckets=32, text_words=4, pool=2))).eval()


def items(tmp_path: Path, benchmark: str = "folder") -> ItemList:
    source = tmp_path / "source.png"
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(source)
    rows = (
        Item("00001", "blur", "make it “blurry” 模糊", source),
        Item("k 2", "style_change", "as a sketch", source, "cn", intersection=True),
    )
    return ItemList(benchmark, rows, ())


# -- digests -----------------------------------------------------------------------------------------


def test_condition_digest():
    mask = torch.tensor([[True, False, True]])
    parts = {"vision": ramp(1, 2, 4), "text": ramp(1, 3, 5, dtype=torch.bfloat16)}
    assert Condition(parts, {"text": mask}).digest() == "9e7cf00fd99df80c87423e9d724bd06c"
    assert (
        Condition.of(ramp(2, 3, 4, dtype=torch.float16)).digest()
        == "5630082c402dfaa95a44f9dea3f08a92"
    )


def test_layout_digests():
    assert LAYOUT.digest == "2dbdabf8147f82e9"
    assert OFFICIAL.digest == "f44fc38b0e8a6aec"


def test_checkpoint_digests(tmp_path):
    small, large = tmp_path / "a.bin", tmp_path / "b.bin"
    small.write_bytes(bytes(range(256)) * 9)
    large.write_bytes(np.arange(2_000_003, dtype=np.uint32).tobytes())
    assert checkpoint_digest((small,)) == "17a6afaae64c8952d531c76d7d37f664"
    assert checkpoint_digest((large, small)) == "65ab88a5e4e487829a867aa736c833ae"


def test_digests_of_modules(tmp_path):
    editor = small_editor()
    assert editor_identity(editor) == "6534991c3f9a0f52"
    assert editor_identity(editor.bfloat16()) == "e4de76043c0000d2"
    assert (
        frozen_digest(small_editor())
        == "7240c9239d9978d56f9dda4d248c0b84c995292641f91170623aa7fb40ad3a6e"
    )
    assert editor_identity(load_editor()) == "21d6d01144f60037"


def test_fingerprints_of_encoders():
    encoder = EditorEncoder(small_editor(), "abc")
    made = encoder(ramp(1, 3, 16, 24) + 0.5, ["make it “old”"])
    assert made.fingerprint == "b1d60b217af963cf7cb22ce9e536b8b5"
    of_transformers = TransformersEncoder.__new__(TransformersEncoder)
    of_transformers._encoders = {"vision": None, "text": None}
    of_transformers.identity, of_transformers.text_padding = {"vision": "v", "text": "t"}, 4
    of_transformers.parts = {"vision": 8, "text": 6}
    rows = [[ramp(3, 4, 5), ramp(3, 2, 2)], [ramp(3, 4, 5)]]
    assert of_transformers._fingerprint(rows, ["a", "b"]) == "b57e8def6745f3ee5df43ba6e6e3ce60"


def test_digests_of_files(tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    one.write_bytes(b"one" * 1000)
    two.write_bytes(b"two" * 7)
    assert of_file(one) == "2fce97fe6ec8811452255c10caff5220"
    assert files_digest([one, tmp_path]) == "59b9fefc0db03b93"
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert _folder_hash(tmp_path) == "02e73f9f"


# -- evaluation ----------------------------------------------------------------------------------------


def test_fingerprints_of_items(tmp_path):
    chosen = items(tmp_path)
    assert chosen.fingerprint() == "7a0bf45aef40d697"
    assert [item.id for item in chosen.items] == ["blur/en/00001", "style_change/cn/k 2"]


def test_places_of_results(tmp_path):
    places = {
        name: [
            Results(tmp_path / "m", BENCHMARKS[name]).image(item).relative_to(tmp_path).as_posix()
            for item in items(tmp_path).items
        ]
        for name in ("gedit", "imgedit", "folder")
    }
    plain = ["m/00001.png", "m/k 2.png"]
    assert places["imgedit"] == places["folder"] == plain
    assert places["gedit"] == [
        "m/fullset/blur/en/00001.png",
        "m/fullset/style_change/cn/k 2.png",
    ]


def test_images_hash(tmp_path):
    results, item = Results(tmp_path / "m", BENCHMARKS["folder"]), items(tmp_path).items[0]
    item.source.write_bytes(b"source")
    assert ImageHashes(results).of(item) == "6306457e6ee491982a6743c5"
    results.root.mkdir()
    results.image(item).write_bytes(b"edited")
    assert ImageHashes(results).of(item) == "86cc8024fbf724373c2cb601"


def test_judgement_stores(tmp_path):
    name = StoreName("gpt-4.1", "chat-1", "wu-eval", "ours-1")
    assert name.file_name == "wu-eval__gpt-4.1__chat-1__3da9ab0b.jsonl"
    unexpected = StoreName("a/b ü" * 30, "v", "gedit", "file-1")
    assert (
        unexpected.file_name
        == "gedit__a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a-b-a__a638572e.jsonl"
    )
    with JudgementStore(tmp_path, name, writable=True) as store:
        store.append(Judgement("t/en/1", "wu-eval", "p", "q", "answered", '{"a": "é"}', "m", 1, 2))
    assert sha(store.path.read_bytes()) == "d703771950ee177e"


def test_questions(tmp_path):
    assert Question("q", "make it “old”", ("edited",)).digest == "d5d4ca2a63e2481f"
    assert load_questionnaire("gedit").version == "ours-1"
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"wu-eval": "score <instruction> é", "more": "x"}))
    assert load_questionnaire("wu-eval", path).version == "file-84bcd3f2"


def test_manifest(tmp_path):
    results = Results(tmp_path / "mine", BENCHMARKS["folder"])
    results.root.mkdir()
    write_manifest(results, items(tmp_path), {"kind": "é"}, tmp_path, 3, {"tasks": None})
    assert read_manifest(results.root)["selection"] == {"tasks": None}
    text = (results.root / "hywu_run.json").read_text("utf-8")
    assert sha(text.replace(json.dumps(str(tmp_path.resolve())), '"DATA"')) == "58eb3ecd510fe3bb"


def test_workflow_of_a_comfy_editor(tmp_path):
    graph = {"3": {"class_type": "K", "inputs": {"seed": 1, "image": "é"}}}
    path = tmp_path / "w.json"
    path.write_text(json.dumps(graph))
    editor = ComfyEditor(
        "http://127.0.0.1:8188", path, image="3.image", instruction="3.image", seed="3.seed"
    )
    assert editor.describe() == {
        "kind": "comfy",
        "workflow": "df4cff861a9f6207",
        "inputs": {"image": "3.image", "instruction": "3.image", "seed": "3.seed"},
        "output": None,
    }


# -- files of weights ----------------------------------------------------------------------------------


def test_lora_files(tmp_path):
    assert metadata(lora().save(tmp_path / "native")) == "353346e0c4a5330a"
    assert metadata(lora().save(tmp_path / "comfy", "comfyui")) == "deee6623f60bf897"
    folder = lora().save(tmp_path / "peft", "peft")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert metadata(folder / "adapter_model.safetensors") == "da2a8e7f6ffd778c"
    assert sha((folder / "adapter_config.json").read_bytes()) == "204f4fda8008ce27"
    assert adapter_config(lora())["lora_alpha"] == 3


def test_condition_file(tmp_path):
    made = Condition({"a": ramp(1, 2, 3)}, {"a": torch.ones(1, 2, dtype=torch.bool)}, "f", {"x": 1})
    path = made.save(tmp_path / "c")
    assert path.name == "c.safetensors"
    assert metadata(path) == "227b5f7c178c01cc"


def test_generator_files(tmp_path):
    assert metadata(save_generator(generator(), tmp_path / "g")) == "9549de5cf82abc6c"
    save_official(generator(), tmp_path / "one")
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert sha((tmp_path / "one" / "config.json").read_bytes()) == "c31ab81f2428db97"
    assert metadata(tmp_path / "one" / "model.safetensors") == "f694a8afd4208d98"
    save_official(generator(), tmp_path / "two", shard_bytes=9000)
    shards = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    names = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert names == ["config.json", *shards, "model.safetensors.index.json"]
    index = (tmp_path / "two" / "model.safetensors.index.json").read_bytes()
    assert sha(index) == "95a3d1a10e2c6a9f"


def test_editor_file(tmp_path):
    path = save_editor(small_editor(), tmp_path / "editor.safetensors", {"steps": 1})
    assert metadata(path) == "d3039f34c0a2120c"


def test_header_of_any_file(tmp_path):
    path = save_tensors(tmp_path / "x", {"v": ramp(2)}, {"é": [1, None]}, metadata={"z": "1"})
    assert read_header(path) == {"é": [1, None]}
    assert metadata(path) == "de5a9515743d4420"


# -- training ------------------------------------------------------------------------------------------


def test_train_config():
    assert json.dumps(TrainConfig(100).to_json()) == (
        '{"steps": 100, "batch_size": 24, "lr": 0.0004, "warmup": 20, "final_lr": 0.02, '
        '"weight_decay": 0.0, "clip": 1.0, "ema": 0.98, "accumulation": 1, "precision": "no", '
        '"seed": 0, "optimizer": "adamw"}'
    )


def test_plan():
    assert sha(json.dumps(ConflictPlan().to_json())) == "0bc63b917269028c"
    assert sha(json.dumps(ConflictPlan.quick().to_json())) == "4c76bdcde8b8e01d"
    assert sha("\n".join(run.name for run in ConflictPlan().runs)) == "f39b9febb34b52b1"
    assert Runs.__init__.__code__.co_varnames[1:5] == ("base", "pool", "plan", "folder")


def test_json_of_runs(tmp_path):
    write_run_json(tmp_path / "x.json", {"b": [1.5, "é"], "a": None})
    text = (tmp_path / "x.json").read_text("utf-8")
    assert text == '{\n "b": [\n  1.5,\n  "\\u00e9"\n ],\n "a": null\n}\n'


# -- the command line ----------------------------------------------------------------------------------


def options(parser: argparse.ArgumentParser) -> dict[str, dict]:
    """What a script relies on: each option or argument by name, subcommands by theirs."""
    found: dict[str, dict] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name: options(child) for name, child in action.choices.items()}
        elif not isinstance(action, argparse._HelpAction):
            found[" ".join(action.option_strings) or action.dest] = {
                "kind": type(action).__name__.strip("_"),
                "nargs": action.nargs,
                "default": str(action.default),
                "choices": None if action.choices is None else [str(c) for c in action.choices],
                "required": action.required,
            }
    return found


def command_options() -> dict[str, dict]:
    found = {}
    for name, (module, _) in cli.COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module, package=cli.__name__).configure(parser)
        found[name] = options(parser)
    return found


#: Defaults of another network's training; nobody's run goes on with them.
NEW_DEFAULTS = {
    f"hywu pretrain {name}" for name in ("--steps", "--batch-size", "--lr", "--optimizer")
}


def check_kept(promised: dict, found: dict, where: str) -> None:
    for name, value in promised.items():
        assert name in found, f"{where} {name} is gone"
        if "kind" in value:
            kept = {"default": found[name]["default"]} if f"{where} {name}" in NEW_DEFAULTS else {}
            if set(value["choices"] or ()) <= set(found[name]["choices"] or ()):
                kept["choices"] = found[name]["choices"]
            assert found[name] == {**value, **kept}, f"{where} {name} has changed"
        else:
            check_kept(value, found[name], f"{where} {name}")
    for name in found.keys() - promised.keys():
        assert not found[name].get("required"), f"{where} {name} is new and required"


def test_commands_keep_their_options():
    check_kept(json.loads(OPTIONS.read_text("utf-8")), command_options(), "hywu")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["inspect", "missing.safetensors"], 1), (["inspect"], 2), (["nonsense"], 2)],
)
def test_exit_codes(arguments, code, capsys):
    try:
        found = cli.main(arguments)
    except SystemExit as stop:
        found = stop.code
    assert found == code
