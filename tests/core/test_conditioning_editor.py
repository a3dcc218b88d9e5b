"""Conditions from the editor's hidden states, and a generator trained through a tiny editor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_editor import TINY, random_editor

from hywu_core.bases.bundled.checkpoint import editor_identity
from hywu_core.bases.bundled.model import Editor
from hywu_core.bases.bundled.training import EditorBase
from hywu_core.encoders.bundled import EditorEncoder
from hywu_core.errors import HYWUError
from hywu_core.generator.config import GeneratorConfig
from hywu_core.layout import LoRALayout
from hywu_core.training.base import Batch
from hywu_core.training.logs import read_log
from hywu_core.training.schedule import TrainConfig
from hywu_core.training.strategies import HyperNetwork
from hywu_core.training.trainer import Trainer


@pytest.fixture
def base():
    return EditorBase(random_editor(replace(TINY, max_pixels=16 * 16)))


def test_padding_of_texts_changes_nothing_that_counts(base):
    images = torch.rand(2, 3, 16, 16)
    both = base.encode(images, ["blur", "a much longer instruction"])
    alone = base.encode(images[:1], ["blur"])
    keep = both.masks["words"][0]
    assert torch.allclose(both.parts["image"][0], alone.parts["image"][0], atol=1e-5)
    assert torch.equal(both.parts["words"][0][keep], alone.parts["words"][0])


def test_fingerprint_knows_pixels_text_and_encoder(base):
    encode = EditorEncoder(base.module, editor_identity(base.module))
    image = torch.rand(1, 3, 16, 16)
    first = encode(image, ["blur"]).fingerprint
    assert first == encode(image.clone(), ["blur"]).fingerprint
    changed = image.clone()
    changed[0, 0, 3, 3] += 0.01
    other = Editor(base.module.config)
    prints = [
        encode(changed, ["blur"]).fingerprint,
        encode(image, ["sharpen"]).fingerprint,
        EditorEncoder(other, editor_identity(other))(image, ["blur"]).fingerprint,
    ]
    assert len({first, *prints}) == 4


def test_a_training_step_takes_no_fingerprint(base):
    assert base.encode(torch.rand(1, 3, 16, 16), ["blur"]).fingerprint == ""


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (40, 70), (200, 64)])
def test_large_images_take_the_tokens_of_training(base, size):
    condition = base.encode(torch.rand(1, 3, *size), ["blur"])
    assert condition.num_tokens == 16 + 1 + 1  # image, start, word
    assert torch.isfinite(condition.parts["image"]).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 16), (7, 40)])
def test_small_and_odd_images(base, size):
    condition = base.encode(torch.rand(1, 3, *size), [""])
    assert 2 <= condition.num_tokens <= 17


def test_every_part_of_a_large_image_counts(base):
    image = torch.rand(1, 3, 64, 64)
    before = base.encode(image, ["blur"]).parts["image"]
    image[..., 50:, 50:] = 0
    assert (base.encode(image, ["blur"]).parts["image"] - before).abs().max() > 1e-3


def test_wrong_input_is_refused(base):
    with pytest.raises(HYWUError, match="one instruction per image"):
        base.encode(torch.rand(2, 3, 16, 16), ["blur"])
    with pytest.raises(HYWUError, match="reads one image and the rows have references"):
        base.encode(torch.rand(1, 3, 16, 16), ["blur"], ((torch.rand(3, 16, 16),),))


def test_a_generator_learns_through_the_editor(base, tmp_path):
    def batches(step):
        generator = torch.Generator().manual_seed(step)
        source = 0.3 + 0.4 * torch.rand(8, 3, 16, 16, generator=generator)
        texts = ("brighten it", "darken it") * 4
        sign = torch.tensor([0.2, -0.2] * 4)[:, None, None, None]
        return Batch(source, source + sign, texts, texts)

    config = GeneratorConfig(
        LoRALayout.of(base.module, 2), base.condition_parts, token_dim=24, dim_accumulation=1,
        d_model=32, head_dim=16, num_blocks=1, lora_b_scale=0.5, encoder=base.encoder,
        base=base.name,
    )  # fmt: skip
    settings = TrainConfig(steps=40, batch_size=8, lr=3e-3, warmup=5)
    strategy = HyperNetwork(base, config)
    trainer = Trainer(base, strategy, batches, settings, tmp_path, device="cpu")
    assert trainer.run()
    losses = [row["loss"] for row in read_log(tmp_path / "log.csv")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    edits = trainer.edit(batches(100))
    assert edits.shape == (8, 3, 16, 16)
    assert 0 <= edits.min() <= edits.max() <= 1


def test_the_logarithm_of_the_error_is_taken_of_each_item(base):
    """Ten times the squared error costs as much everywhere; an item that is right costs nothing more."""
    source = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = Batch(source, source.flip(2), ("blur",) * 3, ("blur",) * 3)
    draws = base.draw(batch, 0)
    squared = base.loss(base.module, batch, draws)
    logarithm = EditorBase(base.module, error="log").loss(base.module, batch, draws)
    assert torch.allclose(10 ** (10 * logarithm), squared + 5e-4)
    with pytest.raises(HYWUError, match="mse, log"):
        EditorBase(base.module, error="mae")
