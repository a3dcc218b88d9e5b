"""A generator short of memory inside ComfyUI: precision, the estimate, and weights that are streamed."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def figures(run_inside, tmp_path_factory):
    return run_inside("low_vram_figures.py", tmp_path_factory.mktemp("low_vram"))


def test_a_folder_of_extra_model_paths_is_listed(figures):
    """The checkpoint of all these figures lies there."""
    assert figures["listed"] == ["bundled", "g.safetensors"]


@pytest.mark.parametrize("where", ["block", "load"])
def test_out_of_memory_once_streams_and_gives_the_same_lora(figures, where):
    found = figures[where]
    assert found["same"]
    assert len(found["warnings"]) == 1
    assert "streamed from host memory" in found["warnings"][0]
    # nothing but norms and embeddings was on the device
    assert found["left_in_host_memory"] == found["layers"] > 30
    assert found["loaded_while_streaming"] < 0.02 * found["size"]
    # the next generation is an ordinary one
    assert found["after"]
    assert found["loaded_after"] == found["size"]


def test_out_of_memory_twice_is_an_error_that_says_what_to_do(figures):
    assert "even with the generator's weights streamed" in figures["twice"]["error"]
    assert "fewer images" in figures["twice"]["error"]
    assert figures["twice"]["after"]


def test_other_errors_are_not_tried_again(figures):
    assert figures["other"] == {"error": "other", "warnings": []}


def test_precisions_of_the_weights(figures):
    found = figures["precisions"]
    assert set(found) == {"auto", "float32", "bfloat16", "float16", "fp8-weights"}
    whole = found["float32"]["bytes"]
    for name, share, most in (
        ("float32", 1, 0), ("bfloat16", 0.5, 0.03), ("float16", 0.5, 0.005), ("fp8-weights", 0.25, 0.06),
    ):  # fmt: skip
        assert abs(found[name]["bytes"] / whole - share) < 0.02
        assert found[name]["error"] <= most
        assert (found[name]["error"] > 0) == (most > 0)
    # results of one precision are never taken for another's
    assert len({found[name]["identity"] for name in found if name != "auto"}) == 4


def test_rounded_weights_are_cast_back_exactly(figures):
    assert figures["rounded"] == {"same": True, "streamed": True, "dtype": "torch.float8_e4m3fn"}


def test_the_memory_manager_is_told_what_a_generation_needs(figures):
    (told,) = figures["estimate"]["told"]
    assert figures["estimate"]["peak"] <= told <= 4 * figures["estimate"]["peak"]
