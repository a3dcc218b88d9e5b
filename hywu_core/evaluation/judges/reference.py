"""The reference judge: computes from pixels, for items whose target is known. No model, no network.

Four measures of the distance d to the target, each between the edited image and the target, in
relation to the same distance of the unchanged source::

    instruction alignment    root mean square error of RGB values in 0..1 (PSNR is its logarithm)
    content consistency      1 - SSIM of luminance (scikit-image, 7x7 window, data range 1)
    structural rationality   root mean square error of the Sobel gradient magnitude of luminance
    image quality            root mean square error of local sharpness: log10 of (1e-4 + variance of
                             the Laplacian) in blocks of 8x8

    share done = 1 - min(1, d(edited, target) / d(source, target))
    score 1..5 = 1 + 4 * share done;  score 0..10 = 10 * share done

So 5 (or 10) is the target itself and 1 (or 0) the unchanged source or anything farther from the
target than it; half the distance is 3 (or 5). Where the source is already at the target in a measure
(distance under 1e-4), staying there is 5 and leaving it is 1. Images of another size are resized
to the target's (Lanczos). The mapping was fixed and committed before any reported result; the sharpness
floor was changed once, after two throw-away samples. A change makes a new version.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...errors import need
from ..benchmarks.wu_eval import DIMENSIONS
from ..options import Kind
from .base import JudgeRequest, Refusal, Reply

#: Under this a distance counts as none.
NEGLIGIBLE = 1e-4

_BLOCK = 8
#: Four times the variance that rounding to 8 bits alone gives: noise nobody sees doesn't count.
_SHARPNESS_FLOOR = 1e-4
_WINDOW = 7
#: Rec. 601 luma.
LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass
class ReferenceJudge:
    """Answers in the form of whatever questionnaire asks. Raises Refusal without a target."""

    name: str = "reference"
    version: str = "pixels-1"
    parallel: int = 2

    def score(self, request: JudgeRequest) -> Reply:
        if request.target is None:
            raise Refusal("the item has no target image, which the reference judge compares with")
        share = shares_done(request.source, request.edited, request.target)
        told = measures(request.edited, request.target)
        return Reply(request.question.answer(share, told), self.name)


def measures(edited: Image.Image, target: Image.Image) -> str:
    """PSNR of RGB and SSIM of luminance to the target: told as the reason, not scored by."""
    e, t = (_array(image, target.size) for image in (edited, target))
    similar = ssim(e @ LUMINANCE, t @ LUMINANCE)
    return f"PSNR {psnr(e, t):.2f} dB, SSIM {similar:.4f} to the target"


def shares_done(source: Image.Image, edited: Image.Image, target: Image.Image) -> dict[str, float]:
    """For each WU-Eval dimension, how much of the way from source to target was gone, 0..1."""
    size = target.size
    images = [_array(image, size) for image in (source, edited, target)]
    s, e, t = (_features(image) for image in images)
    unchanged, changed = _distances(s, t), _distances(e, t)
    return {name: _share(changed[name], unchanged[name]) for name in DIMENSIONS}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of arrays in 0..1; infinite when equal."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of luminance ``[H, W]`` or RGB ``[H, W, 3]`` in 0..1; small ones by fewer pixels."""
    metrics = need("skimage.metrics", "to compute SSIM", install="scikit-image")
    smallest = min(_WINDOW, *a.shape[:2])
    window = smallest - (smallest + 1) % 2
    if window < 3:
        return 1.0 if np.array_equal(a, b) else 1.0 - float(np.sqrt(np.mean((a - b) ** 2)))
    channels = 2 if a.ndim == 3 else None
    return float(
        metrics.structural_similarity(a, b, win_size=window, data_range=1.0, channel_axis=channels)
    )


def _array(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    image = image.convert("RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float64) / 255


def _features(rgb: np.ndarray) -> dict[str, np.ndarray]:
    luminance = rgb @ LUMINANCE
    return {
        "rgb": rgb,
        "luminance": luminance,
        "gradient": _gradient(luminance),
        "sharpness": local_sharpness(luminance),
    }


def _gradient(luminance: np.ndarray) -> np.ndarray:
    p = np.pad(luminance, 1, mode="edge")
    smooth_y = p[:-2] + 2 * p[1:-1] + p[2:]
    smooth_x = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    return np.hypot(smooth_y[:, 2:] - smooth_y[:, :-2], smooth_x[2:] - smooth_x[:-2]) / 8


def local_sharpness(luminance: np.ndarray) -> np.ndarray:
    """log10 of the Laplacian's variance in blocks of 8x8 (the whole image when it is smaller)."""
    p = np.pad(luminance, 1, mode="edge")
    laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * luminance
    height, width = (max(1, n // _BLOCK) for n in laplacian.shape)
    high, wide = (min(_BLOCK, n) for n in laplacian.shape)
    blocks = laplacian[: height * high, : width * wide].reshape(height, high, width, wide)
    return np.log10(_SHARPNESS_FLOOR + blocks.var(axis=(1, 3)))


def _distances(a: dict[str, np.ndarray], target: dict[str, np.ndarray]) -> dict[str, float]:
    def error(name: str) -> float:
        return float(np.sqrt(np.mean((a[name] - target[name]) ** 2)))

    values = (
        error("rgb"),
        1 - ssim(a["luminance"], target["luminance"]),
        error("gradient"),
        error("sharpness"),
    )
    return dict(zip(DIMENSIONS, values, strict=True))


def _share(changed: float, unchanged: float) -> float:
    if unchanged < NEGLIGIBLE:
        return 1.0 if changed < NEGLIGIBLE else 0.0
    return 1.0 - min(1.0, changed / unchanged)


def in_graph(model: str) -> ReferenceJudge:
    """The judge inside a ComfyUI graph: one request at a time; it needs no model."""
    return ReferenceJudge(parallel=1)


KIND = Kind("--judge", "reference", "computes from pixels, for items with a target", ReferenceJudge)
