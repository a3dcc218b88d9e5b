"""Any base model: LoRAs on random-weight checkpoints of real architectures, by stock loaders and samplers."""

from __future__ import annotations

import pytest

#: name -> (class in ComfyUI, number of stacks, whether an fp8 copy is compared)
EXPECTED = {
    "SD 1.5": ("BaseModel", 2, False),
    "SDXL": ("SDXL", 1, False),
    "SD3": ("SD3", 2, True),
    "Flux": ("Flux", 2, False),
    "Chroma": ("Chroma", 2, False),
    "Qwen-Image": ("QwenImage", 1, False),
    "Wan 2.1": ("WAN21", 1, True),
    "HunyuanImage 2.1": ("HunyuanImage21", 2, True),
    "Lumina 2": ("Lumina2", 2, False),
    "Z-Image": ("Lumina2", 2, False),
}
#: Largest difference of two latents that count as equal, as a share of the largest value.
EQUAL = 1e-5


@pytest.fixture(scope="module")
def run(run_inside, tmp_path_factory):
    """name -> figures; each architecture runs once, in a process of its own, which frees its memory."""
    found = {}

    def figures(name: str) -> dict:
        if name not in found:
            folder = tmp_path_factory.mktemp("architecture")
            shown = run_inside("architecture_figures.py", folder, name, timeout=900)
            for file in folder.iterdir():
                file.unlink()  # gigabytes
            found[name] = shown[name]
        assert "error" not in found[name], found[name]["error"]
        return found[name]

    return figures


@pytest.mark.parametrize("name", EXPECTED)
def test_a_generated_lora_acts_like_the_same_lora_from_a_file(run, name):
    found = run(name)
    kind, stacks, quantized = EXPECTED[name]
    assert found["model"] == kind
    assert found["finite"]
    # layout: every target is one that ComfyUI's own LoRA keys lead to, with the shape we say
    assert found["matched"] == 1
    assert len(found["stacks"]) >= stacks
    assert found["targets"] == sum(layers * modules for layers, _, modules in found["stacks"])
    node = found["node"]
    assert node["targets"] == found["targets"]
    assert node["tokens"] == node["values"] == 0
    assert 1e6 < node["parameters"] < 1e7
    assert node["seconds"] > 0
    assert node["lines"] > len(found["stacks"])
    assert found["foreign"]["same"]
    assert "connect the MODEL" in found["foreign"]["without_model"]
    # pictures
    assert found["merge"] < EQUAL
    assert found["unmerged"] < EQUAL
    assert found["items"] < EQUAL
    assert found["effect"] > 10 * EQUAL
    assert found["weights_same"]
    # two runs of one model: on some CPUs products round by where in memory their operands lie
    assert found["untouched"] < EQUAL / 10
    if quantized:
        assert found["fp8_weights"] > 0
        assert found["fp8_base"] < EQUAL
        assert found["fp8_unmerged"] < EQUAL
        assert found["fp8_effect"] > 10 * EQUAL
        # most of a faint LoRA is below half a step of fp8
        assert found["fp8_merged"] > 0.5 * found["fp8_effect"]
