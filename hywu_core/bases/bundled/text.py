"""The bundled editors' text encoder: words as sums of their pieces' embeddings, a small transformer."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Most pieces of one word that are looked at.
PIECES = 48


def split_words(text: str) -> list[str]:
    """Lower-case words and single signs, in order."""
    return re.findall(r"[^\W_]+|[^\w\s]|_", text.lower())


class EncodedTexts(tuple):
    """Instructions, as a tuple of strings, whose words are numbers already.

    ids, mask: what `word_ids` makes of them, on the device where they are read.
    """

    ids: Tensor
    mask: Tensor


@functools.lru_cache(maxsize=1 << 14)
def word_pieces(word: str, buckets: int) -> tuple[int, ...]:
    """Hashes in 2..buckets - 1 of a word and its n-grams of 2 to 4 UTF-8 bytes, ends marked."""
    data = b"<" + word.encode("utf-8", "replace") + b">"
    grams = {data} | {data[i : i + n] for n in (2, 3, 4) for i in range(len(data) - n + 1)}
    return tuple(sorted({2 + zlib.crc32(gram) % (buckets - 2) for gram in grams})[:PIECES])


def word_ids(
    instructions: Sequence[str], config: Any, device: torch.device, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """The words' pieces, int64 ``[B, T, G]``, 0 for none, and mask bool ``[B, T]``.

    config: has buckets and text_words.
    whole: T and G are the largest that there can be, whatever the texts.
    """
    if isinstance(instructions, EncodedTexts):
        return instructions.ids, instructions.mask
    rows = [
        [(1,), *(word_pieces(word, config.buckets) for word in split_words(text))]
        for text in instructions
    ]
    rows = [row[: config.text_words + 1] for row in rows]
    longest = config.text_words + 1 if whole else max(map(len, rows))
    most = PIECES if whole else max(len(pieces) for row in rows for pieces in row)
    ids = np.zeros((len(rows), longest, most), dtype=np.int64)
    for i, words in enumerate(rows):
        for j, pieces in enumerate(words):
            ids[i, j, : len(pieces)] = pieces
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(longest) < lengths[:, None]
    return torch.from_numpy(ids).to(device), mask.to(device)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention ``[B, heads, L, head_dim]``; True in the mask lets a key be seen."""
    if q.requires_grad and q.device.type == "cpu":
        # on so few tokens the CPU's fused backward takes three times as long as plain products
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, operations: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = operations.Linear(width, 3 * width)
        self.proj = operations.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x ``[B, L, C]``; mask bool ``[B, 1, 1, L]`` or None."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, operations: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(width, 4 * width)
        self.fc2 = operations.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TextBlock(nn.Module):
    def __init__(self, width: int, heads: int, operations: Any) -> None:
        super().__init__()
        self.attn = Attention(width, heads, operations)
        self.mlp = MLP(width, operations)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(norm(x), mask)
        return x + self.mlp(norm(x))


class TextEncoder(nn.Module):
    """Words of the instruction -> tokens, each the sum of its byte n-grams' embeddings over the root of
    their number (after fastText, Bojanowski et al. 2017): words never seen share pieces with their
    relatives ("blurrier", "blur").

    Position 0 is a start token, so that "" has one token.
    """

    def __init__(
        self, width: int, heads: int, depth: int, words: int, buckets: int, operations: Any
    ) -> None:
        super().__init__()
        self.embed = operations.Embedding(buckets, width)
        self.position = nn.Parameter(torch.randn(words + 1, width) * 0.02)
        # no ModuleList: numbered lists are where the layers lie that a LoRA adapts
        self.layers = nn.ModuleDict(
            {str(i): TextBlock(width, heads, operations) for i in range(depth)}
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 ``[B, T, G]`` of the words' pieces, 0 for none; mask bool ``[B, T]`` -> ``[B, T, C]``."""
        x = self.words(ids)
        x = x + self.position[: ids.shape[1]].to(x)
        for layer in self.layers.values():
            x = layer(x, mask[:, None, None])
        return norm(x)

    def words(self, ids: Tensor) -> Tensor:
        """Each word by itself, ``[B, T, C]``: what the layers start from, but for the positions."""
        there = (ids > 0).unsqueeze(-1)
        pieces = self.embed(ids)
        # divided by the root of their number: pieces are nearly orthogonal
        return (pieces * there).sum(2) * there.sum(2).clamp_min(1).to(pieces) ** -0.5
