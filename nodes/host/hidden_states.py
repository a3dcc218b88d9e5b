"""A MODEL's own hidden states as a condition: what its last repeated block makes of picture and text.

The picture goes through the MODEL once, as a sampler's last step would send it: its latent with a
little noise, always the same, and the instruction as the text. A hook on the block takes its output;
the tokens of the image are averaged into a grid of at most 8 x 8. Which tokens are the image's is found
out by the MODEL: they are those that its output depends on.

Most of such a state is the picture's; two instructions for one picture may differ by a hundredth. So the
picture goes through a second time, its text zeroed, and each token is followed, as more channels, by what
the text has changed. A generator that is trained on standardized channels sees both equally well.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management as mm
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hywu_core.condition import OFFICIAL_PART
from ...hywu_core.conditioning.pictures import by_item
from ...hywu_core.discovery import submodule
from ...hywu_core.errors import HYWUError
from ...hywu_core.fingerprint import of_module
from ...hywu_core.layout import LoRALayout
from .conditionings import Entry
from .identity import base_fingerprint, patches_fingerprint

log = logging.getLogger(__name__)

#: Part of the condition.
PART = OFFICIAL_PART
#: Noise level: a tenth of the picture's size, or the nearest that the MODEL knows.
SIGMA = 0.1
#: Side of the grid of tokens, at most.
SIDE = 8
#: What a state is compared with: the same run with all numbers of the text 0. Checkpoints that say
#: nothing about it read the state alone.
CONTRAST = "zeros"
#: Pixels that the sides of a picture are multiples of.
MULTIPLE = 16
#: Text -> an entry of a CONDITIONING, and picture ``[1, 3, H, W]`` -> its latent.
Said = Callable[[str], Entry]
Latent = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Tokens ``start:stop`` of one of a block's outputs; `grid` is their (frames, rows, columns)."""

    member: int
    start: int
    stop: int
    grid: tuple[int, int, int]


def describe(model: Any, vae: Any, pixels: int, said: Said, latent: Latent) -> dict[str, Any]:
    """What a checkpoint says about this encoder: the MODEL, the block, the size of the pictures.

    pixels: side of the squares that are trained on; other pictures are brought to this area.
    """
    network = model.model.diffusion_model
    layers = [path for stack in LoRALayout.of(network, 1).stacks for path in stack.layers if path]
    picture = scaled(torch.full((1, 3, pixels, pixels), 0.5), pixels)
    with _Watch(network, layers) as watch:
        _run(model, latent(picture), said("a"), SIGMA)
    if not watch.path:
        raise HYWUError(
            f"{type(network).__name__}: none of its repeated blocks runs as a module, so its hidden "
            "states can't be taken; let the generator read encoders."
        )
    found = {"layer": watch.path, "pixels": pixels, "sigma": SIGMA, "side": SIDE}
    return {**identity(model, vae), **found, "contrast": CONTRAST}


def identity(model: Any, vae: Any) -> dict[str, str]:
    """Which MODEL and VAE these are. patches: what lies on the MODEL, or nothing."""
    return {
        "network": type(model.model.diffusion_model).__name__,
        "weights": base_fingerprint(model),
        "patches": patches_fingerprint(model),
        "vae": of_module(vae.first_stage_model),
    }


def check(facts: Mapping[str, Any], model: Any) -> None:
    """Raise HYWUError where the connected MODEL is another architecture than the checkpoint says."""
    network = model.model.diffusion_model
    name, wanted, layer = type(network).__name__, facts["network"], facts["layer"]
    if name != wanted or submodule(network, layer) is None:
        lacks = f", which has no {layer}" if name == wanted else ""
        raise HYWUError(
            f"This generator reads the hidden states of {wanted} after {layer}, the connected MODEL is "
            f"{name}{lacks}; connect the base model that the generator was trained for."
        )


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Warnings where the MODEL or VAE isn't the training's, though of its architecture."""
    texts = {
        "weights": "The connected MODEL has other weights than the one whose hidden states the "
        "generator was trained on (a copy in another precision does, too).",
        "patches": "The LoRAs and patches on the connected MODEL are not those of the generator's "
        "training; its hidden states are taken with them.",
        "vae": "The connected VAE is not the one of the generator's training.",
    }
    return [text for key, text in texts.items() if wanted.get(key) != found.get(key)]


def encode(
    facts: Mapping[str, Any], model: Any, pictures: Sequence[Tensor], said: Sequence[Entry],
    latent: Latent,
) -> Tensor:  # fmt: skip
    """Tokens ``[B, L, C]`` of each item's pictures one after another, on the CPU.

    C is the layer's width, or twice that with what the text changes (see `CONTRAST`). pictures: the items'
    first ones, second ones and so on, ``[B, 3, H, W]`` in 0..1 or ``[1, ...]`` for all. said: each item's
    text. The MODEL runs for each picture under the text of its item, as it is given, with whatever lies
    on it. Raises HYWUError.
    """
    check(facts, model)
    bar = comfy.utils.ProgressBar(sum(map(len, pictures)) + len(pictures) * len(said))

    def step(make: Callable[..., Tensor], *given: Any) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        made = make(*given)
        bar.update(1)
        return made

    # all latents, then all runs: on a small card each model comes and goes once
    side, known = facts["pixels"], {}
    latents = [
        [step(lambda one: latent(scaled(one, side)), image) for image in picture.split(1)]
        for picture in pictures
    ]
    rows = []
    for at, entry in zip(by_item(latents, len(said)), said, strict=True):
        for one in at:
            # one picture and one text for all items: one run
            key = id(one), id(entry)
            if key not in known:
                known[key] = step(partial(_tokens, facts, model), one, entry)
        rows.append(torch.cat([known[id(one), id(entry)] for one in at], dim=1))
    return torch.cat(rows)


def scaled(image: Tensor, pixels: int) -> Tensor:
    """``[1, 3, H, W]`` with about ``pixels x pixels`` pixels and the same proportions."""
    sides = image.shape[2:]
    zoom = pixels / math.sqrt(math.prod(sides))
    wanted = [max(MULTIPLE, round(side * zoom / MULTIPLE) * MULTIPLE) for side in sides]
    if list(sides) == wanted:
        return image
    return F.interpolate(image, wanted, mode="bilinear", antialias=True).clamp(0, 1)


# -- one picture -------------------------------------------------------------------------------------


def _tokens(facts: Mapping[str, Any], model: Any, latent: Tensor, entry: Entry) -> Tensor:
    """``[1, L, C]``: the states, and behind them, where the checkpoint wants it, what the text changes."""
    states = _states(facts, model, latent, entry)
    if facts.get("contrast") is None:
        return states
    return torch.cat([states, states - _states(facts, model, latent, _zeroed(entry))], dim=2)


def _zeroed(entry: Entry) -> Entry:
    """As ComfyUI's ConditioningZeroOut makes it: as many tokens, all 0."""
    text, facts = entry
    pooled = facts.get("pooled_output")
    zeros = None if pooled is None else torch.zeros_like(pooled)
    return [torch.zeros_like(text), {**facts, "pooled_output": zeros}]


def _states(facts: Mapping[str, Any], model: Any, latent: Tensor, entry: Entry) -> Tensor:
    network, layer, side = model.model.diffusion_model, facts["layer"], facts["side"]

    def run(kept: Place | None = None) -> tuple[list[Tensor], bool]:
        with _Watch(network, [layer], kept) as watch:
            finite = _run(model, latent, entry, facts["sigma"])
        return _members(watch.output), finite

    members, finite = run()
    if not finite:
        raise HYWUError(
            f"{facts['network']} gives NaN or infinite values for the picture; run it in another "
            "precision."
        )
    maps = [_channels_first(m, latent) for m in members if m.ndim > 3]
    if maps:
        return _pooled(maps[-1].float(), side)
    sequences = [m for m in members if m.ndim == 3]
    if not sequences:
        raise HYWUError(
            f"{layer} of {facts['network']} gives no tokens [batch, length, width] and no feature map; "
            "train a generator that reads encoders."
        )
    place = _place(network, layer, sequences, latent, lambda kept: run(kept)[1])
    if place is None:
        # where the image lies is not known: parts of the whole sequence, in its order
        return F.adaptive_avg_pool1d(sequences[-1].float().mT, side * side).mT.cpu()
    tokens = sequences[place.member][:, place.start : place.stop].float()
    return _pooled(tokens.mT.unflatten(2, place.grid), side)


def _pooled(features: Tensor, side: int) -> Tensor:
    """``[1, C, (frames,) h, w]`` -> ``[1, L, C]``: the mean over frames and over each cell of a grid."""
    if features.ndim == 5:
        features = features.mean(2)
    rows, columns = (min(side, size) for size in features.shape[2:])
    return F.adaptive_avg_pool2d(features, (rows, columns)).flatten(2).mT.cpu()


def _channels_first(features: Tensor, latent: Tensor) -> Tensor:
    """A feature map with its channels in front; some transformers keep them last."""
    places = features.shape[1:-1]
    ratio = latent.shape[-2] / places[-2]
    last = ratio.is_integer() and latent.shape[-1] == ratio * places[-1]
    first = latent.shape[-2] * features.shape[-1] == latent.shape[-1] * features.shape[-2]
    return features.movedim(-1, 1) if last and not first else features


@torch.inference_mode()
def _run(model: Any, latent: Tensor, entry: Entry, sigma: float) -> bool:
    """One call of the MODEL at a noise level, by ComfyUI's sampler; whether all it gives is finite.

    entry: of a CONDITIONING. Models that take the picture as more channels get it so, too.
    """
    sampling = model.get_model_object("model_sampling")
    sigma = min(max(sigma, float(sampling.sigma_min)), float(sampling.sigma_max))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    text, facts = entry

    def once(denoiser: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
        return denoiser(x, sigmas[:1].expand(x.shape[0]), **(extra_args or {}))

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[text, {**facts, "concat_latent_image": latent}]]})
    made = guider.sample(
        noise, latent, comfy.samplers.KSAMPLER(once), torch.tensor([sigma, 0.0]), disable_pbar=True,
        seed=0,
    )  # fmt: skip
    return bool(torch.isfinite(made).all())


# -- the block's output ------------------------------------------------------------------------------


class _Watch:
    """Inside the block: which of the layers was the last to end, and what it gave.

    kept: everything else that the layer gives is NaN for what comes after it.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], kept: Place | None = None):
        self.network, self.layers, self.kept = network, layers, kept
        self.path, self.output = "", None
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for path in self.layers:
            layer = submodule(self.network, path)
            self._handles.append(layer.register_forward_hook(self._hook(path)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, path: str) -> Callable[..., Any]:
        def seen(module: nn.Module, args: Any, output: Any) -> Any:
            # a copy: the model may go on in place
            self.path, self.output = path, _mapped(output, lambda _, value: value.clone())
            return output if self.kept is None else _mapped(output, self._blank)

        return seen

    def _blank(self, member: int, value: Tensor) -> Tensor:
        blank, kept = torch.full_like(value, float("nan")), self.kept
        if member == kept.member:
            blank[:, kept.start : kept.stop] = value[:, kept.start : kept.stop]
        return blank


def _mapped(output: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """A layer's output with its tensors of tokens or features changed; others stay."""
    numbers = itertools.count()

    def one(value: Any) -> Any:
        tokens = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2
        return change(next(numbers), value) if tokens else value

    if isinstance(output, dict):
        return {key: one(value) for key, value in output.items()}
    return type(output)(map(one, output)) if isinstance(output, (tuple, list)) else one(output)


def _members(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(output, lambda _, value: found.append(value) or value)
    return found


# -- which tokens are the image's ----------------------------------------------------------------------

#: Network -> what was found for a layer, its outputs' lengths and a latent's shape.
_places: WeakKeyDictionary[nn.Module, dict[Any, Place | None]] = WeakKeyDictionary()


def _place(
    network: nn.Module, layer: str, sequences: Sequence[Tensor], latent: Tensor,
    alone: Callable[[Place], bool],
) -> Place | None:  # fmt: skip
    """Where the image's tokens are. alone: whether the MODEL's output needs no others than these."""
    key = (layer, tuple(s.shape[1] for s in sequences), tuple(latent.shape[2:]))
    known = _places.setdefault(network, {})
    if key not in known:
        known[key] = _find(network, key[1], latent, alone)
        if known[key] is None:
            log.warning(
                "HY-WU: which of %s's tokens after %s are the image's is not clear; all are taken.",
                type(network).__name__, layer,
            )  # fmt: skip
    return known[key]


def _find(
    network: nn.Module, lengths: Sequence[int], latent: Tensor, alone: Callable[[Place], bool]
) -> Place | None:
    for grid in _grids(network, latent, lengths):
        count = math.prod(grid)
        # text comes first in most models that have one sequence, last in HunyuanVideo's kind
        places = [
            Place(member, start, start + count, grid)
            for member, length in enumerate(lengths)
            for start in dict.fromkeys((length - count, 0))
            if length >= count
        ]
        if len(places) == 1:
            return places[0]
        for place in places:
            if alone(place):
                return place
        for member, length in enumerate(lengths):
            # padded at both ends: tokens before the image can go one by one, its first one can't
            low, high = 0, length - count
            if high < 1 or not alone(Place(member, 0, length, grid)):
                continue
            while low < high:
                middle = (low + high + 1) // 2
                if alone(Place(member, middle, length, grid)):
                    low = middle
                else:
                    high = middle - 1
            if alone(place := Place(member, low, low + count, grid)):
                return place
    return None


def _grids(
    network: nn.Module, latent: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(frames, rows, columns) that the image's tokens may form."""
    sizes = [1] * (5 - latent.ndim) + list(latent.shape[2:])
    patch = getattr(network, "patch_size", None)
    if isinstance(patch, int):
        patch = (patch, patch)
    if isinstance(patch, Sequence) and 0 < len(patch) <= 3:
        sides = [1] * (3 - len(patch)) + list(patch)
        yield tuple(-(-size // side) for size, side in zip(sizes, sides, strict=True))
    # a UNet's level, or a transformer that doesn't say how large its patches are
    for side in (1, 2, 4, 8, 16, 32):
        grid = (sizes[0], -(-sizes[1] // side), -(-sizes[2] // side))
        if math.prod(grid) in lengths:
            yield grid
