"""How the samples were made: `python -m hywu_core.evaluation.samples.make_samples` makes them again.

Two photographs that scikit-image ships without restriction: the astronaut Eileen Collins (NASA,
public domain) and a rocket launch (SpaceX, CC0). Targets are computed, so that the reference judge
can score the samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ...errors import need

HERE = Path(__file__).parent
SIDE = 160


def _crop(name: str, left: int, top: int, side: int) -> Image.Image:
    data = need("skimage.data", "to make the samples", install="scikit-image")
    picture = Image.fromarray(getattr(data, name)()).convert("RGB")
    box = (left, top, left + side, top + side)
    return picture.crop(box).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _gamma(picture: Image.Image, exponent: float) -> Image.Image:
    values = np.asarray(picture, dtype=np.float64) / 255
    return Image.fromarray((values**exponent * 255).round().astype(np.uint8))


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG", quality=90, optimize=True)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make() -> None:
    """Write the pictures and the three indices."""
    portrait, launch = _crop("astronaut", 110, 0, 230), _crop("rocket", 200, 60, 340)
    edits = [
        ("astronaut", portrait, "Blur the photo.", portrait.filter(ImageFilter.GaussianBlur(2.5))),
        ("rocket", launch, "Brighten the photo.", _gamma(launch, 0.55)),
    ]
    gedit, imgedit, folder = [], {}, []
    for number, (name, source, instruction, target) in enumerate(edits):
        for benchmark in ("gedit", "imgedit", "folder"):
            _save(source, HERE / benchmark / "sources" / f"{name}.jpg")
            _save(target, HERE / benchmark / "targets" / f"{name}.jpg")
        task = ("style_change", "tone_transfer")[number]
        gedit.append(
            {
                "task_type": task,
                "key": f"sample_{name}",
                "instruction": instruction,
                "instruction_language": "en",
                "input_image": f"sources/{name}.jpg",
                "input_image_raw": f"sources/{name}.jpg",
                "Intersection_exist": number == 0,
                "target_image": f"targets/{name}.jpg",
            }
        )
        imgedit[str(number + 1)] = {
            "id": f"{name}.jpg",
            "prompt": instruction,
            "edit_type": ("style", "adjust")[number],
            "target": f"targets/{name}.jpg",
        }
        folder.append(
            {
                "key": name,
                "task": ("blur", "brighten")[number],
                "source": f"sources/{name}.jpg",
                "target": f"targets/{name}.jpg",
                "instruction": instruction,
            }
        )
    _jsonl(HERE / "gedit" / "gedit.jsonl", gedit)
    _jsonl(HERE / "folder" / "items.jsonl", folder)
    text = json.dumps(imgedit, indent=4) + "\n"
    (HERE / "imgedit" / "basic_edit.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    make()
