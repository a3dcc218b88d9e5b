"""What users have saved goes on: nodes, workflows and files of November 2026, kept in tests/host/stored."""

from __future__ import annotations

import asyncio
import json
import shutil
import uuid

import execution
import folder_paths
import pytest
from hywu_nodes import NODE_DISPLAY_NAME_MAPPINGS
from hywu_nodes.hywu_core.condition import Condition
from hywu_nodes.hywu_core.formats import load_lora

import dev
import nodes as stock

STORED = dev.ROOT / "tests" / "host" / "stored"
PINNED = json.loads((STORED / "nodes.json").read_text(encoding="utf-8"))
#: Options that say how an input looks.
SHOWN = {"tooltip", "advanced", "label_on", "label_off"}
#: Lists of files, which are as long as the folders are full.
FILES = {"checkpoint", "condition", "lora"}
GRAPHS = sorted(path.stem for path in (STORED / "api").glob("*.json"))


@pytest.fixture(scope="module", autouse=True)
def installed(nodes, weights):
    """The nodes are ComfyUI's, those that the workflows take from its own extras too."""
    stock.NODE_CLASS_MAPPINGS.update(nodes)
    asyncio.run(stock.init_builtin_extra_nodes())
    yield
    for name in nodes:
        del stock.NODE_CLASS_MAPPINGS[name]


def described(cls: type, group: str) -> list[list]:
    """Inputs of a group in the form of nodes.json: name, type, options but for what is only shown."""
    found = []
    for name, (kind, *options) in cls.INPUT_TYPES().get(group, {}).items():
        rest = {key: value for key, value in (options or [{}])[0].items() if key not in SHOWN}
        kind = "files" if name in FILES and isinstance(kind, list) else kind
        found.append([name, kind, json.loads(json.dumps(rest))])
    return found


def without_looks(inputs: list[list]) -> list[list]:
    """Pinned inputs without the options that say how they look."""
    return [
        [name, kind, {key: value for key, value in options.items() if key not in SHOWN}]
        for name, kind, options in inputs
    ]


@pytest.mark.parametrize("name", PINNED)
def test_a_node_is_what_it_was(nodes, name):
    cls, pinned = nodes[name], PINNED[name]
    assert NODE_DISPLAY_NAME_MAPPINGS[name] == pinned["display_name"]
    assert pinned["category"] == cls.CATEGORY
    assert bool(getattr(cls, "OUTPUT_NODE", False)) == pinned["output_node"]
    outputs = [list(pair) for pair in zip(cls.RETURN_TYPES, cls.RETURN_NAMES, strict=True)]
    assert outputs[: len(pinned["outputs"])] == pinned["outputs"]
    assert described(cls, "required") == without_looks(pinned["inputs"]["required"])
    # further ones come after those that there were, so that saved values keep their places
    optional = without_looks(pinned["inputs"].get("optional", []))
    assert described(cls, "optional")[: len(optional)] == optional


def with_files(graph: dict) -> dict:
    """The graph with a checkpoint and LoRAs that are here in place of a user's own."""
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] == "UNETLoader":
            inputs["unet_name"] = folder_paths.get_filename_list("diffusion_models")[0]
    return graph


@pytest.fixture(scope="module", autouse=True)
def files(base):
    """A file in each folder that the workflows take one from."""
    for folder, name in (("input", "x.png"), ("models/diffusion_models", "x.safetensors")):
        (base / folder).mkdir(parents=True, exist_ok=True)
        (base / folder / name).touch()


@pytest.mark.parametrize("name", GRAPHS)
def test_an_api_workflow_validates(name):
    graph = json.loads((STORED / "api" / f"{name}.json").read_text(encoding="utf-8"))
    unknown = {node["class_type"] for node in graph.values()} - stock.NODE_CLASS_MAPPINGS.keys()
    assert not unknown
    found = asyncio.run(execution.validate_prompt(str(uuid.uuid4()), graph, None))
    ours = {
        key: node["errors"]
        for key, node in found[3].items()
        if graph[key]["class_type"].startswith("HYWU")
    }
    assert ours == {}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_saved_workflow_keeps_its_widgets(nodes, name):
    workflow = json.loads((STORED / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    looked_at = 0
    for node in workflow["nodes"]:
        if node["type"] not in nodes:
            continue
        looked_at += 1
        cls = nodes[node["type"]]
        inputs = [i for group in cls.INPUT_TYPES().values() for i in group.items()]
        kinds = {key: kind for key, (kind, *_) in inputs}
        named = [socket["name"] for socket in node["inputs"]]
        assert set(named) <= kinds.keys()
        for socket in node["inputs"]:
            if isinstance(kinds[socket["name"]], str):
                assert kinds[socket["name"]] == socket["type"]
        widgets = [
            (key, spec)
            for key, spec in inputs
            if isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN")
        ]
        values = list(node.get("widgets_values") or [])
        for key, (kind, *_) in widgets:
            if not values:  # added since
                assert key not in [i[0] for i in PINNED[node["type"]]["inputs"]["required"]]
                continue
            value = values.pop(0)
            if isinstance(kind, list):
                assert key in FILES or value in kind
            else:
                wanted = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[kind]
                assert isinstance(value, wanted)
            # the frontend's widget beside seeds and counters has a value of its own
            if values and values[0] in ("fixed", "increment", "decrement", "randomize"):
                values.pop(0)
        assert not values, (node["type"], values)
    assert looked_at


def test_a_stored_condition_loads(call, base):
    shutil.copy(STORED / "condition.safetensors", base / "input")
    (loaded,) = call.HYWULoadCondition("condition.safetensors")
    assert isinstance(loaded, Condition)
    assert {name: list(part.shape) for name, part in loaded.parts.items()} == {
        "image": [2, 3, 4], "words": [2, 2, 4],
    }  # fmt: skip
    assert loaded.masks["words"].tolist() == [[True, True], [True, False]]
    assert loaded.fingerprint == "f" * 32
    assert loaded.digest() == "cc4142450cf24976d78f43cdc1b60593"
    assert loaded.origin == {"instruction": ["blur", "sharpen"], "encoder": "comfyui"}


@pytest.mark.parametrize(
    "name", ["lora_native.safetensors", "lora_comfyui.safetensors", "lora_peft"]
)
def test_a_stored_lora_loads(call, base, name):
    target = base / "output" / "loras" / name
    if (STORED / name).is_dir():
        shutil.copytree(STORED / name, target, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(STORED / name, target)
    loaded, _, summary = call.HYWULoadLoRA(name)
    assert json.loads(summary)["provenance"]["base"] == "tiny"
    norms = {path: float(value) for path, value in loaded.norms().items()}
    assert norms == pytest.approx(NORMS, rel=1e-5)
    assert list(load_lora(target)) == list(NORMS)


#: Of the LoRA that stands in the three files, as it was when they were written.
NORMS = {"blocks.0": 3.547355, "blocks.1": 5.828938}
