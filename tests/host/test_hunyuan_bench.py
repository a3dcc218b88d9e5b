"""bench/hunyuan_comfyui.py: the whole course on a CPU at tiny size, so that it runs when there is a GPU."""

from __future__ import annotations

import json

import torch

from bench import hunyuan_comfyui
from bench.hunyuan_base import config_of
from hywu_core.bases.hunyuan_image3 import tiny
from hywu_core.bases.hunyuan_image3.config import HunyuanConfig
from hywu_core.bases.hunyuan_image3.model import HunyuanImage3


def test_the_course_runs_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "figures.json"
    options = ["--size", "128x128", "--steps", "3", "--json", str(path)]
    assert hunyuan_comfyui.main(["--cpu", "--tiny", *options]) == 0
    (found,) = json.loads(path.read_text())["measured"].values()
    assert "failed" not in found, found
    assert 0 < found["step_s"] < found["first_s"]
    assert found["dynamic"] is False
    assert "cpu/0" in capsys.readouterr().out


def test_the_drawn_folder_has_the_published_widths(tmp_path, monkeypatch):
    """Checked without drawing it: 10 GB."""
    seen = []
    monkeypatch.setattr(
        tiny, "_write_base", lambda folder, _: seen.append(tiny._config(tiny._write_tokenizer(folder.parent), False))
    )  # fmt: skip
    hunyuan_comfyui.write_folder(tmp_path / "drawn", 2)
    config = HunyuanConfig.from_json(seen[0])
    with torch.device("meta"):
        made, wanted = HunyuanImage3(config), HunyuanImage3(config_of(2, tiny=False))
    assert {n: p.shape for n, p in made.model.named_parameters()} == {
        n: p.shape for n, p in wanted.model.named_parameters()
    }
    assert config.max_positions == 22_800
