"""The nodes on a real server: from checkpoint and condition files to LoRAs, and errors as a client sees them."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch

from hywu_core.condition import Condition
from hywu_core.generator.checkpoints import save_generator
from hywu_core.generator.config import GeneratorConfig
from hywu_core.generator.model import ParameterGenerator
from hywu_core.headless.client import Client, NodeFailed, Refused, run_sync
from hywu_core.headless.local import get_json
from hywu_core.layout import LoRALayout, Module, Stack

LAYERS = tuple(f"blocks.{i}" for i in range(3))


@pytest.fixture(scope="module")
def files(server):
    """A tiny generator with random weights and conditions for it, in the server's folders."""
    torch.manual_seed(0)
    stack = Stack(LAYERS, (Module("fc", 16, 24), Module("out", 24, 16)))
    config = GeneratorConfig(
        LoRALayout((stack,), 2, 2.0), {"hidden_states": 8}, 16, 2, 32, 16, 2, base="tiny"
    )
    generator = ParameterGenerator(config)
    generator.reset_parameters()
    torch.nn.init.normal_(generator.model.proj_out_B.weight, std=0.3)
    models = server.base / "models" / "hywu"
    save_generator(generator, models / "tiny.safetensors", overwrite=True)
    (models / "torn.safetensors").write_bytes((models / "tiny.safetensors").read_bytes()[:2000])
    inputs = server.base / "input"
    Condition({"hidden_states": torch.randn(3, 5, 8)}).save(inputs / "three.safetensors", True)
    Condition({"hidden_states": torch.randn(1, 5, 8)}).save(inputs / "one.safetensors", True)
    Condition({"hidden_states": torch.randn(1, 5, 9)}).save(inputs / "wide.safetensors", True)
    return generator.eval()


def graph(condition: str = "three", checkpoint: str = "tiny", **more: dict) -> dict:
    return {
        "load": {
            "class_type": "HYWULoadGenerator",
            "inputs": {"checkpoint": f"{checkpoint}.safetensors", "precision": "float32"},
        },
        "condition": {
            "class_type": "HYWULoadCondition",
            "inputs": {"condition": f"{condition}.safetensors"},
        },
        "generate": {
            "class_type": "HYWUGenerateLoRA",
            "inputs": {"generator": ["load", 0], "condition": ["condition", 0]},
        },
        "inspect": {"class_type": "HYWUInspectLoRA", "inputs": {"lora": ["generate", 0]}},
        **more,
    }


def save_condition(prefix: str) -> dict:
    inputs = {"condition": ["condition", 0], "filename_prefix": prefix}
    return {"class_type": "HYWUSaveCondition", "inputs": inputs}


def summary(record: dict) -> dict:
    return json.loads(record["outputs"]["generate"]["text"][0])


def test_every_node_explains_itself(server):
    nodes = {n: d for n, d in get_json(f"{server.url}/object_info").items() if n.startswith("HYWU")}
    assert len(nodes) >= 8
    for name, info in nodes.items():
        assert info["category"].startswith("HY-WU"), name
        assert info["description"], name
        assert len(info["output_tooltips"]) == len(info["output"]), name
        for kind, group in info["input"].items():
            shown = group.values() if kind != "hidden" else ()
            assert all(options[1].get("tooltip") for options in shown), name


def test_generates_one_lora_an_image_as_the_engine_does(server, files):
    record, _ = run_sync(server.url, graph(), timeout=120)
    assert summary(record)["loras"] == 3
    condition = Condition.load(server.base / "input" / "three.safetensors")
    with torch.no_grad():
        norms = files(condition).norms()
    shown = {}
    for line in record["outputs"]["inspect"]["text"][0].splitlines():
        path, *values = line.split()
        shown[path] = torch.tensor([float(value) for value in values])
    assert set(shown) == set(norms)
    for path, values in norms.items():
        torch.testing.assert_close(shown[path], values, rtol=1e-3, atol=1e-5)


def test_a_lora_is_not_generated_twice(server, files):
    async def free():
        async with Client(server.url) as client:
            await client.free()  # newer ComfyUIs keep results for longer than the next prompt

    run_sync(server.url, graph("one"), timeout=120)
    run_sync(server.url, graph("three"), timeout=120)
    asyncio.run(free())
    again, _ = run_sync(server.url, graph("one"), timeout=120)
    assert summary(again)["cached"]


def test_what_comfyui_has_kept_is_reported_again_where_it_can_be(server, files):
    """A seed that changes leaves most nodes as they are; a client still wants their reports."""
    info = get_json(f"{server.url}/object_info/HYWUGenerateLoRA")["HYWUGenerateLoRA"]
    first, _ = run_sync(server.url, graph("one"), timeout=120)
    again, _ = run_sync(server.url, graph("one"), timeout=120)
    assert ("generate" in again["outputs"]) == info.get("has_intermediate_output", False)
    if "generate" in again["outputs"] and "generate" in first["outputs"]:
        assert again["outputs"]["generate"] == first["outputs"]["generate"]


def test_stock_nodes_take_a_selected_item_and_refuse_a_batch(server, files):
    select = {
        "class_type": "HYWUSelectLoRA",
        "inputs": {"lora": ["generate", 0], "index": 1},
    }

    def save(source: list) -> dict:
        return {"class_type": "SaveLoRA", "inputs": {"lora": source, "prefix": "loras/stock"}}

    run_sync(server.url, graph(select=select, save=save(["select", 1])), timeout=120)
    assert list((server.base / "output" / "loras").glob("stock*.safetensors"))
    with pytest.raises(NodeFailed, match="HY-WU Select LoRA"):
        run_sync(server.url, graph(save=save(["generate", 1])), timeout=120)


def test_a_condition_is_saved_below_the_output_folder_only(server, files):
    record, _ = run_sync(server.url, graph(save=save_condition("conditions/kept")), timeout=120)
    name = record["outputs"]["save"]["text"][0]
    kept = Condition.load(server.base / "output" / name)
    assert kept.parts["hidden_states"].shape == (3, 5, 8)
    for prefix in ("../../escaped", "/tmp/escaped"):
        with pytest.raises(Refused, match="leads out of ComfyUI's output folder"):
            run_sync(server.url, graph(save=save_condition(prefix)), timeout=120)


def test_errors_are_one_sentence_and_the_next_prompt_works(server, files):
    with pytest.raises(NodeFailed, match="9 wide"):
        run_sync(server.url, graph("wide"), timeout=120)
    with pytest.raises(NodeFailed, match=r"torn\.safetensors"):
        run_sync(server.url, graph(checkpoint="torn"), timeout=120)
    with pytest.raises(Refused):
        run_sync(server.url, graph(checkpoint="../../secret"), timeout=120)
    record, _ = run_sync(server.url, graph(), timeout=120)
    assert summary(record)["loras"] == 3
