"""The one reader and writer of images: files, Pillow images and tensors into each other.

Files of any depth and colour model that Pillow opens become what a viewer shows: 8-bit RGB, upright by
their EXIF orientation, transparency on white, the first frame. Colour profiles are not applied, as in
ComfyUI. What can't be brought to 8 bits without guessing is an error.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from .errors import HYWUError
from .files import atomic_path

if TYPE_CHECKING:  # torch only where tensors are: clients of servers send files
    from torch import Tensor

#: suffix -> Pillow's format name, of what can be written
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_SIDE = 512

#: Formats, and TIFF's compressions, of which a byte holds so many pixels at most.
PACKINGS = {"PNG", "BMP", "raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate"}
DENSEST = 9000

#: What a gray PNG of few bits says is transparent counts in those bits; the pixels come in 8.
_GRAY_STEPS = {"1": 255, "L;1": 255, "L;2": 85, "L;4": 17}
#: Formats that Pillow hands to another program, which a file of any name would start: PostScript may run for
#: ever in Ghostscript, and do more.
FOREIGN = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
#: TIFF's tags: how many bits a sample has, whether 0 is white, whether samples are signed.
BITS, WHITE_IS_ZERO, SAMPLES = 258, 262, 339
#: Of files that are images.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def load_image(file: str | Path | BinaryIO) -> Image.Image:
    """The image of a path or an open file as 8-bit RGB.

    Raises HYWUError naming the file when it isn't a whole image, or its values can't be read for certain.
    """
    try:
        if isinstance(file, (str, Path)) and not Path(file).is_file():
            raise FileNotFoundError("there is no such file")
        with _open(file) as opened:
            return _rgb(opened)
    except MemoryError:
        raise
    except HYWUError as error:
        raise HYWUError(f"{_name(file)}: {error}") from error
    # Pillow's readers fail with nearly every class of exception on a damaged file
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise HYWUError(f"{_name(file)}: can't be read as an image ({reason}).") from error


def read_image(file: str | Path | BinaryIO, max_side: int = MAX_SIDE) -> Tensor:
    """`load_image` as uint8 ``[3, H, W]``, at most `max_side` pixels per side. Raises HYWUError."""
    if max_side < 1:
        raise HYWUError(f"An image's longest side of {max_side} pixels; it must be 1 at least.")
    image = load_image(file)
    if max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return to_tensor(image)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a file's image as `load_image` gives it, upright. Raises HYWUError."""
    return load_image(path).size


def image_format(file: str | Path | BinaryIO) -> str | None:
    """Pillow's name of the format that a file claims to have; None where it claims none."""
    try:
        with _open(file) as opened:
            return opened.format
    except OSError:
        return None


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 ``[3, H, W]`` of a Pillow image."""
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_pillow(image: Tensor) -> Image.Image:
    """RGB image of a tensor ``[3, H, W]``: uint8, or floating point in 0..1 (clipped, rounded to 8 bits).

    Raises HYWUError on another shape, and on values that are not finite.
    """
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise HYWUError(f"The image is {tuple(image.shape)}; it must be [3, height, width].")
    pixels = image.detach().cpu()
    if pixels.is_floating_point():
        pixels = pixels.float()
        if not pixels.isfinite().all():
            raise HYWUError("The image holds values that are not finite; look at what made it.")
        pixels = pixels.clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def write_image(image: Tensor | Image.Image, path: str | Path, quality: int = 95) -> None:
    """A tensor (see `to_pillow`) or a Pillow image to a PNG, JPEG or WebP by the suffix.

    Atomically, replacing a file.
    quality: of JPEG and WebP, 1 to 100.
    Raises HYWUError.
    """
    kind = WRITABLE.get(Path(path).suffix.lower())
    if kind is None:
        raise HYWUError(f"{path}: the name must end in {', '.join(WRITABLE)}.")
    image = image if isinstance(image, Image.Image) else to_pillow(image)
    with atomic_path(path, overwrite=True) as part:
        image.save(part, format=kind, quality=quality)


def encode_image(image: Image.Image, kind: str = "PNG", quality: int = 95) -> bytes:
    """A file's bytes of a Pillow image.

    kind: Pillow's name of the format.
    """
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return buffer.getvalue()


def _open(file: str | Path | BinaryIO) -> Image.Image:
    Image.init()
    return Image.open(file, formats=[name for name in Image.ID if name not in FOREIGN])


def _name(file: str | Path | BinaryIO) -> str:
    return str(file) if isinstance(file, (str, Path)) else getattr(file, "name", "the image")


def _rgb(opened: Image.Image) -> Image.Image:
    """8-bit RGB of an opened file."""
    _check_size(opened)
    _check_samples(opened)
    packed = str(opened.tile[0][3]) if opened.tile else ""
    image = ImageOps.exif_transpose(opened)
    alpha = _alpha_of_colour(image, packed)
    if image.mode == "La":  # gray times alpha
        image = image.convert("LA")
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_gray(image, opened))
    elif image.mode == "LAB":
        image = _from_lab(image)
    elif "transparency" in image.info and alpha is None:
        image = image.convert("RGBA")
    if alpha is not None:
        image = image.convert("RGB")
        image.putalpha(Image.fromarray(alpha))
    if "A" in image.mode or "a" in image.mode:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _check_size(opened: Image.Image) -> None:
    """Raises HYWUError where a file declares more pixels than its bytes can hold, before memory is taken."""
    packing = opened.info.get("compression", "raw") if opened.format == "TIFF" else opened.format
    if packing not in PACKINGS or opened.fp is None:
        return  # others hold any number of equal pixels in a few bytes
    place = opened.fp.tell()
    size = opened.fp.seek(0, io.SEEK_END)
    opened.fp.seek(place)
    if opened.width * opened.height > DENSEST * size + (1 << 20):
        raise HYWUError(
            f"it says it has {opened.width} x {opened.height} pixels, which its {size:,} bytes can't hold; it "
            "is damaged."
        )


def _alpha_of_colour(image: Image.Image, packed: str) -> np.ndarray | None:
    """uint8 ``[H, W]`` where one gray or colour is transparent, else None.

    packed: how the file holds its samples.
    The transparent colour counts as the file does, and Pillow gives pixels of 8 bits for samples of less and,
    in colour, of more.
    """
    colour = image.info.get("transparency")
    if image.mode not in ("1", "L", "I", "I;16", "RGB") or not isinstance(colour, (int, tuple)):
        return None
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    if image.mode == "RGB" and ";16" in packed:
        colour = tuple(value >> 8 for value in colour)
    elif image.mode in ("1", "L"):
        colour = colour * _GRAY_STEPS.get(packed, 1)
    same = pixels == np.asarray(colour)
    return np.where(same.all(axis=2) if same.ndim == 3 else same, 0, 255).astype(np.uint8)


def _check_samples(opened: Image.Image) -> None:
    """Raises HYWUError on signed samples of a TIFF, whose white Pillow doesn't say."""
    tags = getattr(opened, "tag_v2", {})
    bits = max(_numbers(tags.get(BITS, 1)), default=1)
    if bits < 32 and 2 in _numbers(tags.get(SAMPLES, 1)):
        raise HYWUError(
            f"its {bits}-bit values are signed, and nothing says which is white; save it unsigned."
        )


def _numbers(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _gray(image: Image.Image, opened: Image.Image) -> np.ndarray:
    """uint8 ``[H, W]`` of one channel of 12- to 32-bit integers or of floating point."""
    values, tags = np.asarray(image), getattr(opened, "tag_v2", {})
    # Pillow turns it over for samples of 8 bits and less alone
    turned = 255 if tags.get(WHITE_IS_ZERO) == 0 else 0
    if values.dtype.kind == "f":
        # not "within": a NaN is no number that is too large
        if not (values.min() >= 0 and values.max() <= 1):
            raise HYWUError(_range(values, "floating-point", "0 to 1"))
        return np.rint(values * 255).astype(np.uint8) ^ np.uint8(turned)
    low, high = int(values.min()), int(values.max())
    # older Pillow gives the 16 bits of a PNG as 32-bit integers
    whole = values.dtype.itemsize == 2 or opened.format == "PNG"
    if low < 0 or high > 65535 or (not whole and 0 < high < 256):
        raise HYWUError(_range(values, "32-bit", "0 to 65535, with some above 255,"))
    # and 12 bits as numbers up to 4095
    step = 16.0625 if _numbers(tags.get(BITS)) == (12,) else 257
    return np.rint(values / step).astype(np.uint8) ^ np.uint8(turned)


def _range(values: np.ndarray, kind: str, read: str) -> str:
    return (
        f"its {kind} values go from {values.min():g} to {values.max():g}, and {read} can be read; save it "
        "with 8 or 16 bits."
    )


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, rgb, "LAB", "RGB"))
