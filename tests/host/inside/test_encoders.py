"""Condition Encode with the encoders of a graph: a CLIP, a CLIP_VISION, a CONDITIONING, several images per item."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import training_models
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.generator.checkpoints import save_generator
from hywu_nodes.hywu_core.generator.config import GeneratorConfig
from hywu_nodes.hywu_core.generator.model import ParameterGenerator
from hywu_nodes.hywu_core.layout import LoRALayout, Module, Stack
from hywu_nodes.nodes.host.generators import HostGenerator

TEXTS = "blur\nmake all of it darker"
#: 28 pixels in patches of 14 and a class token.
SEEN = 5


@pytest.fixture(scope="module")
def clip(call, weights):
    return call.HYWULoadBundledEditor()[1]


@pytest.fixture(scope="module")
def width(clip):
    config = clip.cond_stage_model.config
    return config.condition_parts["words"]


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return training_models.clip_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Callable[..., HostGenerator]:
    """(parts, identity of the encoder) -> a generator of random weights that reads them."""

    def make(parts: dict[str, int], **identity) -> HostGenerator:
        layout = LoRALayout((Stack(("blocks.0", "blocks.1"), (Module("fc", 8, 8),)),), 2, 2.0)
        encoder = {"type": "comfyui", **identity}
        config = GeneratorConfig(layout, parts, 8, 2, 32, 16, 1, encoder=encoder)
        torch.manual_seed(0)
        made = ParameterGenerator(config)
        made.reset_parameters()
        torch.nn.init.normal_(made.model.proj_out_B.weight)
        path = tmp_path_factory.mktemp("generator") / "g.safetensors"
        return HostGenerator(save_generator(made, path), torch.float32)

    return make


@pytest.fixture(scope="module")
def both(generator, width):
    return generator({"vision": 32, "text": width})


@pytest.fixture(scope="module")
def inputs(clip, seeing):
    return {"clip": clip, "clip_vision": seeing}


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 40, 30, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encode(call):
    return lambda *args, **more: call.HYWUConditionEncode(*args, **more)[0]


@pytest.fixture
def lora(call):
    return lambda made, condition: call.HYWUGenerateLoRA(made, condition)[0]


@pytest.fixture
def said(call):
    return lambda *args, **more: call.report("HYWUConditionEncode", *args, **more)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def gap(one, two) -> float:
    return max(float((one[path].B - two[path].B).abs().max()) for path in one)


def test_parts_come_from_their_encoders_in_the_generators_order(encode, both, images, inputs):
    parts = encode(both, images, TEXTS, **inputs).parts
    assert list(parts) == ["vision", "text"]
    assert list(parts["vision"].shape) == [2, SEEN, 32]
    assert list(parts["text"].shape[:2]) == [2, 1 + len(["make", "all", "of", "it", "darker"])]


def test_an_item_of_a_batch_is_as_alone(encode, lora, both, images, inputs):
    """Its shorter text is padded beside a longer one, which must change nothing."""
    batch = lora(both, encode(both, images, TEXTS, **inputs))
    single = lora(both, encode(both, images[:1], "blur", **inputs))
    assert gap(batch.select(0), batch.select(1)) > 1e-3
    assert gap(batch.select(0), single) < 1e-5


# -- several images per item -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def further():
    """Of other sizes; the third one is the same for all items."""
    made = torch.Generator().manual_seed(1)
    second, third = (
        torch.rand(2, 33, 50, 3, generator=made),
        torch.rand(1, 28, 28, 3, generator=made),
    )
    return {"image2": second, "image3": third}


def test_several_images_follow_one_another(encode, lora, both, images, inputs, further):
    """Each image's tokens are those of the image alone, in the order of the inputs, which counts."""
    whole = encode(both, images, TEXTS, **inputs, **further)
    rows = [images, further["image2"], further["image3"].expand(2, -1, -1, -1)]
    alone = [encode(both, row, TEXTS, **inputs).parts["vision"] for row in rows]
    assert whole.parts["vision"].shape[1] == 3 * SEEN
    assert torch.equal(whole.parts["vision"], torch.cat(alone, dim=1))
    assert whole.origin["images"] == 3
    repeated = encode(both, images, TEXTS, **inputs, **{**further, "image3": rows[2]})
    assert torch.equal(repeated.parts["vision"], whole.parts["vision"])
    single = encode(
        both, images[1:], "make all of it darker", **inputs, image2=further["image2"][1:],
        image3=further["image3"],
    )  # fmt: skip
    assert gap(lora(both, whole).select(1), lora(both, single)) < 1e-5


def test_every_image_its_place_and_their_number_count(encode, lora, both, images, inputs, further):
    whole = encode(both, images, TEXTS, **inputs, **further)
    swapped = {"image2": further["image3"], "image3": further["image2"]}
    others = [
        encode(both, images, TEXTS, **inputs, **more)
        for more in (
            {}, {"image2": further["image2"]}, swapped, {**further, "image2": further["image2"].flip(0)},
        )
    ]  # fmt: skip
    assert len({c.fingerprint for c in (whole, *others)}) == 5
    assert gap(lora(both, whole), lora(both, others[2])) > 1e-3


def test_another_number_of_images_than_in_the_training_is_said(
    said, generator, both, width, images, inputs, further
):
    trained = generator({"vision": 32, "text": width}, images=3)
    assert said(trained, images, TEXTS, **inputs)["warnings"] == [
        "The generator was trained with 3 images per item, here is 1; give as many as in the training."
    ]
    report = said(trained, images, TEXTS, **inputs, **further)
    assert report["warnings"] == []
    assert (report["images"], report["pictures_each"]) == (2, 3)
    (warning,) = said(both, images, TEXTS, **inputs, **further)["warnings"]
    assert "was trained with 1 image per item, here are 3" in warning


# -- a CONDITIONING ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(clip):
    """The CLIP's own tokens of two texts, as another node would give them: padded, in one entry."""
    lines = TEXTS.split("\n")
    made = [clip.encode_from_tokens_scheduled(clip.tokenize(line))[0][0] for line in lines]
    longest = max(t.shape[1] for t in made)
    tokens = torch.cat([torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[1])) for t in made])
    mask = torch.tensor([[i < t.shape[1] for i in range(longest)] for t in made])
    return tokens, mask, made[0]


def test_a_conditioning_is_the_text_in_place_of_clip(
    encode, said, both, images, inputs, seeing, given
):
    tokens, mask, first = given
    alone = {"clip_vision": seeing, "conditioning": [[tokens, {"attention_mask": mask}]]}
    by_clip, found = encode(both, images, TEXTS, **inputs), encode(both, images, TEXTS, **alone)
    # as what the CLIP gives for the instructions one by one
    wanted = by_clip.parts["text"][by_clip.masks["text"]]
    assert torch.equal(found.parts["text"][mask], wanted)
    assert found.masks["text"].sum(1).tolist() == [2, 6]
    shared = encode(both, images, "", clip_vision=seeing, conditioning=[[first, {}]])
    assert torch.equal(shared.parts["text"], first.expand(2, -1, -1))
    reports = [said(both, images, text, **alone) for text in ("", TEXTS)]
    assert [report["text_from"] for report in reports] == ["conditioning"] * 2
    assert [report["warnings"] for report in reports] == [[], []]
    assert reports[0]["instructions"] == ["", ""]
    assert said(both, images, TEXTS, **inputs)["text_from"] == "instruction"


def test_a_conditionings_tokens_and_mask_are_in_the_fingerprint(
    encode, both, images, inputs, seeing, given
):
    tokens, mask, _ = given
    prints = {encode(both, images, TEXTS, **inputs).fingerprint}
    for values, counted in ((tokens, mask), (tokens + 1, mask), (tokens, mask.flip(0))):
        conditioning = [[values, {"attention_mask": counted}]]
        made = encode(both, images, TEXTS, clip_vision=seeing, conditioning=conditioning)
        prints.add(made.fingerprint)
    assert len(prints) == 4


def test_what_is_not_looked_at_is_said(
    encode, said, generator, both, images, inputs, seeing, given
):
    tokens, mask, _ = given
    busy = [
        [tokens, {"attention_mask": mask, "reference_latents": [tokens], "strength": 0.5}],
        [tokens, {}],
    ]
    assert said(both, images, TEXTS, **inputs, conditioning=busy)["warnings"] == [
        "The conditioning is read as the text; clip and the instruction are not.",
        "Of the conditioning's 2 entries the first is read.",
        "Of the conditioning only the text is read, not reference_latents, strength.",
    ]
    plain = [[tokens, {"attention_mask": mask}]]
    texts = [
        encode(both, images, TEXTS, **inputs, conditioning=c).parts["text"] for c in (busy, plain)
    ]
    assert torch.equal(*texts)
    sees = generator({"vision": 32})
    report = said(sees, images, "", clip_vision=seeing, conditioning=plain)
    assert report["warnings"] == ["The generator reads no text; the conditioning is not looked at."]


# -- refusals ----------------------------------------------------------------------------------------


def refused(encode, words: str, *args, **more) -> None:
    with pytest.raises(HYWUError) as caught:
        encode(*args, **more)
    assert words in str(caught.value)


def test_encoders_that_are_missing_or_others(encode, generator, both, width, images, clip, seeing):
    refused(encode, "connect clip_vision", both, images, TEXTS, clip=clip)
    refused(encode, "connect clip (or conditioning).", both, images, TEXTS, clip_vision=seeing)
    wide, other = generator({"text": width + 1}), generator({"audio": 8})
    refused(encode, "connect the encoder that it was trained with", wide, images, TEXTS, clip=clip)
    refused(encode, "which no encoder of a graph makes", other, images, TEXTS, clip=clip)


def test_images_and_texts_that_do_not_fit(encode, both, images, inputs):
    words = "image2 has 3 images for 2 images; give one for all images, or one per image."
    refused(encode, words, both, images, TEXTS, **inputs, image2=torch.rand(3, 8, 8, 3))
    refused(
        encode, "The image3 is 0 x 8 x 8 x 3", both, images, TEXTS, **inputs,
        image3=torch.rand(0, 8, 8, 3),
    )  # fmt: skip
    refused(encode, "The instruction is empty", both, images, " ", **inputs)


def test_what_the_bundled_editor_does_not_read(call, encode, images, width):
    bundled = call.HYWULoadGenerator("bundled", "auto")[0]
    words = "The bundled editor reads one image per item, here are 2"
    refused(encode, words, bundled, images, TEXTS, image3=images)
    conditioning = [[torch.zeros(1, 4, width), {}]]
    words = "leave conditioning unconnected and write the instruction"
    refused(encode, words, bundled, images, "", conditioning=conditioning)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            (3, 4, 0, {}),
            "The conditioning holds 3 texts for 2 images; connect one that holds a single",
        ),
        ((1, 4, 9, {}), "The connected conditioning gives tokens 9 wide"),
        (
            (1, 4, 0, {"attention_mask": torch.ones(1, 3)}),
            "has 4 tokens and an attention mask (1, 3)",
        ),
        (None, "The conditioning is empty"),
    ],
)
def test_conditionings_that_cannot_be_read(encode, both, width, images, inputs, entry, words):
    given = []
    if entry is not None:
        count, length, wide, options = entry
        given = [[torch.zeros(count, length, wide or width), options]]
    refused(encode, words, both, images, "", **inputs, conditioning=given)
