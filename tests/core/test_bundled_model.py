"""The bundled editor's U-Net: shapes, sizes, steering, LoRA targets, tiles, files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from hywu_core import LoRALayout, inject
from hywu_core.bases.bundled import model as module
from hywu_core.bases.bundled.checkpoint import (
    FORMER,
    architecture,
    check_made_for,
    editor_identity,
    load_editor,
    save_editor,
)
from hywu_core.bases.bundled.model import Editor, EditorConfig
from hywu_core.bases.bundled.sampling import edit, tiled_velocity
from hywu_core.bases.bundled.transformer import TransformerConfig, TransformerEditor
from hywu_core.encoders.bundled import EditorEncoder
from hywu_core.errors import HYWUError
from hywu_core.lora import GeneratedLoRA

SMALL = EditorConfig(
    widths=(4, 6, 8), encode=(0, 1, 0), decode=(1, 1, 2), steer=8, text_width=16, text_heads=2,
    text_depth=1, buckets=256, max_pixels=40 * 40,
)  # fmt: skip


def random_editor(config: EditorConfig = SMALL, seed: int = 0) -> Editor:
    """With a correction that is not zero and steering that matters."""
    torch.manual_seed(seed)
    editor = Editor(config)
    editor.reset_parameters()
    with torch.no_grad():
        for block in (m for m in editor.modules() if isinstance(m, module.Block)):
            block.film.weight.normal_(std=0.5)
        editor.scales[0].leave.weight.normal_(std=0.3)
    return editor.requires_grad_(False).eval()


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def predict(editor: Editor, source: torch.Tensor, *texts: str, t: float = 0.7) -> torch.Tensor:
    x = images(*source.shape, seed=5)
    text, mask = editor.encode_text(texts)
    return editor.predict(x, torch.full((len(source),), t), source, text, mask)


def test_it_starts_as_the_identity():
    editor = Editor(SMALL)
    editor.reset_parameters()
    source = images(2, 3, 24, 20)
    assert torch.equal(predict(editor, source, "a", "b"), source)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 8), (33, 47)])
def test_any_size(size):
    editor = random_editor()
    source = images(1, 3, *size)
    assert predict(editor, source, "a").shape == source.shape
    assert edit(editor, source / 2 + 0.5, ["a"], steps=2).shape == source.shape


def test_text_time_and_each_item_s_own_steering():
    editor = random_editor()
    source = images(1, 3, 16, 16).repeat(2, 1, 1, 1)
    x = images(1, 3, 16, 16, seed=5).repeat(2, 1, 1, 1)
    text, mask = editor.encode_text(["make it warm", "cool it down, please"])
    both = editor.predict(x, torch.tensor([0.7, 0.7]), source, text, mask)
    assert not torch.allclose(both[0], both[1], atol=1e-4)
    text, mask = editor.encode_text(["make it warm"])
    alone = editor.predict(x[:1], torch.tensor([0.7]), source[:1], text, mask)
    torch.testing.assert_close(alone[0], both[0], atol=1e-5, rtol=1e-5)
    later = editor.predict(x[:1], torch.tensor([0.2]), source[:1], text, mask)
    assert not torch.allclose(later, alone, atol=1e-4)


def test_what_lies_far_away_does_not_matter():
    """Without pooling a crop teaches what holds of the whole."""
    editor = random_editor()
    source = images(1, 3, 160, 32)
    other = source.clone()
    other[:, :, 120:] = 0
    first, second = predict(editor, source, "a"), predict(editor, other, "a")
    torch.testing.assert_close(first[:, :, :40], second[:, :, :40], atol=1e-6, rtol=0)
    assert not torch.allclose(first[:, :, 110:], second[:, :, 110:], atol=1e-3)


def test_depth_and_space_are_inverse_and_enlarging_keeps_a_plane():
    x = torch.rand(2, 6, 4, 3)
    assert torch.equal(module.depth_to_space(module.space_to_depth(x)), x)
    assert torch.equal(module.space_to_depth(x)[0, 0, 0, 3:6], x[0, 0, 1])
    ramp = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 6, 6, 2)
    inner = module.enlarge(ramp)[0, 4, 2:-2, 0]
    torch.testing.assert_close(inner.diff(), torch.full((7,), 0.5))


def test_the_layout_finds_the_whole_image_path():
    editor = random_editor()
    layout = LoRALayout.of(editor, 2)
    found = {target.path for target in layout.targets()}
    linear = {name for name, each in editor.named_modules() if isinstance(each, nn.Linear)}
    apart = {name for name in linear if name.startswith("text.")} | {
        "words",
        "time1",
        "time2",
        "steer",
    }
    assert found == linear - apart
    assert {"scales.0.enter", "scales.0.leave", "scales.2.decode.1.film"} <= found


def test_a_lora_reaches_every_target():
    editor = random_editor()
    layout = LoRALayout.of(editor, 2)
    source = images(1, 3, 16, 16)
    before = predict(editor, source, "a")
    for target in layout.targets():
        m = target.module
        pair = torch.randn(1, 2, m.in_features), torch.randn(1, m.out_features, 2)
        with inject(editor, GeneratedLoRA.from_pairs({target.path: pair}, layout.alpha)):
            assert not torch.allclose(predict(editor, source, "a"), before, atol=1e-4), target.path
    assert torch.equal(predict(editor, source, "a"), before)


def test_large_images_are_edited_in_tiles():
    editor = random_editor()
    assert SMALL.tile(40, 40) == (40, 40)
    assert SMALL.tile(20, 80) == (20, 80)
    assert SMALL.tile(60, 70) == (40, 40)
    source, x = images(1, 3, 90, 40), images(1, 3, 90, 40, seed=2)
    text, mask = editor.encode_text(["a"])
    tiled = tiled_velocity(editor, x, 0.5, source, text, mask)
    same = random_editor(replace(SMALL, max_pixels=1 << 20))
    whole = tiled_velocity(same, x, 0.5, source, text, mask)
    difference = (tiled - whole).abs().mean(dim=(0, 1, 3))
    assert difference[:8].max() < 1e-4, "far from the first seam"
    assert difference.mean() < 0.1 * (whole - whole.mean()).abs().mean()


@pytest.mark.parametrize("hardware", [True, False])
def test_products_in_bfloat16_where_the_processor_has_them(monkeypatch, hardware):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    editor, source = random_editor(), images(1, 3, 24, 24)
    x, (text, mask) = images(1, 3, 24, 24, seed=5), editor.encode_text(["a"])
    fast = tiled_velocity(editor, x, 0.5, source, text, mask)
    exact = editor(x, torch.tensor([0.5]), source, text, mask)
    assert fast.dtype == torch.float32
    assert torch.equal(fast, exact) != hardware
    assert (fast - exact).square().mean() < 1e-3 * exact.var()


def test_the_condition_has_image_tokens_of_the_coarsest_scale_and_words():
    editor = random_editor()
    encoder = EditorEncoder(editor, "0" * 16)
    assert encoder.parts == {"image": 8, "words": 16}
    source = (images(2, 3, 32, 48) / 2 + 0.5).clamp(0, 1)
    condition = encoder(source, ["add fog", "blur the whole image"])
    assert condition.parts["image"].shape == (2, 16, 8)
    assert condition.parts["words"].shape == (2, 5, 16)
    assert condition.masks["words"].sum(1).tolist() == [3, 5]
    other = encoder(source.flip(3), ["add fog", "blur the whole image"])
    assert not torch.allclose(other.parts["image"], condition.parts["image"], atol=1e-4)
    small = encoder(source[..., :8, :8], ["a", "b"])
    assert small.parts["image"].shape == (2, 4, 8), "fewer where there are fewer fields"


def test_muon_leaves_steering_and_text_to_adamw():
    from hywu_core.training.muon import Muon

    editor = random_editor().requires_grad_(True)
    names = {id(p): name for name, p in editor.named_parameters()}
    matrices = {names[id(p)] for p in Muon(editor, 1e-3).parts}
    assert "scales.1.enter.weight" in matrices
    assert "scales.2.decode.0.expand.weight" in matrices
    assert not any(
        "film" in n or "text" in n or n.startswith(("time", "words", "steer")) for n in matrices
    )
    assert "scales.0.leave.weight" not in matrices


def test_files_say_which_architecture(tmp_path):
    new = random_editor()
    old = TransformerEditor(
        TransformerConfig(width=24, depth=1, heads=2, text_depth=1, train_size=16)
    )
    for editor, name in ((new, "hywu-editor-2"), (old, "hywu-editor-1")):
        path = save_editor(editor, tmp_path / f"{name}.safetensors", {"steps": 3})
        assert architecture(editor) == name
        read = load_editor(path)
        assert type(read) is type(editor)
        assert read.config == editor.config
        assert read.provenance == {"steps": 3}
        assert editor_identity(read) == editor_identity(editor)


def test_a_config_goes_through_json_and_is_checked():
    assert EditorConfig.from_json(json.loads(json.dumps(SMALL.to_json()))) == SMALL
    with pytest.raises(HYWUError, match="unknown or missing fields: pool"):
        EditorConfig.from_json({k: v for k, v in SMALL.to_json().items() if k != "pool"})
    with pytest.raises(HYWUError, match="of one length"):
        EditorConfig(widths=(4, 8))
    with pytest.raises(HYWUError, match="last of encode 0"):
        EditorConfig(widths=(4, 8), encode=(0, 1), decode=(1, 1))
    with pytest.raises(HYWUError, match="divisible by text_heads"):
        EditorConfig(text_heads=3)


def test_the_shipped_size():
    editor = Editor(EditorConfig())
    assert 3e6 < sum(p.numel() for p in editor.parameters()) < 4e6


def test_a_generator_of_another_editor_is_explained():
    check_made_for(None, "a" * 16)
    check_made_for("a" * 16, "a" * 16)
    with pytest.raises(HYWUError, match=r"This editor is aaaa.* trained for the editor bbbb"):
        check_made_for("b" * 16, "a" * 16)
    (former,) = FORMER
    with pytest.raises(HYWUError, match=rf"earlier release \({former}\).*train yours anew"):
        check_made_for(former, "a" * 16)


def test_the_former_editor_is_the_one_shipped_until_now():
    assert editor_identity(load_editor()) in FORMER
