"""What is known before the run is said on the input: VALIDATE_INPUTS of the nodes, and warnings after it."""

from __future__ import annotations

import asyncio
import uuid

import execution
import pytest
import torch

import nodes as stock

HOSTILE = ["", "..", "../../x", "/etc", "\0", "half \ud83d", "x" * 5000, "a/../../../x"]


def said(nodes, node: str, /, **inputs) -> str:
    """The sentence; one that any log and client can take."""
    answer = nodes[node].VALIDATE_INPUTS(**inputs)
    assert isinstance(answer, str), inputs
    answer.encode()
    return answer


@pytest.mark.parametrize("path", HOSTILE)
def test_pairs_and_benchmarks_that_are_not_there(nodes, path):
    assert "there is no such folder" in said(nodes, "HYWUTrainGenerator", pairs=path)
    assert "there is no such benchmark" in said(nodes, "HYWUBenchmarkItems", path=path)


@pytest.mark.parametrize("name", [n for n in HOSTILE if n])
def test_names_and_folders_that_cannot_be_used(nodes, name):
    assert "name can't be used" in said(nodes, "HYWUTrainGenerator", name=name)
    assert "method can't be used" in said(nodes, "HYWUJudge", method=name)
    assert "leads out of ComfyUI's output folder" in said(nodes, "HYWUJudge", folder=name)


def test_the_bundled_generators_name_is_taken(nodes):
    assert "the bundled generator's" in said(nodes, "HYWUTrainGenerator", name="bundled")


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_an_empty_instruction(nodes, text):
    assert "instruction is empty" in said(nodes, "HYWUConditionEncode", instruction=text)


def test_an_instruction_or_a_conditioning_that_comes_by_a_link(nodes):
    """Links arrive as None: what they bring is not known yet."""
    check = nodes["HYWUConditionEncode"].VALIDATE_INPUTS
    assert check(instruction=None) is True
    assert check(instruction="", conditioning=None) is True
    assert check(instruction="blur") is True


def test_what_can_be_used_passes(nodes):
    assert nodes["HYWUTrainGenerator"].VALIDATE_INPUTS(name="a_b-1", pairs="samples") is True
    assert nodes["HYWUTrainGenerator"].VALIDATE_INPUTS() is True
    assert nodes["HYWUBenchmarkItems"].VALIDATE_INPUTS(path="samples") is True
    assert nodes["HYWUJudge"].VALIDATE_INPUTS(method="mine", folder="a/b") is True


@pytest.fixture
def installed(nodes, monkeypatch):
    for name, cls in nodes.items():
        monkeypatch.setitem(stock.NODE_CLASS_MAPPINGS, name, cls)


def validated(graph: dict) -> dict[str, list[str]]:
    """Node -> the inputs that ComfyUI marks."""
    found = asyncio.run(execution.validate_prompt(str(uuid.uuid4()), graph, None))
    return {
        key: [error["extra_info"].get("input_name") for error in node["errors"]]
        for key, node in found[3].items()
    }


@pytest.mark.parametrize(
    ("inputs", "marked"),
    [
        ({"instruction": ""}, {"encode": ["instruction"]}),
        ({"instruction": "blur"}, {}),
        ({"instruction": "", "conditioning": ["text", 0]}, {}),
    ],
)
def test_comfyui_marks_the_input(installed, weights, inputs, marked):
    graph = {
        "load": {
            "class_type": "HYWULoadGenerator",
            "inputs": {"checkpoint": "bundled", "precision": "auto"},
        },
        "editor": {"class_type": "HYWULoadBundledEditor", "inputs": {}},
        "image": {
            "class_type": "EmptyImage",
            "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0},
        },
        "text": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["editor", 1]}},
        "encode": {
            "class_type": "HYWUConditionEncode",
            "inputs": {"generator": ["load", 0], "image": ["image", 0], **inputs},
        },
        "end": {
            "class_type": "HYWUSaveCondition",
            "inputs": {"condition": ["encode", 0], "filename_prefix": "x"},
        },
    }
    assert validated(graph) == marked


# -- after it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["add a red hat to the dog", "turn the cat into a lion"])
def test_words_that_were_not_trained_are_said_on_the_node_and_in_the_log(
    call, weights, caplog, text
):
    generator = call.HYWULoadGenerator("bundled", "float32")[0]
    ui = call.shown("HYWUConditionEncode", generator, torch.rand(1, 16, 16, 3), text)
    (warning,) = ui["hywu_warnings"]
    assert "It knows: blur, deblur" in warning
    assert warning in caplog.text


def test_words_that_were_trained_give_no_warning(call, weights):
    generator = call.HYWULoadGenerator("bundled", "float32")[0]
    ui = call.shown("HYWUConditionEncode", generator, torch.rand(1, 16, 16, 3), "blur the image")
    assert ui["hywu_warnings"] == []


def test_rows_of_a_benchmark_that_cannot_be_used_are_said_on_the_node(call, base):
    folder = base / "input" / "bad_rows"
    folder.mkdir(parents=True, exist_ok=True)
    from PIL import Image

    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "items.jsonl").write_text(
        '{"key": "a", "source": "a.png", "instruction": "blur it"}\n'
        '{"key": "b", "source": "gone.png", "instruction": "blur it"}\n',
        encoding="utf-8",
    )
    ui = call.shown("HYWUBenchmarkItems", "folder", "bad_rows", 0, 0)
    (warning,) = ui["hywu_warnings"]
    assert "Not usable:" in warning
    assert "gone.png" in warning
