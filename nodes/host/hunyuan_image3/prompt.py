"""Prompts for a HunyuanImage-3 MODEL: requests of a batch, its conditionings and latent, its thoughts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor

from ....hywu_core.bases.hunyuan_image3.images import nearest
from ....hywu_core.bases.hunyuan_image3.passes import prefill
from ....hywu_core.bases.hunyuan_image3.prompts import Request
from ....hywu_core.bases.hunyuan_image3.sources import Source
from ....hywu_core.bases.hunyuan_image3.thinking import Sampler, closed, think
from ....hywu_core.errors import HYWUError
from ....hywu_core.images import to_pillow
from ..bundled_editor import rgb
from ..instructions import nonempty
from ..page import Page
from .load import Reader, model_of
from .model import KEY, Row, interruptible

#: How a chain of thought says which ratio the model chose.
RATIO = "<img_ratio_{}>"
#: Between the chains of thought of a batch.
DIVIDER = "\n---\n"


def requests_of(
    reader: Reader, instruction: str, images: Sequence[Tensor | None], cot: str = "",
    size: str = "auto", seed: int = 0,
) -> list[Request]:  # fmt: skip
    """One request per image of the batch, checked.

    images: ``[B, H, W, C]`` in 0..1 of each socket.
    instruction: a line for all, or one per image; of a single item, all lines.
    cot: likewise, divided by lines of dashes; a ratio that it ends in is what an automatic size takes.
    Raises HYWUError.
    """
    given = [image for image in images if image is not None]
    lines = nonempty(instruction)
    counts = {image.shape[0] for image in given} - {1}
    count = max(counts) if counts else max(1, len(lines) if not given else 1)
    if len(counts) > 1:
        raise HYWUError(
            f"The image sockets bring {' and '.join(map(str, sorted(counts)))} images; give one for all, or "
            "one per image of the batch."
        )
    texts = ["\n".join(lines)] if count == 1 else lines
    thoughts = divided(cot) if cot.strip() else [""]
    for name, found in (("instruction", texts), ("chains of thought", thoughts)):
        if len(found) not in (1, count):
            raise HYWUError(
                f"{len(found)} {name} for {count} images; write one for all, or one per image."
            )
    made = []
    for i in range(count):
        images = [to_pillow(rgb(each[i % each.shape[0]]).movedim(-1, 0)) for each in given]
        text, ratio = _split_ratio(thoughts[i % len(thoughts)], reader)
        made.append(Request(texts[i % len(texts)], images, text, size, seed + i, ratio))
        reader.prompts.check(made[-1])
    return made


def divided(cot: str) -> list[str]:
    """The chains of thought of a batch, which lines of three or more dashes divide."""
    thoughts: list[list[str]] = [[]]
    for line in cot.split("\n"):
        if len(line.strip()) >= 3 and not line.strip().strip("-"):
            thoughts.append([])
        else:
            thoughts[-1].append(line)
    return ["\n".join(lines).strip() for lines in thoughts]


def _split_ratio(cot: str, reader: Reader) -> tuple[str, int | None]:
    match = re.search(r"<img_ratio_(\d+)>\s*$", cot)
    if match is None:
        return cot, None
    index = int(match[1])
    if index >= len(reader.prompts.tokens.ratios):
        raise HYWUError(
            f"The chain of thought ends in {match[0].strip()}; the model knows the ratios 0 to "
            f"{len(reader.prompts.tokens.ratios) - 1}."
        )
    return cot[: match.start()].strip(), index


def encoded(reader: Reader, requests: Sequence[Request]) -> list[tuple[Source, ...]]:
    """Each request's source images as the model reads them, on the host; the noise is of its seed."""
    made = []
    with reader.ready() as encode, torch.no_grad():
        for request in requests:
            generator = torch.Generator().manual_seed(request.seed)
            sources = []
            for image in request.images:
                mm.throw_exception_if_processing_interrupted()
                source = encode(image, encode.noise(image, generator))
                kept = mm.intermediate_device()
                sources.append(
                    replace(source, latent=source.latent.to(kept), tokens=source.tokens.to(kept))
                )
            made.append(tuple(sources))
    return made


def prompt(
    reader: Reader, requests: Sequence[Request], model: Any = None
) -> tuple[list, list, dict[str, Tensor], str]:
    """(positive, negative, LATENT, report) of a batch.

    model: chooses automatic sizes, if it is there.
    """
    sources = encoded(reader, requests)
    height, width = _size(reader, requests, sources, model)
    config = reader.prompts.config
    rows = [
        [
            Row(reader.prompts, request, given, branch)
            for request, given in zip(requests, sources, strict=True)
        ]
        for branch in (False, True)
    ]
    # the token ids travel as integers in the rows; stock nodes want a tensor here
    positive, negative = ([[torch.zeros(1, 1, 1), {KEY: each}]] for each in rows)
    shape = (
        len(requests),
        config.vae.latent_channels,
        height // config.factor,
        width // config.factor,
    )
    samples = torch.zeros(shape, device=mm.intermediate_device())
    lengths = [len(row.sequence(height, width)) for row in rows[0]]
    said = f"{width} x {height}, {' and '.join(f'{n:,}' for n in lengths)} tokens of {reader.prompts.settings.max_length:,}"
    return positive, negative, {"samples": samples}, said


def _size(
    reader: Reader, requests: Sequence[Request], sources: Sequence[tuple[Source, ...]], model: Any
) -> tuple[int, int]:
    prompts, sizes = reader.prompts, []
    for request, given in zip(requests, sources, strict=True):
        size = prompts.size(request)
        if size is None:
            index = request.ratio
            if index is None and model is not None:
                index = ratio(model, request, given)
            if index is None and request.images:
                image = request.images[0]
                index = nearest(image.height, image.width, prompts.config.image_base_size)
            size = prompts.bucket(16 if index is None else index)
        sizes.append((size.height, size.width))
    if len(set(sizes)) != 1:
        said = ", ".join(f"{h}x{w}" for h, w in sizes)
        raise HYWUError(
            f"The images of this batch would be {said}; choose one size for all, or run them one by one."
        )
    return sizes[0]


@torch.no_grad()
def ratio(model: Any, request: Request, sources: Sequence[Source]) -> int:
    """Index of the bucket that the model chooses."""
    inner = model_of(model)
    tokens = inner.reader.prompts.tokens
    states = hidden_states(model, [request], [sources])
    logits = inner.diffusion_model.logits(states[:, -1])[0, list(tokens.ratios)]
    return int(logits.argmax())


@torch.no_grad()
def hidden_states(
    model: Any, requests: Sequence[Request], sources: Sequence[Sequence[Source]]
) -> Tensor:
    """Last hidden states ``[B, longest, hidden]`` of the ratio's sequences: HY-WU's condition."""
    inner = model_of(model)
    sequences = [inner.reader.prompts.ratio(request) for request in requests]
    longest = max(map(len, sequences))
    shape = [len(sequences), longest, 1]
    needed = inner.memory_required([len(sequences), 1, 1, 1], {"rows": [shape]})
    mm.load_models_gpu([model], memory_required=needed)
    bar = comfy.utils.ProgressBar(inner.diffusion_model.config.num_layers)

    def told(done: int, _: int) -> None:
        mm.throw_exception_if_processing_interrupted()
        bar.update_absolute(done)

    return prefill(inner.diffusion_model, sequences, sources, progress=told)


def thoughts(
    model: Any, requests: Sequence[Request], task: str, most: int, sampler: Sampler | None,
    page: Page,
) -> str:  # fmt: skip
    """Chains of thought of a batch, divided by lines of dashes; each ends in the ratio that was chosen.

    sampler: None takes the checkpoint's settings.
    page: where the text is read while it is written, and kept when the writing ends early.
    """
    inner = model_of(model)
    reader = inner.reader
    sources = encoded(reader, requests)
    settings = reader.prompts.settings
    if sampler is None and settings.do_sample:
        sampler = Sampler(settings.temperature, settings.top_k, settings.top_p)
    mm.load_models_gpu(
        [model], memory_required=inner.memory_required([1, 1, 1, settings.max_length])
    )
    made: list[str] = []
    for request, given in zip(requests, sources, strict=True):
        bar, text, count = comfy.utils.ProgressBar(most), "", 0

        def told(done: int, _: int, written: str, bar: Any = bar) -> None:
            nonlocal text, count
            text, count = written, done
            mm.throw_exception_if_processing_interrupted()
            bar.update_absolute(done)
            page.grows(DIVIDER.join((*made, text)))

        try:
            thought = think(
                inner.diffusion_model, reader.prompts, replace(request, cot="", ratio=None), given,
                task=task, sampler=sampler, most=most, on_token=told, progress=interruptible,
            )  # fmt: skip
        except BaseException:
            page.cut_off(DIVIDER.join([*made, *([closed(text)] if text else [])]), count)
            raise
        end = "" if thought.ratio is None else RATIO.format(thought.ratio)
        made.append(thought.cot + end)
    return DIVIDER.join(made)
