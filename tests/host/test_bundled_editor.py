"""The bundled editor under ComfyUI's stock nodes, against the engine alone."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def figures(run_inside, weights):
    return run_inside("editor_figures.py", timeout=400, threads=1)


@pytest.mark.parametrize("case", ["small", "large", "four", "lines"])
def test_stock_nodes_give_what_the_engine_gives(figures, case):
    assert figures["changes"] > 0.01
    assert figures[case] < 1e-3


def test_every_stock_sampler_and_scheduler_works(figures):
    assert figures["samplers"] == {}


def test_guidance_and_denoise_have_an_effect(figures):
    assert figures["cfg"] > 1e-3
    assert figures["denoise"] > 1e-3


def test_nodes_that_replace_the_sampling_keep_the_scale_of_time(figures):
    """ModelSamplingSD3 counts in thousandths."""
    assert figures["shifted"] < 1e-3


@pytest.mark.parametrize("what", ["offload", "generator_offload"])
def test_a_partly_loaded_network_gives_the_same(figures, what):
    partial, offloaded, reloaded = figures[what]
    assert partial
    assert offloaded < 1e-5
    assert reloaded == 0


def test_the_lora_cache_keeps_to_its_limit(figures):
    """The one that was not used for longest goes; what exceeds the limit alone is not kept."""
    limits = figures["cache"].pop("limits")
    assert figures["cache"] == {"found": ["a", "c"], "bytes": 2.0, "too_large": 0}
    assert limits == {"16": 16, "much": 2048, "-3": 2048}


def test_gray_and_transparent_images(figures):
    assert figures["rgba"] == 0
    assert figures["gray"][1] == 3


@pytest.mark.parametrize(
    ("case", "words"), [("lines", "3 lines and the latent 1 images"), ("tiny", "at least 8 x 8")]
)
def test_errors_say_what_disagrees(figures, case, words):
    assert words in figures["errors"][case]


def test_the_import_costs_less_than_a_second(figures):
    assert figures["import_seconds"] < 1
