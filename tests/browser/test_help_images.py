"""The images of the help pages are what `python3 dev.py help-images` draws of the nodes as they are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hywu_core.errors import HYWUError
from workflows import help_images


@pytest.fixture(scope="module")
def drawn(chromium, own_server, tmp_path_factory) -> dict[str, Image.Image]:
    """Class of a node -> its image, drawn now."""
    found = {}
    for path in help_images.draw(own_server.url, tmp_path_factory.mktemp("drawn")):
        with Image.open(path) as image:
            found[path.stem] = image.convert("RGB")
    return found


def shipped(name: str) -> Image.Image:
    with Image.open(help_images.DOCS / f"{name}.webp") as image:
        return image.convert("RGB")


def test_every_image_is_as_high_as_its_node_is_now(drawn):
    """A socket or widget more makes a node higher: call `python3 dev.py help-images` then."""
    sizes = {name: image.size for name, image in drawn.items()}
    assert sizes == {name: shipped(name).size for name in drawn}
    assert {path.stem for path in help_images.DOCS.glob("*.webp")} == sizes.keys()


def test_an_image_shows_the_node_with_its_links(drawn):
    """Apply's left edge has three links of its own colours and nothing else but the canvas."""
    left = drawn["HYWUApplyLoRA"].crop((0, 0, 1, drawn["HYWUApplyLoRA"].height))
    bright = [y for y in range(left.height) if max(left.getpixel((0, y))) > 100]
    runs = [y for y in bright if y - 1 not in bright]
    assert len(runs) == 3, bright


def test_what_runs_shows_its_map(drawn):
    """The map's colours are the only ones on a gray node."""
    for name in help_images.RUN:
        below = drawn[name].crop((60, 100, 450, drawn[name].height)).convert("HSV")
        _, saturation, value = np.moveaxis(np.asarray(below), 2, 0)
        assert ((saturation > 150) & (value > 100)).sum() > 700, name


def test_an_unknown_node_is_an_error_that_names_those_there_are(chromium, own_server, tmp_path):
    with pytest.raises(HYWUError, match="there is no node HYWUNone; there are HYWULoad"):
        next(help_images.draw(own_server.url, tmp_path, ["HYWUNone"]))
