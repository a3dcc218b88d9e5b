"""docs/gallery.md: 24 edits of photographs that nothing was trained on, by the bundled weights, unretouched.

`python3 dev.py gallery` calls it. Good and bad alike: the list stands here, seeds are 0, nothing is picked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from hywu_core.bases.bundled.checkpoint import bundled
from hywu_core.bases.bundled.engine import BundledEditor
from hywu_core.bases.bundled.sampling import edit
from hywu_core.experiments import edits
from hywu_core.experiments.conflict.degrees import square
from hywu_core.experiments.images import photographs
from hywu_core.files import atomic_path
from hywu_core.formats import load_lora
from hywu_core.injection import inject

ROOT = Path(__file__).parents[1]
SIZE, QUALITY = 512, 85


@dataclass(frozen=True)
class Entry:
    """A photograph, what was done to it before ("" nothing), and the instruction."""

    photo: str
    damage: str
    instruction: str


def _aged(degree: float) -> Callable[[Tensor], Tensor]:
    def damage(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return edits.aged(x, torch.full((1, 1, 1, 1), degree), generator)

    return damage


#: What a source went through, by the words of the gallery.
DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "blurred, sigma 1": lambda x: edits.blur(x, 1.0),
    "blurred, sigma 1.5": lambda x: edits.blur(x, 1.5),
    "blurred, sigma 2.5": lambda x: edits.blur(x, 2.5),
    "aged, degree 0.5": _aged(0.5),
    "aged, degree 0.7": _aged(0.7),
    "aged, degree 1": _aged(1.0),
    "darkened to 0.5": lambda x: 0.5 * x,
    "darkened to 0.25": lambda x: 0.25 * x,
    "haze of 0.4": lambda x: edits.foggy(x, 0.4),
    "haze of 0.65": lambda x: edits.foggy(x, 0.65),
}

ENTRIES = (
    Entry("astronaut", "", "blur the image"),
    Entry("chelsea", "", "make it blurry"),
    Entry("motorcycle", "blurred, sigma 1", "blur this photo, please"),
    Entry("astronaut", "blurred, sigma 1", "deblur the image"),
    Entry("chelsea", "blurred, sigma 1.5", "deblur"),
    Entry("flower", "blurred, sigma 1.5", "make it sharp"),
    Entry("coffee", "blurred, sigma 2.5", "unblur this"),
    Entry("astronaut", "", "age the photo"),
    Entry("coffee", "", "make it look old"),
    Entry("china", "aged, degree 0.5", "age it"),
    Entry("astronaut", "aged, degree 0.5", "restore the photo"),
    Entry("coffee", "aged, degree 0.7", "restore"),
    Entry("rocket", "aged, degree 1", "fix this old photo"),
    Entry("flower", "", "darken the image"),
    Entry("china", "darkened to 0.5", "make it darker"),
    Entry("chelsea", "darkened to 0.5", "brighten the image"),
    Entry("motorcycle", "darkened to 0.25", "make it brighter"),
    Entry("china", "", "add fog"),
    Entry("rocket", "", "make it foggy"),
    Entry("china", "haze of 0.4", "dehaze the image"),
    Entry("flower", "haze of 0.65", "remove the haze"),
    Entry("astronaut", "", "add a red hat"),
    Entry("chelsea", "", "a photo of a dog"),
    Entry("rocket", "blurred, sigma 2.5", "blur the background"),
)


def source(entry: Entry) -> Tensor:
    """``[3, SIZE, SIZE]`` uint8: the photograph's middle, damaged as the entry says."""
    image = square(photographs()[entry.photo][None].float() / 255, SIZE)
    return DAMAGES[entry.damage](image.clamp(0, 1))[0].clamp(0, 1).mul(255).round().byte()


def make(docs: Path) -> Path:
    """Every entry's source and edit beside each other, and the page; returns the page."""
    folder = docs / "images" / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    engine, lines = BundledEditor.load(), [HEAD]
    for number, entry in enumerate(tqdm(ENTRIES, desc="gallery"), 1):
        before = source(entry)
        result = engine.edit(before, entry.instruction)
        after = result.image.mul(255).round().byte().cpu()
        pair = torch.cat([before, torch.full((3, SIZE, 8), 255, dtype=torch.uint8), after], dim=2)
        name = f"{number:02d}.jpg"
        with atomic_path(folder / name, overwrite=True) as part:
            image = Image.fromarray(np.ascontiguousarray(pair.permute(1, 2, 0).numpy()))
            image.save(part, "JPEG", quality=QUALITY, optimize=True, progressive=True)
        said = f"**{entry.instruction}** · {entry.photo}{entry.damage and ', ' + entry.damage}"
        warned = f"\n\n*The node says: {result.warning}*" if result.warning else ""
        lines.append(
            f"{number}. {said}{warned}\n\n   ![{entry.instruction}](images/gallery/{name})"
        )
    page = docs / "gallery.md"
    with atomic_path(page, overwrite=True) as part:
        part.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return page


#: README's first image: one photograph, and what is asked of it.
ASKED = ("age the photo", "restore the photo")
CELL, HEIGHT = 400, 34


def make_first(path: Path) -> Path:
    """One photograph, opposite instructions: by the LoRAs that HY-WU writes, and by one shared LoRA."""
    engine, shared = BundledEditor.load(), load_lora(bundled("shared"))
    image = square(photographs()["astronaut"][None].float() / 255, CELL)
    image = DAMAGES["aged, degree 0.5"](image)[0]
    before = image.clamp(0, 1).mul(255).round().byte()
    rows = {"HY-WU": [engine.edit(before, text).image for text in ASKED]}
    with inject(engine.editor, shared):
        source = before[None].float() / 255
        rows["one shared LoRA"] = [edit(engine.editor, source, [text])[0] for text in ASKED]
    width, labels = 3 * CELL + 2 * 8, ("the photograph", *(f"“{text}”" for text in ASKED))
    sheet = Image.new("RGB", (width, 2 * (CELL + HEIGHT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for row, (name, images) in enumerate(rows.items()):
        top = row * (CELL + HEIGHT)
        for column, cell in enumerate((before, *images)):
            left = column * (CELL + 8)
            said = f"{labels[column]} · {name}" if column else labels[0]
            draw.text((left + CELL // 2, top + HEIGHT // 2), said, "black", font, anchor="mm")
            pixels = cell if cell.dtype == torch.uint8 else cell.mul(255).round().byte()
            array = np.ascontiguousarray(pixels.cpu().permute(1, 2, 0).numpy())
            sheet.paste(Image.fromarray(array), (left, top + HEIGHT))
    with atomic_path(path, overwrite=True) as part:
        sheet.save(part, "JPEG", quality=QUALITY, optimize=True, progressive=True)
    return path


HEAD = """# Gallery

24 edits by the bundled editor and generator: the source on the left, the edit on the right, 512 x 512 pixels, four steps, seed 0. The photographs are those of scikit-image and scikit-learn; neither the editor nor the generator was trained on them. `python3 dev.py gallery` makes this page anew; nothing is picked or retouched, and what doesn't work is here as well: strong blur comes back only in part, a badly worn photograph isn't restored, and a request that nothing was trained on gets a warning and some change of tone."""


if __name__ == "__main__":
    print(make_first(ROOT / "docs" / "images" / "first.jpg"))
    print(make(ROOT / "docs"))
