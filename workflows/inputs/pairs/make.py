"""Make the pairs that HY-WU Train Generator calls 'samples'; `python -m workflows.inputs.pairs.make`.

Two contradictory tasks on the four photographs: what one adds to red and takes from blue, the other
takes from red and adds to blue.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
#: task -> (instruction, share of the light that moves from blue to red)
TASKS = {"golden": ("golden evening light", 0.3), "moonlight": ("blue moonlight", -0.3)}


def make() -> None:
    rows = []
    for source in sorted(HERE.parent.glob("hywu_*.png")):
        pixels = np.asarray(Image.open(source).convert("RGB"), dtype=np.float32)
        for task, (instruction, share) in TASKS.items():
            lit = pixels * np.array([1 + share, 1.0, 1 - share], dtype=np.float32)
            name = f"{source.stem.removeprefix('hywu_')}_{task}.jpg"
            image = Image.fromarray(lit.round().clip(0, 255).astype(np.uint8))
            image.save(HERE / name, quality=90, optimize=True)
            rows.append(
                {
                    "source": f"../{source.name}",
                    "target": name,
                    "instruction": instruction,
                    "task": task,
                }
            )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (HERE / "pairs.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    make()
