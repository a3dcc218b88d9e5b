"""The bundled editor's U-Net: shapes, sizes, steering, LoRA targets, tiles, files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_editor import TINY, random_editor
from torch import nn

from hywu_core import LoRALayout, inject
from hywu_core.bases.bundled import model as module
from hywu_core.bases.bundled.checkpoint import (
    FORMER,
    check_made_for,
    editor_identity,
    load_editor,
    save_editor,
)
from hywu_core.bases.bundled.model import Editor, EditorConfig
from hywu_core.bases.bundled.sampling import edit, tiled_velocity
from hywu_core.bases.bundled.text import split_words, word_pieces
from hywu_core.encoders.bundled import EditorEncoder
from hywu_core.errors import HYWUError
from hywu_core.files import read_tensors, save_tensors
from hywu_core.lora import GeneratedLoRA


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def predict(editor: Editor, source: torch.Tensor, *texts: str, t: float = 0.7) -> torch.Tensor:
    x = images(*source.shape, seed=5)
    text, mask = editor.encode_text(texts)
    return editor.predict(x, torch.full((len(source),), t), source, text, mask)


def test_it_starts_as_the_identity():
    editor = Editor(TINY)
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
    assert TINY.tile(40, 40) == (40, 40)
    assert TINY.tile(20, 80) == (20, 80)
    assert TINY.tile(60, 70) == (40, 40)
    source, x = images(1, 3, 90, 40), images(1, 3, 90, 40, seed=2)
    text, mask = editor.encode_text(["a"])
    tiled = tiled_velocity(editor, x, 0.5, source, text, mask)
    same = random_editor(replace(TINY, max_pixels=1 << 20))
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


def test_a_file_comes_back_with_its_provenance(tmp_path):
    editor = random_editor()
    path = save_editor(editor, tmp_path / "e.safetensors", {"steps": 3})
    read = load_editor(path)
    assert read.provenance == {"steps": 3}
    assert read.config == editor.config
    assert editor_identity(read) == editor_identity(editor)
    for name, value in read.state_dict().items():
        assert torch.equal(value, editor.state_dict()[name].half().float()), name


def test_a_damaged_file_is_explained(tmp_path):
    tensors, header = read_tensors(save_editor(random_editor(), tmp_path / "e.safetensors", {}))
    tensors.pop("scales.0.leave.bias")
    tensors["steer.bias"] = torch.zeros(5)
    tensors["time1.bias"] = torch.full_like(tensors["time1.bias"], float("nan"))
    path = save_tensors(tmp_path / "bad.safetensors", tensors, header)
    with pytest.raises(HYWUError, match=r"bad.safetensors.*steer.bias is \(5,\)") as caught:
        load_editor(path)
    assert "scales.0.leave.bias is missing" in str(caught.value)
    assert "time1.bias holds values that are not finite" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_numbers_of_a_network_are_an_error(tmp_path, dtype):
    tensors, header = read_tensors(save_editor(random_editor(), tmp_path / "e.safetensors", {}))
    other = {name: value.to(dtype) for name, value in tensors.items()}
    path = save_tensors(tmp_path / "other.safetensors", other, header)
    with pytest.raises(HYWUError, match=r"other.safetensors: .* is torch\.\w+, and weights are"):
        load_editor(path)


def test_weights_of_8_bits_are_read(tmp_path):
    tensors, header = read_tensors(save_editor(random_editor(), tmp_path / "e.safetensors", {}))
    small = {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}
    read = load_editor(save_tensors(tmp_path / "small.safetensors", small, header))
    for name, value in read.state_dict().items():
        assert torch.equal(value, small[name].float())


def test_files_of_the_former_editor_are_explained(tmp_path):
    path = save_tensors(
        tmp_path / "e.safetensors", {"a": torch.zeros(1)}, {"format": "hywu-editor-1"}
    )
    with pytest.raises(HYWUError, match=r"e.safetensors: an editor of an earlier release"):
        load_editor(path)
    pair = torch.randn(1, 2, 4), torch.randn(1, 4, 2)
    lora = GeneratedLoRA.from_pairs({"blocks.0.attn.qkv": pair}, 2.0)
    with (
        pytest.raises(HYWUError, match="bundled editor of an earlier release"),
        inject(random_editor(), lora),
    ):
        pass


def test_a_config_goes_through_json_and_is_checked():
    assert EditorConfig.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY
    with pytest.raises(HYWUError, match="unknown or missing fields: pool"):
        EditorConfig.from_json({k: v for k, v in TINY.to_json().items() if k != "pool"})
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


def test_the_former_editor_is_not_the_shipped_one():
    assert editor_identity(load_editor()) not in FORMER


def test_the_seed_decides():
    editor, source = random_editor(), images(1, 3, 16, 16) / 2 + 0.5
    first = edit(editor, source, ["warm"], seed=1)
    assert torch.equal(first, edit(editor, source, ["warm"], seed=1))
    assert not torch.equal(first, edit(editor, source, ["warm"], seed=2))


def test_tiles_agree_however_many_run_at_once():
    editor = random_editor(replace(TINY, max_pixels=16 * 16))
    source, x = images(2, 3, 40, 27), images(2, 3, 40, 27, seed=1)
    text, mask = editor.encode_text(["warm", "make it cold"])
    one = tiled_velocity(editor, x, 0.7, source, text, mask, batch=2)
    many = tiled_velocity(editor, x, 0.7, source, text, mask, batch=64)
    assert torch.allclose(one, many, atol=1e-1)


def test_padding_of_a_text_changes_nothing():
    editor, source = random_editor(), images(1, 3, 16, 16)
    text, mask = editor.encode_text(["warm"])
    both, both_mask = editor.encode_text(["warm", "a much longer instruction"])
    t = torch.full((1,), 0.5)
    alone = editor(source, t, source, text, mask)
    padded = editor(source, t, source, both[:1], both_mask[:1])
    assert torch.allclose(alone, padded, atol=1e-5)
    other = editor(source, t, source, both[1:], both_mask[1:])
    assert not torch.allclose(alone, other, atol=1e-4)


def test_a_word_by_itself_is_the_same_in_any_sentence():
    words, mask = random_editor().embed_words(["make it blurry", "Blurry, please"])
    assert mask.sum(1).tolist() == [4, 4]
    assert torch.equal(words[0, 3], words[1, 1])
    assert not torch.allclose(words[0, 1], words[0, 2], atol=1e-3)


def test_a_misfit_is_explained():
    with pytest.raises(HYWUError, match="one instruction an image"):
        edit(random_editor(), torch.rand(2, 3, 8, 8), ["one"])


def test_words_share_pieces_with_their_relatives():
    blur, blurrier, dark = (set(word_pieces(w, 4096)) for w in ("blur", "blurrier", "darken"))
    assert len(blur & blurrier) >= 4
    assert len(blur & dark) <= 1
    assert min(blur | blurrier | dark) >= 2, "0 is padding, 1 the start"
    assert split_words("Don't BLUR it, 明るく!") == [
        "don", "'", "t", "blur", "it", ",", "明るく", "!",
    ]  # fmt: skip


def test_long_and_empty_instructions():
    editor = random_editor()
    words, mask = editor.encode_text(["", "dark " * 100, "x" * 5000])
    assert mask.sum(1).tolist() == [1, TINY.text_words + 1, 2]
    assert torch.isfinite(words).all()
    alone, _ = editor.encode_text([""])
    assert torch.allclose(words[0, :1], alone[0], atol=1e-5)
