"""Make the example photographs from scikit-image's; `python -m workflows.inputs.make` writes them anew.

Two are degraded as the sources of the conflict tasks are: a photograph that is slightly out of focus can
be sharpened and blurred, one that has aged a little can be restored and aged further.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from skimage import data

from hywu_core.experiments.tasks import get_task

HERE = Path(__file__).parent
SIZE = 256
#: name -> photograph, the task whose source it becomes (None: as it is), the draw of its degree
PHOTOGRAPHS = {
    "hywu_cat_soft": ("chelsea", "deblur", 5),
    "hywu_astronaut_aged": ("astronaut", "restore", 1),
    "hywu_coffee": ("coffee", None, 0),
    "hywu_rocket": ("rocket", None, 0),
}


def square(name: str) -> torch.Tensor:
    """The middle square of a photograph, ``[1, 3, 256, 256]`` in 0..1."""
    image = Image.fromarray(getattr(data, name)())
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    small = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(SIZE, SIZE, 3).permute(2, 0, 1)[None].float() / 255


def make() -> None:
    for name, (photograph, task, seed) in PHOTOGRAPHS.items():
        image = square(photograph)
        if task is not None:
            image, _ = get_task(task).make(image, torch.Generator().manual_seed(seed))
        pixels = image[0].mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    make()
