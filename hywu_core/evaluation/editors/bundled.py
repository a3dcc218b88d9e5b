"""The bundled editor with its generator, with static LoRAs, or fine-tuned, as an editor for benchmarks."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ... import fingerprint
from ...bases.bundled.checkpoint import bundled, bundled_loras, editor_identity, load_editor
from ...bases.bundled.engine import BundledEditor
from ...bases.bundled.sampling import edit
from ...devices import chosen_device
from ...errors import HYWUError
from ...files import read_header, read_weights
from ...formats import load_lora
from ...injection import inject
from ...lora import GeneratedLoRA
from ..items import Item
from ..options import Kind, Option
from .base import EditFailed

#: In a LoRA's name: the item's task.
TASK = "{task}"


class EngineEditor:
    """Edits each item with a LoRA that is generated for it; or with `lora`, a static one.

    lora: the name of a bundled LoRA (shared, single_blur, ...), a file or a PEFT folder, with ``{task}`` in
        its name one for each task; "none" is the editor alone; None generates.
    fine_tuned: a file of `hywu train` or `hywu conflict` with all of the editor's weights, to use in their
        place (SFT; then there is no LoRA).
    generator: another one's file.
    editor_file: another editor's file, in place of the bundled one's.
    steps: of the sampling.
    strength: of the LoRA.
    device: a torch device.
    skip_missing: modules of the LoRA that the editor lacks are left out. One edit at a time.
    Raises HYWUError when weights are missing or don't fit each other.
    """

    parallel = 1

    def __init__(
        self, lora: str | None = None, steps: int = 4, strength: float = 1.0, device: str = "cpu",
        fine_tuned: str | Path | None = None, skip_missing: bool = False,
        generator: str | Path | None = None, editor_file: str | Path | None = None,
    ) -> None:  # fmt: skip
        if fine_tuned is not None and lora not in (None, "none"):
            raise HYWUError(f"Fine-tuned weights have no LoRA; leave out '{lora}' or {fine_tuned}.")
        if generator is not None and (lora or fine_tuned) is not None:
            raise HYWUError(
                f"The generator {generator} writes a LoRA for each item; leave it out, or "
                f"'{lora or fine_tuned}'."
            )
        self._skip_missing = skip_missing
        self.steps, self.strength, device = steps, strength, str(chosen_device(device))
        self._lock = threading.Lock()  # the LoRA of one item is on the model while it is edited
        self._engine, self._loras, self._lora = None, {}, lora or "generated"
        path = Path(editor_file) if editor_file else bundled("editor")
        if lora is None and fine_tuned is None:
            self._engine = BundledEditor.load(path, generator or bundled("generator"), device)
            self._editor = self._engine.editor
        else:
            self._editor = load_editor(path, device)
        self._metadata: dict[str, Any] = {"editor": editor_identity(self._editor)}
        if fine_tuned is not None:
            load_fine_tuned(self._editor, fine_tuned)
            self._lora = "none"
            self._metadata["fine_tuned"] = f"{Path(fine_tuned).name} {_digest([Path(fine_tuned)])}"
        elif lora not in (None, "none"):
            files = _lora_files(lora)
            self._loras = {
                task: load_lora(path, device, self._editor, skip_missing)
                for task, path in files.items()
            }
            name = Path(lora).name if TASK in lora else next(iter(files.values())).name
            self._lora = f"{name} {_digest(files.values())}"
            if skip_missing:
                self._lora += " without what is missing"

    def describe(self) -> dict[str, Any]:
        """Which weights, and how they are used; the device changes nothing that is meant."""
        generator = None
        if self._engine is not None:
            generator = self._engine.generator.config.provenance["checkpoint"]["digest"]
        return {
            "kind": "bundled",
            **self._metadata,
            "lora": self._lora,
            "generator": generator,
            "steps": self.steps,
            "strength": self.strength,
        }

    @property
    def editor(self) -> nn.Module:
        """The base model, with fine-tuned weights where there are some."""
        return self._editor

    def edit(self, source: Image.Image, item: Item, seed: int) -> Image.Image:
        """The edited image, of the source's size. Raises EditFailed when the task has no LoRA."""
        pixels = torch.from_numpy(np.array(source.convert("RGB"))).permute(2, 0, 1)
        with self._lock:
            result = self._edit(pixels, item, seed)
        array = (result.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
        return Image.fromarray(array.cpu().numpy())

    def _edit(self, pixels: Tensor, item: Item, seed: int) -> Tensor:
        if self._engine is not None:
            options = {"seed": seed, "steps": self.steps, "strength": self.strength}
            return self._engine.edit(pixels, item.instruction, **options).image
        device = self._editor.text.position.device
        given = pixels[None].to(device, torch.float32) / 255
        options = {"steps": self.steps, "seed": seed}
        if not self._loras:
            return edit(self._editor, given, [item.instruction], **options)[0]
        lora = self._lora_of(item.task)
        with inject(self._editor, lora, self.strength, skip_missing=self._skip_missing):
            return edit(self._editor, given, [item.instruction], **options)[0]

    def _lora_of(self, task: str) -> GeneratedLoRA:
        lora = self._loras.get("" if "" in self._loras else task)
        if lora is None:
            known = ", ".join(self._loras)
            raise EditFailed(f"there is no LoRA for the task '{task}' ({self._lora}: {known})")
        return lora


def load_fine_tuned(editor: nn.Module, path: str | Path) -> None:
    """Put a fine-tuned copy's weights into the editor. Raises HYWUError naming what doesn't fit."""
    if read_header(path).get("strategy") != "sft":
        raise HYWUError(f"{path}: not a fine-tuned editor; `hywu conflict` writes weights/sft.")
    tensors, _ = read_weights(path)
    wanted = {name: tuple(value.shape) for name, value in editor.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    unexpected = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if unexpected:
        raise HYWUError(
            f"{path}: was not made from this editor: {unexpected[0]} is {found.get(unexpected[0], 'missing')}, "
            f"the editor's is {wanted.get(unexpected[0], 'missing')}; use two that were made together."
        )
    editor.load_state_dict(tensors)


def _lora_files(name: str) -> Mapping[str, Path]:
    """Task -> file; of the task "" where the same is for all. Raises HYWUError when there is none."""
    path = Path(name)
    if TASK not in name:
        if name in bundled_loras() or path.exists():
            return {"": bundled(name) if name in bundled_loras() else path}
    elif TASK in path.name:
        before, after = path.name.split(TASK, 1)
        pattern = re.compile(f"{re.escape(before)}(.+){re.escape(after)}")
        if path.suffix or path.parent != Path():
            named = {file.name: file for file in sorted(path.parent.glob("*.safetensors"))}
        else:
            named = {stem: bundled(stem) for stem in bundled_loras()}
        found = {m[1]: file for stem, file in named.items() if (m := pattern.fullmatch(stem))}
        if found:
            return found
    known = ", ".join([*bundled_loras(), "none"])
    raise HYWUError(f"{name}: there is no such LoRA file, and the bundled ones are {known}.")


def _digest(paths: Iterable[Path]) -> str:
    files = (sorted(p.rglob("*.safetensors")) if p.is_dir() else [p] for p in paths)
    return fingerprint.of_files(itertools.chain.from_iterable(files), 16)


KIND = Kind(
    "--editor",
    "bundled",
    "the editor that comes along, with a LoRA generated for each item",
    EngineEditor,
    (
        Option(
            "lora",
            "in place of generating: a bundled LoRA (shared, single_blur, ...), a LoRA file, or "
            "'none' for the editor alone; {task} in it stands for the item's task ('single_{task}')",
        ),
        Option(
            "fine_tuned",
            "all of the editor's weights, fine-tuned: weights/sft.safetensors of `hywu conflict`",
            metavar="FILE",
        ),
        Option(
            "skip_missing",
            "leave out the LoRA's modules that the editor lacks (the log names them)",
            False,
            bool,
        ),
        Option(
            "generator",
            "a generator of `hywu train` in place of the bundled one",
            metavar="FILE",
        ),
        Option(
            "editor_file",
            "another editor than the bundled one: the file that `hywu train --editor` took",
            metavar="FILE",
        ),
        Option("steps", "sampling steps (%(default)s)", 4, int),
        Option("strength", "of the LoRA (%(default)s)", 1.0, float),
        Option("device", "torch device (%(default)s)", "cpu"),
    ),
)
