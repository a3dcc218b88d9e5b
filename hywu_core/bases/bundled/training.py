"""The bundled editor as the training loop sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...condition import Condition
from ...encoders.bundled import EditorEncoder
from ...errors import HYWUError
from .checkpoint import editor_identity
from .sampling import edit
from .text import EncodedTexts, word_ids

if TYPE_CHECKING:
    from ...training.base import Batch, Draws

#: As generators and LoRAs name what they were made for.
NAME = "hywu-bundled-editor-2"
#: Losses of an item.
ERRORS = ("mse", "log")
#: Said of rows with references.
ONE_IMAGE = (
    "The bundled editor reads one image and the rows have references; take them out of the rows, or "
    "train a generator for another model in ComfyUI (HY-WU Train Generator)."
)
#: Added before the logarithm, in units of -1..1: at 39 dB an edit is good enough to count little.
SMALLEST = 5e-4
#: Share of an adapter's draws at t = 1 in the recipe: below it the noisy image shows the edit, and what is
#: asked for need not be read; sampling starts there.
AT_START = 0.5


class EditorBase:
    """Flow matching on the editor; the loss is on the clean image that it predicts.

    sampling_steps: Euler steps of `edit`.
    error: "mse" of an item, or its logarithm ("log"), by which each item counts by its own measure: a mean of
        squares hardly sees a task whose edits are small, such as a blur, beside one that changes every pixel.
    smallest: added before the logarithm.
    at_start: share of the draws at t = 1.
    """

    def __init__(
        self,
        editor: nn.Module,
        sampling_steps: int = 4,
        error: str = "mse",
        smallest: float = SMALLEST,
        at_start: float = 0.0,
    ) -> None:
        if error not in ERRORS:
            raise HYWUError(f"training: error '{error}'; it is one of {', '.join(ERRORS)}.")
        self.module, self.sampling_steps = editor.requires_grad_(False), sampling_steps
        self.smallest, self.at_start = smallest, at_start
        self.name, self.error = NAME, error
        # no training step waits for the device, nor hashes what is seen once
        self._encoder = EditorEncoder(editor, editor_identity(editor), fingerprints=False)

    @property
    def encoder(self) -> Mapping[str, Any]:
        return self._encoder.identity

    @property
    def condition_parts(self) -> Mapping[str, int]:
        return self._encoder.parts

    def encode(
        self,
        source: Tensor,
        instruction: Sequence[str],
        references: Sequence[Sequence[Tensor]] = (),
    ) -> Condition:
        """Raises HYWUError on references, which the editor doesn't read."""
        if references:
            raise HYWUError(ONE_IMAGE)
        return self._encoder(source, instruction)

    def text_tensors(self, batch: Batch) -> dict[str, Tensor]:
        """A batch's texts as tensors of one shape for all batches of a size, on the CPU."""
        ids, mask = word_ids(batch.instruction, self.module.config, torch.device("cpu"), whole=True)
        return {"ids": ids, "mask": mask}

    def with_text_tensors(self, batch: Batch, tensors: Mapping[str, Tensor]) -> Batch:
        """The batch with its texts as these tensors."""
        texts = EncodedTexts(batch.instruction)
        texts.ids, texts.mask = tensors["ids"], tensors["mask"]
        return replace(batch, instruction=texts)

    def draw(self, batch: Batch, seed: int) -> Draws:
        """noise ``[B, 3, H, W]``; t ``[B]`` in (0, 1], one stratum of it per item but for those at 1."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch.source.shape, generator=generator)
        count = len(batch)
        order = torch.randperm(count, generator=generator)
        t = (order + 1 - torch.rand(count, generator=generator)) / count
        return {"noise": noise, "t": t.masked_fill(at_start(count, self.at_start, seed), 1)}

    def loss(self, module: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        t = draws["t"][:, None, None, None]
        source, target = batch.source * 2 - 1, batch.target * 2 - 1
        x = (1 - t) * target + t * draws["noise"]
        text, mask = module.encode_text(batch.instruction)
        clean = module.predict(x, draws["t"], source, text, mask)
        squared = (clean.float() - target).square().mean(dim=(1, 2, 3))
        return squared if self.error == "mse" else logarithmic(squared, self.smallest)

    @torch.no_grad()
    def edit(self, module: nn.Module, batch: Batch, seed: int) -> Tensor:
        steps = self.sampling_steps
        return edit(module, batch.source, batch.instruction, steps=steps, seed=seed)


def at_start(count: int, share: float, seed: int) -> Tensor:
    """bool ``[count]``: the draws of a seed that are put at t = 1, a `share` of them on average."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed + 1)) < share


def logarithmic(squared: Tensor, smallest: float = SMALLEST) -> Tensor:
    """Mean squares of -1..1 as a hundredth of the negative PSNR in dB, but for a constant."""
    return 0.1 * (squared + smallest).log10()
