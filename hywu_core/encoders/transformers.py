"""Conditions from encoders that `transformers` loads from local folders, as Condition Encode makes them of
a graph's CLIP_VISION and CLIP: a generator that was trained in ComfyUI gets the same parts without it.

What ComfyUI does is followed to the letter, also where a model's own processor does something else: every
image is cropped to a square of the side that the model was made for, and a CLIP reads its text in windows of
77 tokens, all of which count. Only weights in parentheses, "(dark:1.2)", are text like any other here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fingerprint
from ..condition import Condition
from ..errors import HYWUError, need, one_line
from ..files import read_json
from .base import Images, by_item, number_of_images, padded

VISION, TEXT = "vision", "text"
#: What checkpoints and conditions call the encoders of a graph, whose place these take.
TYPE = "comfyui"

#: Part -> model_type of a config.json -> the class of transformers that makes the part's tokens.
CLASSES = {
    VISION: {
        "clip": "CLIPVisionModel",
        "clip_vision_model": "CLIPVisionModel",
        "siglip": "SiglipVisionModel",
        "siglip_vision_model": "SiglipVisionModel",
        "dinov2": "Dinov2Model",
    },
    TEXT: {
        "clip": "CLIPTextModel",
        "clip_text_model": "CLIPTextModel",
        "t5": "T5EncoderModel",
        "umt5": "UMT5EncoderModel",
    },
}
#: Mean and deviation of pixels in 0..1, where no preprocessor_config.json says them.
PIXELS = {
    "CLIPVisionModel": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "SiglipVisionModel": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "Dinov2Model": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
#: ComfyUI fills a UMT5's tokens up to this number with zeros that count.
UMT5_TOKENS = 512


class TransformersEncoder:
    """(images, instructions, further images) -> Condition with the parts `vision` and `text`, those that
    are asked for.

    parts: name -> width, in order: a GeneratorConfig's `condition`.
    vision_model, text_model: folders with config.json and safetensors; the text model's also holds its
        tokenizer, the vision model's may hold a preprocessor_config.json, of which mean and deviation are
        taken.
    text_padding: a T5's text is filled up to this many tokens, which count (77 in ComfyUI for SD3, 256 for
        Flux); 0 for ComfyUI's others, which mask the filling or have none. Runs in float32; nothing is
        downloaded, no code of a folder runs.
    Raises HYWUError on a folder that doesn't fit, before weights are read where possible.
    """

    def __init__(
        self,
        parts: Mapping[str, int],
        vision_model: str | Path | None = None,
        text_model: str | Path | None = None,
        device: torch.device | str = "cpu",
        text_padding: int = 0,
    ) -> None:
        self.parts = dict(parts)
        folders = {VISION: vision_model, TEXT: text_model}
        if unknown := sorted(parts.keys() - folders.keys()):
            raise HYWUError(
                f"The generator reads the condition part '{unknown[0]}', which no vision or text encoder "
                "makes; make the condition in ComfyUI and save it there."
            )
        for part in parts:
            if folders[part] is None:
                raise HYWUError(
                    f"The generator reads the condition part '{part}' ({parts[part]} wide); give the "
                    f"folder of its {part} model."
                )
        configs = {part: _config(Path(folders[part]), part, width) for part, width in parts.items()}
        kinds = {VISION: _Vision, TEXT: _Text}
        self._encoders = {
            part: kinds[part](Path(folders[part]), config, torch.device(device))
            for part, config in configs.items()
        }
        self.text_padding = text_padding
        self.identity = {
            f"{part}_model": _folder_digest(Path(folders[part])) for part in self._encoders
        }

    @torch.inference_mode()
    def __call__(
        self,
        images: Images,
        instructions: Sequence[str],
        *further: Images,
    ) -> Condition:
        """images: ``[B, 3, H, W]``, or B of ``[3, H, W]`` of any sizes, uint8 or float in 0..1; one
        instruction per image. further: the items' second images, third ones and so on, each like
        `images`, or a single one for all items; the tokens of an item's images follow one another.
        An item of a batch is as it is alone. Raises HYWUError on a misfit.
        """
        rows = [[_pixels(image) for image in row] for row in (images, *further)]
        if not rows[0] or len(rows[0]) != len(instructions):
            raise HYWUError(
                f"There are {len(rows[0])} images and {len(instructions)} instructions; give one "
                "instruction per image."
            )
        items = by_item(rows, len(instructions))
        parts, masks = {}, {}
        for part, encoder in self._encoders.items():
            if part == VISION:
                seen = by_item([[encoder(image) for image in row] for row in rows], len(items))
                parts[part] = torch.cat([torch.cat(item, dim=1) for item in seen])
            else:
                known = {text: encoder(text, self.text_padding) for text in set(instructions)}
                parts[part], masks[part] = padded([known[text] for text in instructions])
        fingerprint = self._fingerprint(items, instructions)
        origin = {"instruction": list(instructions), "encoder": TYPE, **self.identity}
        return Condition(parts, masks, fingerprint, {**origin, **number_of_images(len(rows))})

    def _fingerprint(self, items: Sequence[Sequence[Tensor]], texts: Sequence[str]) -> str:
        values = [list(self.parts), self.identity, self.text_padding, list(texts)]
        images = itertools.chain.from_iterable(items)
        pieces = ((repr(tuple(image.shape)), image) for image in images)
        return fingerprint.digest([repr(values), *itertools.chain.from_iterable(pieces)])


class _Vision:
    """Last layer's tokens ``[1, L, C]`` of an image, on the CPU: SigLIP's and DINOv2's after their last
    norm, CLIP's before it.
    """

    def __init__(self, folder: Path, config: Any, device: torch.device) -> None:
        self.model, self.size = _load(folder, VISION, config, device), config.image_size
        processor = folder / "preprocessor_config.json"
        mean, deviation = PIXELS[type(self.model).__name__]
        with _sentences(processor, "no mean and deviation of three colours"):
            said = read_json(processor, dict) if processor.is_file() else {}
            self.mean = torch.tensor(said.get("image_mean", mean)).view(3, 1, 1)
            self.deviation = torch.tensor(said.get("image_std", deviation)).view(3, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        pixels = (self._square(image[None]) - self.mean) / self.deviation
        return self.model(pixel_values=pixels.to(self.model.device)).last_hidden_state.cpu()

    def _square(self, image: Tensor) -> Tensor:
        """``[1, 3, H, W]`` -> the middle square, in the 256 steps of 0..1 that images have."""
        size, (height, width) = self.size, image.shape[2:]
        if (height, width) != (size, size):
            scale = size / min(height, width)
            height, width = round(scale * height), round(scale * width)
            image = F.interpolate(image, (height, width), mode="bicubic", antialias=True)
            top, left = (height - size) // 2, (width - size) // 2
            image = image[..., top : top + size, left : left + size]
        return (image * 255).clamp(0, 255).round() / 255


class _Text:
    """Tokens ``[1, T, C]`` of a text, on the CPU, all of which count."""

    def __init__(self, folder: Path, config: Any, device: torch.device) -> None:
        if not any((folder / name).is_file() for name in TOKENIZERS):
            raise HYWUError(
                f"{folder}: holds no tokenizer ({', '.join(TOKENIZERS)}); copy the files of the model's "
                "own tokenizer there."
            )
        transformers = _transformers()
        with _sentences(folder, "no tokenizer that transformers loads"):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_LOCAL)
        self.folder, self.config = folder, config
        self.model = _load(folder, TEXT, config, device)

    def __call__(self, text: str, padding: int) -> Tensor:
        if type(self.model).__name__ == "CLIPTextModel":
            return self._clip(text)
        ids = self._ids(text)
        if type(self.model).__name__ == "UMT5EncoderModel":
            tokens = self.model(input_ids=self._tensor(ids)).last_hidden_state.cpu()
            return F.pad(tokens, (0, 0, 0, max(0, UMT5_TOKENS - len(ids))))
        ids += [0] * (padding - len(ids))
        return self.model(input_ids=self._tensor(ids)).last_hidden_state.cpu()

    def _clip(self, text: str) -> Tensor:
        """CLIP-L's last layer; that before it of CLIP-H and CLIP-G, as what uses them was trained with.

        ComfyUI tells the three apart by their layers, too.
        """
        ends, layers = self._ids(""), self.config.num_hidden_layers
        if len(ends) != 2:
            raise HYWUError(
                f"{self.folder}: its tokenizer doesn't put a start and an end around a text, as a CLIP's "
                "does; copy the files of the model's own tokenizer there."
            )
        start, end = ends
        length = self.config.max_position_embeddings
        words, room = self._ids(text)[1:-1], length - 2
        rows = []
        for first in range(0, max(1, len(words)), room):
            row = [start, *words[first : first + room], end]
            rows += row + [0 if layers > 22 else end] * (length - len(row))
        ids = self._tensor(rows).view(-1, length)
        made = self.model(input_ids=ids, output_hidden_states=layers > 22)
        if layers > 30:
            tokens = made.hidden_states[31]
        elif layers > 22:  # the 24th layer is unused, and missing in some files
            body = getattr(self.model, "text_model", self.model)  # transformers 4 has this level
            tokens = body.final_layer_norm(made.hidden_states[23])
        else:
            tokens = made.last_hidden_state
        return tokens.flatten(0, 1)[None].cpu()

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if max(ids, default=0) >= self.config.vocab_size:
            raise HYWUError(
                f"{self.folder}: its tokenizer knows more words than the model ({max(ids)} of "
                f"{self.config.vocab_size}); copy the files of the model's own tokenizer there."
            )
        return ids

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.device)


def _pixels(image: Tensor) -> Tensor:
    """float32 ``[3, H, W]`` in 0..1 on the CPU."""
    fits = image.dtype == torch.uint8 or image.is_floating_point()
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or not fits:
        raise HYWUError(
            f"An image is {image.dtype} {tuple(image.shape)}; it must be [3, height, width], uint8 or "
            "float in 0..1."
        )
    pixels = image.detach().cpu().float()
    return pixels / 255 if image.dtype == torch.uint8 else pixels.clamp(0, 1)


# -- folders ------------------------------------------------------------------------------------------

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def _transformers() -> Any:
    return need("transformers", "for encoders from local folders")


def _config(folder: Path, part: str, width: int) -> Any:
    """The config of the folder's `part` model. Raises HYWUError unless its tokens can be `width` wide."""
    if not (folder / "config.json").is_file():
        raise HYWUError(f"{folder}: holds no config.json; give a transformers model's folder.")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        found = (
            f"only pickles ({', '.join(pickled[:3])}), which may run code" if pickled else "none"
        )
        raise HYWUError(
            f"{folder}: weights are read from .safetensors files and there are {found}; save the model "
            "again with save_pretrained, which writes safetensors."
        )
    transformers = _transformers()
    with _sentences(folder, "no model that transformers knows"):
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    if config.model_type not in CLASSES[part]:
        raise HYWUError(
            f"{folder}: is a {config.model_type}, which is no {part} model that runs here (here run: "
            f"{', '.join(CLASSES[part])})."
        )
    config = getattr(config, f"{part}_config", config)  # of both models of a CLIP
    if config.hidden_size != width:
        raise HYWUError(
            f"{folder}: gives tokens {config.hidden_size} wide, the generator reads '{part}' {width} "
            "wide; give the encoder that it was trained with."
        )
    return config


def _load(folder: Path, part: str, config: Any, device: torch.device) -> Any:
    transformers = _transformers()
    name = CLASSES[part][config.model_type]
    with _sentences(folder, f"no {name} that transformers loads"):
        model, info = getattr(transformers, name).from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    if missing := sorted(info["missing_keys"]):
        raise HYWUError(
            f"{folder}: its weights lack {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; get the model's files again."
        )
    return model.to(device, torch.float32).eval()


def _folder_digest(folder: Path) -> str:
    """Of what the folder's weights, config and tokenizer hold; large files by blocks of theirs."""
    patterns = ("*.safetensors", "*.json", "*.model", "*.txt")
    return fingerprint.sampled(sorted(file for p in patterns for file in folder.glob(p)))


@contextmanager
def _sentences(folder: Path, what: str) -> Iterator[None]:
    """What transformers raises, and logs, about a folder becomes one HYWUError."""
    logging = need("transformers.utils.logging", "for encoders from local folders")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of its own, of safetensors, of tokenizers: whatever the files are
        raise HYWUError(f"{folder}: {what} ({one_line(error)}).") from error
    finally:
        logging.set_verbosity(level)
