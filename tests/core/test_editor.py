"""The bundled editor: sizes, tiles, determinism, layout, files, text masks."""

from __future__ import annotations

import pytest
import torch

from hywu_core.bases.bundled.checkpoint import load_editor, save_editor
from hywu_core.bases.bundled.sampling import edit, tiled_velocity
from hywu_core.bases.bundled.text import split_words, word_pieces
from hywu_core.bases.bundled.transformer import TransformerConfig as EditorConfig
from hywu_core.bases.bundled.transformer import TransformerEditor as Editor
from hywu_core.bases.bundled.transformer import overlap_add, patchify, unpatchify
from hywu_core.errors import HYWUError
from hywu_core.files import read_tensors, save_tensors
from hywu_core.layout import LoRALayout

SMALL = EditorConfig(width=32, depth=2, heads=2, text_depth=1, patch=4, train_size=16)


@pytest.fixture
def editor() -> Editor:
    torch.manual_seed(0)
    editor = Editor(SMALL)
    for parameter in editor.parameters():  # away from the identity, so that every part matters
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return editor.requires_grad_(False).eval()


def test_reset_editor_is_the_identity():
    editor = Editor(SMALL)
    editor.reset_parameters()
    source = torch.rand(1, 3, 20, 33)
    assert torch.allclose(edit(editor, source, ["anything"], steps=3), source, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16), (17, 40), (50, 9)])
def test_any_size(editor, size):
    out = edit(editor, torch.rand(2, 3, *size), ["blur", ""], steps=2)
    assert out.shape == (2, 3, *size)
    assert torch.isfinite(out).all()


def test_patches_come_back():
    x = torch.rand(2, 3, 8, 12)
    patches, grid = patchify(x, 4)
    assert grid == (2, 3)
    assert torch.equal(unpatchify(patches, grid, 4), x)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("patch", [4, 5])
def test_overlapping_patches_are_blended_by_a_raised_cosine(grid, patch):
    squares = torch.randn(2, grid[0] * grid[1], 3 * (2 * patch) ** 2)
    window = ((torch.arange(2 * patch) + 0.5) * torch.pi / (2 * patch)).sin() ** 2
    windows = (window[:, None] * window).flatten().repeat(3)
    size = [(side + 1) * patch for side in grid]

    def fold(x):
        whole = torch.nn.functional.fold(x.mT, size, 2 * patch, stride=patch)
        start = patch // 2
        return whole[..., start:, start:][..., : grid[0] * patch, : grid[1] * patch]

    wanted = fold(squares * windows) / fold(torch.ones_like(squares) * windows)
    assert torch.allclose(overlap_add(squares, grid, patch), wanted, atol=1e-5)
    flat = torch.full_like(squares, 0.25)
    assert torch.allclose(overlap_add(flat, grid, patch), torch.tensor(0.25), atol=1e-5)


def test_the_seed_decides(editor):
    source = torch.rand(1, 3, 16, 16)
    first = edit(editor, source, ["warm"], seed=1)
    assert torch.equal(first, edit(editor, source, ["warm"], seed=1))
    assert not torch.equal(first, edit(editor, source, ["warm"], seed=2))


def test_tiles_agree_however_many_run_at_once(editor):
    source, x = torch.randn(2, 3, 40, 27), torch.randn(2, 3, 40, 27)
    text, mask = editor.encode_text(["warm", "make it cold"])
    one = tiled_velocity(editor, x, 0.7, source, text, mask, batch=2)
    many = tiled_velocity(editor, x, 0.7, source, text, mask, batch=64)
    assert torch.allclose(one, many, atol=1e-5)


def test_padding_of_a_text_changes_nothing(editor):
    source = torch.randn(1, 3, 16, 16)
    text, mask = editor.encode_text(["warm"])
    both, both_mask = editor.encode_text(["warm", "a much longer instruction"])
    t = torch.full((1,), 0.5)
    alone = editor(source, t, source, text, mask)
    padded = editor(source, t, source, both[:1], both_mask[:1])
    assert torch.allclose(alone, padded, atol=1e-5)
    other = editor(source, t, source, both[1:], both_mask[1:])
    assert not torch.allclose(alone, other, atol=1e-4)


def test_hidden_states_tell_images_and_texts_apart(editor):
    source = torch.randn(1, 3, 64, 48).expand(2, -1, -1, -1)
    text, mask = editor.encode_text(["warm", "cold"])
    tokens = editor.hidden_states(source, text, mask)
    assert tokens.shape == (2, SMALL.pool**2, SMALL.width)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)
    other = editor.hidden_states(source.flip(3), text, mask)
    assert not torch.allclose(tokens[0], other[0], atol=1e-3)


def test_a_word_by_itself_is_the_same_in_any_sentence(editor):
    words, mask = editor.embed_words(["make it blurry", "Blurry, please"])
    assert mask.sum(1).tolist() == [4, 4]
    assert torch.equal(words[0, 3], words[1, 1])
    assert not torch.allclose(words[0, 1], words[0, 2], atol=1e-3)


def test_a_layout_finds_the_blocks(editor):
    paths = {t.path for t in LoRALayout.of(editor, 2, exclude="text.*").targets()}
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert paths == {f"blocks.{i}.{name}" for i in range(SMALL.depth) for name in names}


def test_a_file_comes_back_with_its_provenance(editor, tmp_path):
    path = save_editor(editor, tmp_path / "e.safetensors", {"steps": 3})
    loaded = load_editor(path)
    assert loaded.provenance == {"steps": 3}
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, editor.state_dict()[name].half().float()), name


def test_a_damaged_file_is_explained(editor, tmp_path):
    tensors, header = read_tensors(save_editor(editor, tmp_path / "e.safetensors", {}))
    tensors.pop("image_out.bias")
    tensors["image_in.bias"] = torch.zeros(5)
    tensors["time1.bias"] = torch.full_like(tensors["time1.bias"], float("nan"))
    path = save_tensors(tmp_path / "bad.safetensors", tensors, header)
    with pytest.raises(HYWUError, match=r"bad.safetensors.*image_in.bias is \(5,\)") as caught:
        load_editor(path)
    assert "image_out.bias is missing" in str(caught.value)
    assert "time1.bias holds values that are not finite" in str(caught.value)


def test_a_misfit_is_explained(editor):
    with pytest.raises(HYWUError, match="one instruction an image"):
        edit(editor, torch.rand(2, 3, 8, 8), ["one"])


def test_words_share_pieces_with_their_relatives():
    blur, blurrier, dark = (set(word_pieces(w, 4096)) for w in ("blur", "blurrier", "darken"))
    assert len(blur & blurrier) >= 4
    assert len(blur & dark) <= 1
    assert min(blur | blurrier | dark) >= 2, "0 is padding, 1 the start"
    assert split_words("Don't BLUR it, 明るく!") == [
        "don",
        "'",
        "t",
        "blur",
        "it",
        ",",
        "明るく",
        "!",
    ]


def test_long_and_empty_instructions():
    editor = Editor(SMALL)
    words, mask = editor.encode_text(["", "dark " * 100, "x" * 5000])
    assert mask.sum(1).tolist() == [1, SMALL.text_words + 1, 2]
    assert torch.isfinite(words).all()
    alone, _ = editor.encode_text([""])
    assert torch.allclose(words[0, :1], alone[0], atol=1e-5)
