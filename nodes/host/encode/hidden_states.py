"""A MODEL's own hidden states as a condition: what its last repeated block makes of image and text.

The image goes through the MODEL once, as a sampler's last step would send it: its latent with a
little noise, always the same, and the instruction as the text. A hook on the block takes its output;
the tokens of the image are averaged into a grid of at most 8 x 8. Which tokens are the image's is found
out by the MODEL: they are those that its output depends on.

Most of such a state is the image's; two instructions for one image may differ by a hundredth. So the
image goes through a second time, its text zeroed, and each token is followed, as more channels, by what
the text has changed. A generator that is trained on standardized channels sees both equally well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ....hywu_core.condition import OFFICIAL_PART
from ....hywu_core.discovery import submodule
from ....hywu_core.encoders.base import by_item
from ....hywu_core.errors import HYWUError
from ....hywu_core.fingerprint import of_module
from ....hywu_core.layout import LoRALayout
from ..identity import base_fingerprint, patches_fingerprint
from .conditionings import Entry
from .token_probe import Place, Watch, image_tokens, tensors_of

#: Part of the condition.
PART = OFFICIAL_PART
#: Noise level: a tenth of the image's size, or the nearest that the MODEL knows.
SIGMA = 0.1
#: Side of the grid of tokens, at most.
SIDE = 8
#: What a state is compared with: the same run with all numbers of the text 0. Checkpoints that say
#: nothing about it read the state alone.
CONTRAST = "zeros"
#: Pixels that the sides of an image are multiples of.
MULTIPLE = 16
#: Text -> an entry of a CONDITIONING, and image ``[1, 3, H, W]`` -> its latent.
Said = Callable[[str], Entry]
Latent = Callable[[Tensor], Tensor]


def describe(model: Any, vae: Any, pixels: int, said: Said, latent: Latent) -> dict[str, Any]:
    """What a checkpoint says about this encoder: the MODEL, the block, the size of the images.

    pixels: side of the squares that are trained on; other images are brought to this area.
    """
    network = model.model.diffusion_model
    layers = [path for stack in LoRALayout.of(network, 1).stacks for path in stack.layers if path]
    image = scaled(torch.full((1, 3, pixels, pixels), 0.5), pixels)
    with Watch(network, layers) as watch:
        _run(model, latent(image), said("a"), SIGMA)
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


def check(config: Mapping[str, Any], model: Any) -> None:
    """Raise HYWUError where the connected MODEL is another architecture than the checkpoint says."""
    network = model.model.diffusion_model
    name, wanted, layer = type(network).__name__, config["network"], config["layer"]
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
    config: Mapping[str, Any], model: Any, images: Sequence[Tensor], said: Sequence[Entry],
    latent: Latent,
) -> Tensor:  # fmt: skip
    """Tokens ``[B, L, C]`` of each item's images one after another, on the CPU.

    C is the layer's width, or twice that with what the text changes (see `CONTRAST`).
    images: the items' first ones, second ones and so on, ``[B, 3, H, W]`` in 0..1 or ``[1, ...]`` for all.
    said: each item's text. The MODEL runs for each image under the text of its item, as it is given, with
        whatever lies on it.
    Raises HYWUError.
    """
    check(config, model)
    bar = comfy.utils.ProgressBar(sum(map(len, images)) + len(images) * len(said))

    def step(make: Callable[..., Tensor], *given: Any) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        made = make(*given)
        bar.update(1)
        return made

    # all latents, then all runs: on a small card each model comes and goes once
    side, known = config["pixels"], {}
    latents = [
        [step(lambda one: latent(scaled(one, side)), image) for image in image.split(1)]
        for image in images
    ]
    rows = []
    for at, entry in zip(by_item(latents, len(said)), said, strict=True):
        for one in at:
            # one image and one text for all items: one run
            key = id(one), id(entry)
            if key not in known:
                known[key] = step(partial(_tokens, config, model), one, entry)
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


# -- one image -------------------------------------------------------------------------------------


def _tokens(config: Mapping[str, Any], model: Any, latent: Tensor, entry: Entry) -> Tensor:
    """``[1, L, C]``: the states, and behind them, where the checkpoint wants it, what the text changes."""
    states = _states(config, model, latent, entry)
    if config.get("contrast") is None:
        return states
    return torch.cat([states, states - _states(config, model, latent, _zeroed(entry))], dim=2)


def _zeroed(entry: Entry) -> Entry:
    """As ComfyUI's ConditioningZeroOut makes it: as many tokens, all 0."""
    text, options = entry
    pooled = options.get("pooled_output")
    zeros = None if pooled is None else torch.zeros_like(pooled)
    return [torch.zeros_like(text), {**options, "pooled_output": zeros}]


def _states(config: Mapping[str, Any], model: Any, latent: Tensor, entry: Entry) -> Tensor:
    network, layer, side = model.model.diffusion_model, config["layer"], config["side"]

    def run(kept: Place | None = None) -> tuple[list[Tensor], bool]:
        with Watch(network, [layer], kept) as watch:
            finite = _run(model, latent, entry, config["sigma"])
        return tensors_of(watch.output), finite

    members, finite = run()
    if not finite:
        raise HYWUError(
            f"{config['network']} gives NaN or infinite values for the image; run it in another "
            "precision."
        )
    maps = [_channels_first(m, latent) for m in members if m.ndim > 3]
    if maps:
        return _pooled(maps[-1].float(), side)
    sequences = [m for m in members if m.ndim == 3]
    if not sequences:
        raise HYWUError(
            f"{layer} of {config['network']} gives no tokens [batch, length, width] and no feature map; "
            "train a generator that reads encoders."
        )
    place = image_tokens(network, layer, sequences, latent, lambda kept: run(kept)[1])
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

    entry: of a CONDITIONING.
    Models that take the image as more channels get it so, too.
    """
    sampling = model.get_model_object("model_sampling")
    sigma = min(max(sigma, float(sampling.sigma_min)), float(sampling.sigma_max))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    text, options = entry

    def once(denoiser: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
        return denoiser(x, sigmas[:1].expand(x.shape[0]), **(extra_args or {}))

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[text, {**options, "concat_latent_image": latent}]]})
    made = guider.sample(
        noise, latent, comfy.samplers.KSAMPLER(once), torch.tensor([sigma, 0.0]), disable_pbar=True,
        seed=0,
    )  # fmt: skip
    return bool(torch.isfinite(made).all())
