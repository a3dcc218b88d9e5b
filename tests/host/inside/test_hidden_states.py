"""A MODEL's own hidden states as the condition: every architecture gives its image's tokens."""

from __future__ import annotations

import gc

import pytest
import torch
from hidden_models import IMAGES, PART, TEXTS, gap, models
from hywu_nodes.nodes.host.encode import token_probe

pytestmark = pytest.mark.usefixtures("as_comfyui_runs_nodes")

#: Architecture -> the last of its blocks to run, its outputs' shape for three images of 80 x 48 pixels;
#: tokens are twice as wide, with what the text changes.
ARCHITECTURES = {
    "Wan 2.1": ("blocks.1", [3, 15, 128]),
    "SD3": ("joint_blocks.1", [3, 15, 128]),
    "SD 1.5": ("output_blocks.3.1.transformer_blocks.0", [3, 48, 32]),
    "UNet": ("output_blocks.3.0", [3, 48, 32]),
    "Flux": ("single_blocks.1", [3, 15, 128]),
    "HunyuanImage 2.1": ("single_blocks.1", [3, 48, 256]),
    "Qwen-Image": ("transformer_blocks.1", [3, 15, 128]),
    "Z-Image": ("layers.1", [3, 15, 256]),
}
#: Where the image's tokens are: of the output's tensor, from, to, (frames, rows, columns).
PLACES = {
    "Flux": [0, 8, 23, [1, 5, 3]],  # after 8 tokens of text
    "HunyuanImage 2.1": [0, 0, 60, [1, 10, 6]],  # before the text; after it in 0.33.0
    "Qwen-Image": [1, 0, 15, [1, 5, 3]],  # the block's second output
    "Z-Image": [0, 32, 47, [1, 5, 3]],  # text and image are padded to 32 tokens each
    "SD3": [0, 0, 15, [1, 5, 3]],  # the last block gives no text
    "Wan 2.1": [0, 0, 15, [1, 5, 3]],
    "SD 1.5": [0, 0, 60, [1, 10, 6]],
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request):
    with torch.inference_mode():
        model = models()[request.param]()
    model.architecture = request.param
    yield model
    del model
    gc.collect()


@pytest.fixture(scope="module")
def reader(made, folder):
    with torch.inference_mode():
        return made.generator(folder)


def test_the_last_block_gives_a_grid_of_the_images_tokens(made, reader, tokens):
    layer, shape = ARCHITECTURES[made.architecture]
    assert reader.config.encoder["model"]["layer"] == layer
    assert list(tokens(reader, TEXTS, **made.inputs).shape) == [*shape[:2], 2 * shape[2]]
    assert dict(reader.config.condition) == {PART: 2 * shape[2]}
    assert not any(module._forward_hooks for module in made.network.modules())


def test_image_and_instruction_change_it_and_nothing_else_does(made, reader, tokens):
    batch = tokens(reader, TEXTS, **made.inputs)
    assert torch.equal(batch, tokens(reader, TEXTS, **made.inputs))
    single = tokens(reader, "make it cold", IMAGES[1:2], **made.inputs)
    assert gap(batch[1:2], single) < 1e-5
    assert gap(batch[0], batch[2]) > 1e-3


def test_two_instructions_differ_more_in_what_the_text_changes_than_in_the_states(
    made, reader, tokens
):
    """In the states it is 0.3 to 26 % of the norm, for these random weights; in the changes 14 to 41 %."""
    same = IMAGES[:1].expand(2, -1, -1, -1)
    asked = tokens(reader, "make it warm\nmake it cold", same, **made.inputs)
    assert gap(asked[0], asked[1]) > 1e-3

    def share(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((one - two).norm() / one.norm())

    in_states, in_contrast = (share(*(row.chunk(2, dim=-1)[i] for row in asked)) for i in (0, 1))
    assert in_contrast > 0.1
    assert in_contrast > 1.3 * in_states


def test_a_checkpoint_without_the_contrast_gets_the_states_alone(made, reader, tokens, folder):
    states = tokens(reader, TEXTS, **made.inputs).chunk(2, dim=-1)[0]
    alone = tokens(made.generator(folder, contrast=None), TEXTS, **made.inputs)
    assert gap(states, alone) < 1e-6


def test_the_images_tokens_are_told_apart(made, reader, tokens):
    tokens(reader, TEXTS, **made.inputs)
    place = PLACES.get(made.architecture)
    if place is None:  # gives a feature map
        assert made.network not in token_probe._places
        return
    found = list(token_probe._places[made.network].values())[-1]
    if made.architecture == "HunyuanImage 2.1" and found.start:
        place = [0, 8, 68, place[3]]
    assert [found.member, found.start, found.stop, list(found.grid)] == place
