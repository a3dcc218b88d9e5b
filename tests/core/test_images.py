"""Images as cameras, scanners and other programs write them: all read rightly, or refused."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, TiffImagePlugin

from hywu_core import HYWUError
from hywu_core.images import (
    encode_image,
    image_format,
    image_size,
    load_image,
    read_image,
    to_pillow,
    to_tensor,
    write_image,
)

Y, X = np.mgrid[0:24, 0:32]
RGB = np.stack([40 + 6 * X, 30 + 8 * Y, 90 + 60 * np.sin(X / 4) * np.cos(Y / 3)], -1)
RGB = RGB.clip(0, 255).astype(np.uint8)
GRAY = RGB.mean(-1).round().astype(np.uint8)
SHOWN_GRAY = np.repeat(GRAY[..., None], 3, -1)
HALF = np.where(X[..., None] < 16, 255, RGB).astype(np.uint8)


def png(samples: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: of depths that Pillow doesn't write."""
    height, width = samples.shape[:2]

    def row(values):
        if depth == 16:
            return values.astype(">u2").tobytes()
        bits = (values[:, None] >> np.arange(depth)[::-1]) & 1
        return np.packbits(bits.astype(np.uint8).ravel()).tobytes()

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row(samples[i]) for i in range(height)))
    parts = [(b"IHDR", head), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(
        Image.fromarray(RGB), ImageCms.buildTransform(*profiles, "RGB", "LAB")
    )


def tiff(
    data: bytes, bits: int, order: str = "<", white: int = 1, samples: int = 1, **more: int
) -> bytes:
    """A TIFF of 32 x 24 written by hand: as Pillow doesn't write them.

    white: 0 where 0 is white.
    samples: 1 unsigned, 2 signed, 3 floating point.
    more: alpha: what the second sample of a pixel is.
    """
    many = 1 + len(more)
    tags = [(256, 32), (257, 24), (259, 1), (262, white), (273, 8), (277, many), (278, 24)]
    tags += [(279, len(data)), (339, samples)] + [(338, kind) for kind in more.values()]
    listed = [(tag, 4, 1, struct.pack(f"{order}I", value)) for tag, value in tags]
    listed.append((258, 3, many, struct.pack(f"{order}2H", bits, bits if more else 0)))
    entries = b"".join(struct.pack(f"{order}HHI", *row[:3]) + row[3] for row in sorted(listed))
    head = struct.pack(f"{order}2sHI", b"MM" if order == ">" else b"II", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(listed)) + entries + bytes(4)


def twelve_bits(values: np.ndarray) -> bytes:
    """Two samples of 12 bits in three bytes."""
    one, two = (values.astype(int).ravel()[i::2] for i in (0, 1))
    return np.stack([one >> 4, (one & 15) << 4 | two >> 8, two & 255], -1).astype("u1").tobytes()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


WIDE = GRAY.astype(np.uint16) * 257
BASE = Image.fromarray(RGB)
LEFT = np.where(X < 16, 9, WIDE).astype(np.uint16)
TWO_BITS = (GRAY // 64).astype(np.uint8)
SHOWN_TWO = np.where(TWO_BITS[..., None] == 1, 255, np.repeat(TWO_BITS[..., None] * 85, 3, -1))

FILES = {
    "gray of 16 bits": (saved(Image.fromarray(WIDE), "PNG"), SHOWN_GRAY, 0),
    "gray TIFF of 16 bits": (saved(Image.fromarray(WIDE), "TIFF"), SHOWN_GRAY, 0),
    "gray TIFF of 16 bits, big-endian": (
        tiff(WIDE.astype(">u2").tobytes(), 16, ">"),
        SHOWN_GRAY,
        0,
    ),
    "gray TIFF of 16 bits, 0 is white": (
        tiff(WIDE.astype("<u2").tobytes(), 16, white=0),
        255 - SHOWN_GRAY,
        0,
    ),
    "gray TIFF of 8 bits, 0 is white": (tiff(GRAY.tobytes(), 8, white=0), 255 - SHOWN_GRAY, 0),
    "floats, 0 is white": (
        tiff((GRAY / 255).astype(">f4").tobytes(), 32, ">", white=0, samples=3),
        255 - SHOWN_GRAY,
        0,
    ),
    "gray TIFF of 12 bits": (tiff(twelve_bits(GRAY * (4095 / 255)), 12), SHOWN_GRAY, 0),
    "32-bit integers": (saved(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), SHOWN_GRAY, 0),
    "floats": (saved(Image.fromarray((GRAY / 255).astype(np.float32)), "TIFF"), SHOWN_GRAY, 0),
    "rgb of 16 bits": (png(RGB.astype(np.uint16) * 257, 16, 2), RGB, 0),
    "gray of 16 bits, one transparent": (
        png(LEFT[..., None], 16, 0, (b"tRNS", struct.pack(">H", 9))),
        np.where(X[..., None] < 16, 255, SHOWN_GRAY),
        0,
    ),
    "gray of 2 bits, one transparent": (
        png(TWO_BITS, 2, 0, (b"tRNS", struct.pack(">H", 1))),
        SHOWN_TWO,
        0,
    ),
    "rgb of 16 bits, one transparent": (
        png(
            np.where(X[..., None] < 16, 771, RGB.astype(np.uint16) * 257),
            16,
            2,
            (b"tRNS", struct.pack(">HHH", 771, 771, 771)),
        ),
        HALF,
        0,
    ),
    "alpha": (
        saved(Image.fromarray(np.dstack([RGB, np.where(X < 16, 0, 255).astype(np.uint8)])), "PNG"),
        HALF,
        0,
    ),
    "turned": (saved(BASE.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6)), RGB, 0),
    "cmyk": (saved(BASE.convert("CMYK"), "JPEG", quality=99, subsampling=0), RGB, 3),
    "lab": (saved(lab(), "TIFF"), RGB, 24),
    "two frames": (
        saved(BASE, "PNG", save_all=True, append_images=[Image.new("RGB", BASE.size)]),
        RGB,
        0,
    ),
    "palette": (
        saved(BASE.quantize(200), "PNG"),
        np.asarray(BASE.quantize(200).convert("RGB")),
        0,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_show_what_a_viewer_shows(name):
    data, wanted, tolerance = FILES[name]
    found = np.asarray(load_image(io.BytesIO(data))).astype(int)
    assert found.shape == wanted.shape
    assert abs(found - wanted).max() <= tolerance
    assert abs(found - wanted).mean() < 1


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(GRAY.astype(np.int32)), "go from 53 to 187, and 0 to 65535"),
        (Image.fromarray(WIDE.astype(np.int32) * 30000), "go from"),
        (Image.fromarray(GRAY.astype(np.int32) - 200), "go from -"),
        (Image.fromarray(GRAY.astype(np.float32)), "floating-point values go from"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "go from nan to nan"),
    ],
)
def test_values_that_could_mean_anything_are_refused(tmp_path, image, words):
    path = tmp_path / "scan.tif"
    image.save(path)
    with pytest.raises(HYWUError, match=words) as caught:
        load_image(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "data", [b"", b"<html>", saved(BASE, "PNG")[:200], saved(BASE, "GIF")[:50]]
)
def test_damaged_files_are_one_sentence(tmp_path, data):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(HYWUError, match="can't be read as an image") as caught:
        read_image(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("name", ["", "missing.png", "x" * 300, "a\0b.png", "half\ud83d.png"])
def test_paths_without_a_file(tmp_path, name):
    with pytest.raises(HYWUError, match="can't be read") as caught:
        load_image(tmp_path / name)
    assert str(caught.value).encode()


def test_sizes(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(FILES["turned"][0])
    assert image_size(path) == (32, 24)
    assert read_image(path, max_side=16).shape == (3, 12, 16)
    assert read_image(path).shape == (3, 24, 32)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_written_and_read_back(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    for image in (to_tensor(BASE).float() / 255, BASE):
        write_image(image, path)
        difference = abs(np.asarray(load_image(path)).astype(int) - RGB)
        assert difference.mean() < (0.01 if suffix == ".png" else 4)
    with pytest.raises(HYWUError, match="must end in"):
        write_image(BASE, tmp_path / "x.gif")


def test_tensors_and_images():
    pixels = to_tensor(BASE)
    assert pixels.dtype == torch.uint8
    assert torch.equal(to_tensor(to_pillow(pixels)), pixels)
    assert torch.equal(to_tensor(to_pillow(pixels.double() / 255)), pixels)
    assert np.array_equal(load_image(io.BytesIO(encode_image(BASE))), RGB)
    with pytest.raises(HYWUError, match="not finite"):
        to_pillow(torch.full((3, 2, 2), float("nan")))
    for shape in ((1, 3, 2, 2), (4, 2, 2), (3, 0, 2), (2, 2)):
        with pytest.raises(HYWUError, match=r"must be \[3, height, width\]"):
            to_pillow(torch.zeros(shape))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_more_pixels_than_the_bytes_can_hold(tmp_path, kind):
    """A damaged head must not take the memory of 80 million pixels."""
    path = tmp_path / "x"
    image = Image.new("L", (48, 40))
    image.save(path, kind)
    data = path.read_bytes()
    if kind == "PNG":
        head = data[12:16] + struct.pack(">II", 9000, 9000) + data[24:29]
        data = data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    elif kind == "BMP":
        data = data[:18] + struct.pack("<ii", 9000, 9000) + data[26:]
    else:
        at = data.index(struct.pack("<HHI", 256, 4, 1)) + 8
        data = data[:at] + struct.pack("<I", 9000) + data[at + 4 :]
        at = data.index(struct.pack("<HHI", 257, 4, 1)) + 8
        data = data[:at] + struct.pack("<I", 9000) + data[at + 4 :]
    path.write_bytes(data)
    with pytest.raises(HYWUError, match="9000 x 9000 pixels, which its .* bytes can't hold"):
        load_image(path)
    Image.new("L", (9000, 9000)).save(path, "PNG")
    assert load_image(path).size == (9000, 9000)


def test_gray_times_alpha():
    """Pillow reads it since 13.0."""
    file = io.BytesIO(tiff(np.dstack([GRAY // 2, np.full_like(GRAY, 128)]).tobytes(), 8, alpha=1))
    if (b"II", 1, (1,), 1, (8, 8), (1,)) not in TiffImagePlugin.OPEN_INFO:
        with pytest.raises(HYWUError, match="can't be read as an image"):
            load_image(file)
        return
    assert abs(np.asarray(load_image(file)).astype(int) - (SHOWN_GRAY // 2 + 127)).max() <= 2


@pytest.mark.parametrize(("bits", "dtype"), [(8, "i1"), (16, "<i2"), (16, ">i2")])
def test_signed_values_are_an_error(bits, dtype):
    order = ">" if ">" in dtype else "<"
    with pytest.raises(HYWUError, match=f"its {bits}-bit values are signed"):
        load_image(io.BytesIO(tiff((GRAY // 2).astype(dtype).tobytes(), bits, order, samples=2)))


def test_a_file_never_starts_another_program(tmp_path, monkeypatch):
    """PostScript under an image's name: Pillow would have Ghostscript run it, for ever if it likes."""
    for name in ("gs", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho > {tmp_path}/started\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    file = tmp_path / "loop.png"
    file.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n")
    with pytest.raises(HYWUError, match=r"loop\.png: can't be read as an image"):
        load_image(file)
    assert not (tmp_path / "started").exists()
    assert image_format(file) is None
