"""A tiny bundled editor with random weights, away from the identity, so that every part matters."""

from __future__ import annotations

import torch

from hywu_core.bases.bundled.model import Block, Editor, EditorConfig

TINY = EditorConfig(
    widths=(4, 6, 8), encode=(0, 1, 0), decode=(1, 1, 2), steer=8, text_width=16, text_heads=2,
    text_depth=1, buckets=256, max_pixels=40 * 40,
)  # fmt: skip


def random_editor(config: EditorConfig = TINY, seed: int = 0) -> Editor:
    """With a correction that is not zero and steering that matters."""
    torch.manual_seed(seed)
    editor = Editor(config)
    editor.reset_parameters()
    with torch.no_grad():
        for block in (m for m in editor.modules() if isinstance(m, Block)):
            block.film.weight.normal_(std=0.5)
        editor.scales[0].leave.weight.normal_(std=0.3)
    return editor.requires_grad_(False).eval()
