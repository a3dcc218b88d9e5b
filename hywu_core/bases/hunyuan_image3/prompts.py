"""Requests into token sequences, checked: all that needs no weights, only the folder's small files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import HYWUError
from . import vision
from .checkpoint import Folder, open_folder
from .config import read_config
from .images import Size, buckets, check_source, nearest, parse_size
from .sequence import Prompt, SourceShape, TokenSequence, check_length
from .system_prompt import own_prompt, system_prompt
from .tokens import Tokens, load_tokens

#: Most source images of one edit.
MOST_IMAGES = 3


@dataclass(frozen=True)
class Request:
    """One edit, or, without images, one image from text.

    images: RGB.
    cot: a chain of thought with its tags, or "".
    size: "auto", "height x width", "w:h".
    seed: of the VAE's noise, the text and the initial noise.
    ratio: index of the bucket that pass 1 chose, for an automatic size.
    """

    instruction: str
    images: Sequence[Image.Image] = ()
    cot: str = ""
    size: str = "auto"
    seed: int = 0
    ratio: int | None = None

    @property
    def automatic(self) -> bool:
        return self.size.strip().lower() == "auto"


class Prompts:
    """Builds the sequences of requests for one checkpoint, and refuses what it can't run."""

    def __init__(self, folder: Folder, tokens: Tokens, system: str) -> None:
        self.folder, self.config, self.settings = folder, folder.config, folder.settings
        self.tokens, self.system = tokens, system

    @classmethod
    def open(
        cls, path: str | Path, system: str | Path | None = None, files: bool = True
    ) -> Prompts:
        """Of a folder.

        system: the system prompt's text, or a .txt or .py file; None reads the folder's.

        files: whether `system` may name a file outside the folder; in a graph it may not.

        Raises HYWUError naming a file that is missing, damaged or another model's.
        """
        folder = open_folder(path)
        if files or system is None:
            prompt = system_prompt(folder.path, folder.settings.system_prompt, system)
        else:
            prompt = own_prompt(folder.path, folder.settings.system_prompt, str(system))
        return cls(folder, folder_tokens(folder), prompt)

    @cached_property
    def processor(self) -> Any:
        """Cuts images into the vision tower's patches."""
        return vision.image_processor(self.config.vision)

    def check(self, request: Request) -> None:
        """Raise HYWUError on a request that can't be run, before anything of it is encoded.

        Also on one whose sequence is longer than the checkpoint reads.
        """
        if len(request.images) > MOST_IMAGES:
            raise HYWUError(
                f"{len(request.images)} source images; HunyuanImage-3 edits with at most {MOST_IMAGES}. "
                "Leave some out."
            )
        for i, image in enumerate(request.images, 1):
            check_source(image, f"Source image {i}")
        if not request.instruction.strip():
            raise HYWUError("The instruction is empty; say what to change or to show.")
        if request.images and self.settings.template != "instruct":
            raise HYWUError(
                f"{self.folder.path}: is the base model (sequence_template "
                f"'{self.settings.template}'), which makes images from text only; edit with "
                "HunyuanImage-3.0-Instruct."
            )
        size = self.size(request)
        self.ratio(request) if size is None else self.image(request, size)

    def size(self, request: Request) -> Size | None:
        """The size that is asked for; None where the model chooses. Raises HYWUError."""
        return parse_size(request.size, self.config.image_base_size, self.config.factor)

    def bucket(self, index: int) -> Size:
        """The size of a ratio token."""
        return Size(*buckets(self.config.image_base_size)[index], index)

    def prompt(self, request: Request) -> Prompt:
        """What stands before the tail of a request's sequence."""
        shapes = tuple(self.shape(image) for image in request.images)
        return Prompt(
            request.instruction, self.system, shapes, request.cot, self.settings.drop_think
        )

    def shape(self, image: Image.Image) -> SourceShape:
        """What the sequence has to know of a source image."""
        config = self.config
        index = nearest(image.height, image.width, config.image_base_size)
        height, width = buckets(config.image_base_size)[index]
        grid = vision.grid_of(image.height, image.width, config.vision)
        vae = (height // config.factor, width // config.factor)
        return SourceShape(index, vae, grid, config.vision.max_patches)

    def writing(self, request: Request, tag: str) -> TokenSequence:
        """To write a chain of thought from a tag on: pass 1."""
        sequence = self.prompt(request).writing(self.tokens, tag)
        check_length(sequence, self.settings.max_length - 1)
        return sequence

    def ratio(self, request: Request) -> TokenSequence:
        """To predict the ratio; its hidden states are the condition: pass 2."""
        sequence = self.prompt(request).ratio(self.tokens)
        check_length(sequence, self.settings.max_length)
        return sequence

    def image(self, request: Request, size: Size) -> tuple[TokenSequence, TokenSequence]:
        """To generate an image, conditional and unconditional: pass 3."""
        config, prompt = self.config, self.prompt(request)
        with_cot, without = (
            prompt.image(
                self.tokens, size, config.factor, unconditional, config.distilled, config.meanflow
            )
            for unconditional in (False, True)
        )
        check_length(with_cot, self.settings.max_length)
        return with_cot, without


def folder_tokens(folder: Folder) -> Tokens:
    """The folder's tokenizer. Raises HYWUError where it is missing or another model's."""
    base = folder.config.image_base_size
    data = read_config(folder.path / "config.json")
    count = len(buckets(base))
    instruct = folder.settings.template == "instruct"
    return load_tokens(folder.path, data, count if instruct else count - 4, base)
