"""HunyuanImage-3's base on a device, the course of bench/hunyuan_device.py: whole, on a CPU at tiny size."""

from __future__ import annotations

import json

import pytest
import torch

from bench import hunyuan_base, hunyuan_device, hunyuan_one
from hywu_core.bases.hunyuan_image3.model import HunyuanImage3

CPU = ["--device", "cpu", "--tiny"]


@pytest.fixture
def measured(tmp_path):
    def measured(name: str) -> dict:
        path = tmp_path / f"{name}.json"
        reference = ["--reference", str(tmp_path / "prediction.safetensors")]
        hunyuan_one.main(["--variant", name, "--json", str(path), *reference, *CPU])
        found = json.loads(path.read_text())
        assert "failed" not in found, found
        return found

    return measured


def test_every_variant_is_measured(measured):
    """Of one base: bit by bit the resident one's prediction where nothing is quantized, near it elsewhere."""
    found = {name: measured(name) for name in hunyuan_one.VARIANTS}
    resident = found["resident"]
    assert resident["finite"]
    for name, each in found.items():
        variant = hunyuan_one.VARIANTS[name]
        assert each["kv_bytes"] == each["planned_kv_bytes"]
        assert all(each[kind]["median_s"] > 0 for kind in ("step", "prefix", "token"))
        step = each["step"]
        assert step["published_s"] == pytest.approx(
            step["median_s"] * (1 + 7 * step["share_in_layers"])
        )
        assert 0 < step["share_in_layers"] < 1  # how much of it depends on what else runs
        if name != "resident":
            exact = variant.method is None and not variant.lora
            assert each["equal"] is exact, name
            assert exact or 1e-4 < each["difference"] < 0.6, name
        if variant.streamed:
            assert each["weights_bytes"] == each["placed_bytes"] < 0.5 * resident["weights_bytes"]
        if variant.streamed and variant.method is None:
            # a step reaches all 16 experts of 4 layers, a token of text 2
            whole = 4 * 16 * 3 * 64 * 48 * 4
            assert each["step"]["moved_bytes"] == each["prefix"]["moved_bytes"] == whole
            assert each["token"]["moved_bytes"] == whole // 8
    for name in ("resident", "streamed", "nf4"):
        for kind in ("step", "prefix"):
            each = found[name][kind]
            planned = each["planned_activation_bytes"]
            assert each["peak_over_weights_and_kv_bytes"] == pytest.approx(planned, rel=0.1)


def test_the_vae_and_the_rates_are_measured(measured):
    assert measured("rates")["sustained_tflops"] > 0
    for each in measured("vae").values():
        if "median_s" in each:
            assert each["peak_over_weights_bytes"] > 0.5 * each["planned_bytes"]


def test_the_whole_course_runs_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "figures.json"
    names = ["rates", "resident", "nf4_streamed"]
    hunyuan_device.main(["--json", str(path), *CPU, "--layers", "2", "--only", *names])
    figures = json.loads(path.read_text())
    found = figures["measured"]
    assert list(found) == [f"base/{name}" for name in names]
    assert [n for n, each in found.items() if "failed" in each] == []
    assert 0 < found["base/resident"]["step"]["share_of_sustained"] < 1.5
    assert found["base/nf4_streamed"]["difference"] > 0
    assert figures["environment"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert "nf4_streamed" in said
    assert "32 layers" in said


def test_shares_are_of_the_devices_rates():
    found = {"step": {"median_s": 0.5, "operations": 100e12, "moved_bytes": 20e9}, "token": {}}
    hunyuan_device.shares(found, {"sustained_tflops": 700.0, "upload_gbs": 55.0})
    assert found["step"]["share_of_sustained"] == pytest.approx(100 / 700 / 0.5)
    assert found["step"]["share_of_copy"] == pytest.approx(20 / 55 / 0.5)
    assert found["step"]["bound_share"] == found["step"]["share_of_copy"]
    assert found["token"] == {}
    hunyuan_device.shares(found, {"failed": "no device"})


def test_no_variant_is_fatal(tmp_path, monkeypatch, capsys):
    """One that fails says why, what came before it stays, and the course goes on."""

    def breaks(*_args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(hunyuan_one, "_token", breaks)
    path = tmp_path / "one.json"
    hunyuan_one.main(["--variant", "streamed", "--json", str(path), *CPU])
    found = json.loads(path.read_text())
    assert "illegal memory access" in found["failed"]
    assert found["step"]["median_s"] > 0
    monkeypatch.setattr(hunyuan_device.isolated, "call", lambda *_: {"failed": "ended after 50 s"})
    hunyuan_device.main(["--json", str(path), *CPU, "--only", "rates", "fp8"])
    assert "base/fp8: ended after 50 s" in capsys.readouterr().out
    hunyuan_device.main(["--json", str(path), *CPU, "--seconds", "1", "--only", "fp8"])
    assert "were left" in json.loads(path.read_text())["measured"]["base/fp8"]["skipped"]
    capsys.readouterr()


def test_the_widths_are_the_published_ones():
    config = hunyuan_base.config_of(32, tiny=False)
    with torch.device("meta"):
        model = HunyuanImage3(config)
    banks = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert 2 * banks == 154_618_822_656
    first = hunyuan_base.sequences(config, hunyuan_base.Sizes())[0]
    assert first.target.timestep > 6_000
    assert first.target.grid.height == first.target.grid.width == 64
