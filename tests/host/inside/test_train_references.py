"""Train Generator with references in the pairs, which a generator that sees reads and the model doesn't."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import training_models
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.nodes.host.cache import TensorCache
from hywu_nodes.nodes.host.train import files
from hywu_nodes.nodes.host.train.conditions import CachedEncoder
from hywu_nodes.nodes.host.train.data import FixedCrops
from pairs import SIZE, make_pairs
from torch import Tensor
from train_node import checkpoint


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return training_models.clip_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def references(base, train, seeing):
    """A generator that sees three images by a CLIP_VISION: its outputs."""
    make_pairs(base / "input" / "references", references=2)
    return train(pairs="references", clip_vision=seeing, name="references", steps=2)


def test_a_generator_sees_the_references_of_its_pairs(train, references, seeing):
    generator, text, *_ = references
    report = json.loads(text)
    assert dict(generator.config.condition) == {"vision": 32, "text": 4096}
    assert generator.config.encoder["images"] == report["pictures_each"] == 3
    assert report["skipped_rows"] == []
    written = checkpoint("references").read_bytes()
    cached = sorted((files.run_folder("references") / "cache").iterdir())
    stamps = [path.stat().st_mtime_ns for path in cached]
    train(pairs="references", clip_vision=seeing, name="references", steps=2)
    assert len(checkpoint("references").read_bytes()) == len(written)
    assert [path.stat().st_mtime_ns for path in cached] == stamps


def test_condition_encode_gives_what_it_saw(call, loaded, references, seeing):
    """A crop's condition in the training against Condition Encode's; and with the references changed."""
    generator, clip = references[0], loaded[2]
    crop = FixedCrops(files.training_pairs("references")[0], 1, SIZE, 1, 0).batch([0])
    cache = TensorCache(files.run_folder("references") / "cache")
    encoder = CachedEncoder(loaded[0], clip, seeing, cache, images=3)
    kept = encoder.condition(crop.source, crop.instruction[0], crop.references[0]).parts["vision"]
    first, second, third = crop.source[0], *crop.references[0]
    # the crop, and both references with about as many pixels and their own proportions
    shapes = [list(image.shape) for image in (first, second, third)]
    assert shapes == [[3, 64, 64], [3, 91, 45], [3, 78, 52]]

    def encoded(*images: Tensor) -> Tensor:
        source, *further = [image.movedim(0, -1)[None] for image in images]
        more = {f"image{i}": image for i, image in enumerate(further, 2)}
        arguments = (generator, source, crop.instruction[0])
        warned = call.report(
            "HYWUConditionEncode", *arguments, clip=clip, clip_vision=seeing, **more
        )["warnings"]
        assert bool(warned) == (len(images) != 3)
        made = call.HYWUConditionEncode(*arguments, clip=clip, clip_vision=seeing, **more)
        return made[0].parts["vision"]

    def gap(one: Tensor, two: Tensor) -> float:
        return float((one - two).abs().max())

    assert gap(kept, encoded(first, second, third)) < 1e-5
    assert gap(kept, encoded(first, third, second)) > 1e-3
    assert gap(kept[:, :5], encoded(first)) < 1e-5


def refused(words: str, action: Callable[[], Any]) -> None:
    with pytest.raises(HYWUError) as caught:
        action()
    assert words in str(caught.value)


def test_references_that_cannot_be_used_are_refused(call, base, weights, train, seeing):
    folder = base / "input" / "refused_references"
    rows = [json.loads(row) for row in make_pairs(folder, references=2).open()]
    here: dict[str, Any] = {"pairs": "refused_references", "steps": 2}
    words = "which a generator that reads the instruction only doesn't see"
    refused(words, lambda: train(name="blind", **here))
    model, clip, vae = call.HYWULoadBundledEditor()
    words = "The bundled editor reads one image per item, here are 3"
    refused(words, lambda: train(on=(model, vae, clip), name="bundled_base", **here))
    train(name="other_list", clip_vision=seeing, **here)
    # another reference alone makes it another list
    (folder / rows[0]["references"][0]).write_bytes(
        (folder / rows[-1]["references"][0]).read_bytes()
    )
    words = "was started from another list of pairs"
    refused(words, lambda: train(name="other_list", clip_vision=seeing, **here))
    for words, changed in {
        "has 2 references and": rows[1]["references"][:1],
        "'../../secret.png' lies outside": ["0.png", "../../secret.png"],
    }.items():
        lines = [rows[0], {**rows[1], "references": changed}]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        refused(words, lambda: train(name="changed", clip_vision=seeing, **here))
