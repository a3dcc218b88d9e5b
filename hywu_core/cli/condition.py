"""Images and instructions in, condition out: with a vision and a text encoder from local folders.

It is for generators that were trained in ComfyUI on a CLIP_VISION and a CLIP, and for those of `hywu train`,
which read the bundled editor itself and need no folders; `hywu generate` makes the LoRA of it. The folders
hold models in the form of transformers: config.json, safetensors, and for the text its tokenizer. CLIP,
SigLIP and DINOv2 see; CLIP, T5 and UMT5 read. Nothing is downloaded. A generator that was
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

import torch

from ..bases.bundled.checkpoint import bundled, check_made_for, editor_identity, load_editor
from ..condition import Condition
from ..devices import chosen_device
from ..encoders import base as several
from ..encoders.bundled import TYPE as EDITOR
from ..encoders.bundled import EditorEncoder
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
        "--editor",
        help="file, where the generator reads an editor's hidden states (default: the bundled editor)",
    )
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
    rows = [[read_image(path, max_side=sys.maxsize) for path in paths] for paths in args.image]
    if config.encoder.get("type") == EDITOR:
        condition = _of_editor(args, config.encoder.get("editor"), rows, texts, device)
    elif config.encoder.get("type") == TYPE:
        encoder = TransformersEncoder(
            config.condition, args.vision_model, args.text_model, device, args.text_padding
        )
        condition = encoder(rows[0], texts, *rows[1:])
    else:
        raise HYWUError(
            f"{args.checkpoint}: its conditions come from the encoder '{config.encoder.get('type')}', which is "
            "neither a vision and a text model nor the bundled editor; make them with what it was trained with."
        )
    if not bool(condition.is_finite()):
        raise HYWUError("The condition has NaN or infinite values; look at the models for them.")
    for warning in several.number_warnings(several.Reads.of(config), len(rows)):
        logger.warning(warning)
    path = condition.save(out, args.overwrite)
    parts = ", ".join(f"{n} {t.shape[1]} x {t.shape[2]}" for n, t in condition.parts.items())
    say(f"{path}: batch {condition.batch_size}; tokens x width: {parts}")
    return 0


def _of_editor(
    args: argparse.Namespace, wanted: str | None, rows: list, texts: list[str], device: torch.device
) -> Condition:
    """By the bundled editor, or that of --editor. Raises HYWUError where the generator reads another one's."""
    if args.vision_model or args.text_model:
        raise HYWUError(
            f"{args.checkpoint}: reads the bundled editor's hidden states; leave --vision-model and --text-model out."
        )
    editor = load_editor(args.editor or bundled("editor"), device)
    encoder = EditorEncoder(editor, editor_identity(editor))
    check_made_for(wanted, encoder.identity["editor"])
    sizes = {tuple(image.shape[1:]) for image in rows[0]}
    if len(sizes) > 1:
        raise HYWUError(
            f"The images have {len(sizes)} sizes; the editor reads a batch of one size, so make a condition for each."
        )
    images, *further = [torch.stack(list(images)).to(device).float() / 255 for images in rows]
    return encoder(images, texts, *further)
