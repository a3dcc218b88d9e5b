"""Pictures and instructions in, condition out: with a vision and a text encoder from local folders.

It is for generators that were trained in ComfyUI on a CLIP_VISION and a CLIP; `hywu generate` makes the LoRA
of it. The folders hold models in the form of transformers: config.json, safetensors, and for the text its
tokenizer. CLIP, SigLIP and DINOv2 see; CLIP, T5 and UMT5 read. Nothing is downloaded. A generator that was
trained with several images per item gets them by a second and a third --image.

Example:
  hywu condition --checkpoint hat.safetensors --image cat.png --instruction "a red hat" \\
    --vision-model clip-vit-large-patch14 --text-model clip-vit-large-patch14 --out cat.safetensors
  hywu generate --checkpoint hat.safetensors --condition cat.safetensors --out cat-lora
  hywu condition --checkpoint style.safetensors --image cat.png dog.png --image style.png ...
"""

from __future__ import annotations

import argparse
import sys

from ..devices import chosen_device
from ..encoders import base as several
from ..encoders.transformers import TYPE, TransformersEncoder
from ..errors import HYWUError, get_logger
from ..files import with_suffix
from ..generator.checkpoints import open_checkpoint
from ..images import read_image
from .console import say

logger = get_logger(__name__)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, help="the generator, which says what it reads"
    )
    parser.add_argument(
        "--image",
        required=True,
        nargs="+",
        action="append",
        help="images, each an item of the batch; given again: the items' second images, one for each "
        "or one for all, and so on",
    )
    parser.add_argument(
        "--instruction", required=True, nargs="+", help="one for all images, or one for each"
    )
    parser.add_argument("--vision-model", help="folder, where the generator reads the part vision")
    parser.add_argument("--text-model", help="folder, where the generator reads the part text")
    parser.add_argument(
        "--text-padding",
        type=int,
        default=0,
        metavar="TOKENS",
        help="fill a T5's text up to this many tokens that count, as ComfyUI does for SD3 (77) and "
        "Flux (256) (default: 0)",
    )
    parser.add_argument("--out", required=True, help="file to write")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")


def run(args: argparse.Namespace) -> int:
    device, out = chosen_device(args.device), with_suffix(args.out)
    if out.exists() and not args.overwrite:
        raise HYWUError(f"{out}: exists already; choose another name or give --overwrite.")
    texts, count = args.instruction, len(args.image[0])
    for number, paths in enumerate(args.image[1:], 2):
        several.check_number(f"--image number {number}", len(paths), count)
    if len(texts) not in (1, count):
        raise HYWUError(
            f"There are {len(texts)} instructions for {count} image{'' if count == 1 else 's'}; give one "
            "for all images, or one for each."
        )
    texts = texts if len(texts) == count else texts * count
    if not all(text.strip() for text in texts):
        raise HYWUError("An instruction is empty; say in a few words what to change.")
    config = open_checkpoint(args.checkpoint).config
    if config.encoder.get("type") != TYPE:
        raise HYWUError(
            f"{args.checkpoint}: its conditions come from the encoder '{config.encoder.get('type')}', not "
            "from a vision and a text model; `hywu edit` drives the bundled generator."
        )
    rows = [[read_image(path, max_side=sys.maxsize) for path in paths] for paths in args.image]
    encoder = TransformersEncoder(
        config.condition, args.vision_model, args.text_model, device, args.text_padding
    )
    condition = encoder(rows[0], texts, *rows[1:])
    if not bool(condition.is_finite()):
        raise HYWUError("The condition has NaN or infinite values; look at the models for them.")
    for warning in several.number_warnings(several.Reads.of(config), len(rows)):
        logger.warning(warning)
    path = condition.save(out, args.overwrite)
    parts = ", ".join(f"{n} {t.shape[1]} x {t.shape[2]}" for n, t in condition.parts.items())
    say(f"{path}: batch {condition.batch_size}; tokens x width: {parts}")
    return 0
