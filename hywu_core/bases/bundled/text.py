"""The bundled editor's text encoder: words as sums of their pieces' embeddings, a small transformer."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import EditorConfig
from .layers import MLP, Attention, norm

#: Most pieces of one word that are looked at.
PIECES = 48


class TextBlock(nn.Module):
    def __init__(self, width: int, heads: int, operations: Any) -> None:
        super().__init__()
        self.attn = Attention(width, heads, operations)
        self.mlp = MLP(width, operations)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(norm(x), None, mask)
        return x + self.mlp(norm(x))


class TextEncoder(nn.Module):
    """Words of the instruction -> tokens, each the sum of its byte n-grams' embeddings over the root of
    their number (after fastText, Bojanowski et al. 2017): words never seen share pieces with their
    relatives ("blurrier", "blur").

    Position 0 is a start token, so that "" has one token.
    """

    def __init__(self, config: EditorConfig, operations: Any) -> None:
        super().__init__()
        self.embed = operations.Embedding(config.buckets, config.width)
        self.position = nn.Parameter(torch.randn(config.text_words + 1, config.width) * 0.02)
        self.layers = nn.ModuleList(
            TextBlock(config.width, config.heads, operations) for _ in range(config.text_depth)
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 ``[B, T, G]`` of the words' pieces, 0 for none; mask bool ``[B, T]`` -> ``[B, T, C]``."""
        x = self.words(ids)
        x = x + self.position[: ids.shape[1]].to(x)
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return norm(x)

    def words(self, ids: Tensor) -> Tensor:
        """Each word by itself, ``[B, T, C]``: what the layers start from, but for the positions."""
        there = (ids > 0).unsqueeze(-1)
        pieces = self.embed(ids)
        # divided by the root of their number: pieces are nearly orthogonal
        return (pieces * there).sum(2) * there.sum(2).clamp_min(1).to(pieces) ** -0.5


def split_words(text: str) -> list[str]:
    """Lower-case words and single signs, in order."""
    return re.findall(r"[^\W_]+|[^\w\s]|_", text.lower())


def word_pieces(word: str, buckets: int) -> list[int]:
    """Hashes in 2..buckets - 1 of a word and its n-grams of 2 to 4 UTF-8 bytes, ends marked."""
    data = b"<" + word.encode("utf-8", "replace") + b">"
    grams = {data} | {data[i : i + n] for n in (2, 3, 4) for i in range(len(data) - n + 1)}
    return sorted({2 + zlib.crc32(gram) % (buckets - 2) for gram in grams})[:PIECES]


def word_ids(
    instructions: Sequence[str], config: EditorConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The words' pieces, int64 ``[B, T, G]``, 0 for none, and mask bool ``[B, T]``."""
    rows = [
        [[1], *(word_pieces(word, config.buckets) for word in split_words(text))]
        for text in instructions
    ]
    rows = [row[: config.text_words + 1] for row in rows]
    longest = max(map(len, rows))
    most = max(len(pieces) for row in rows for pieces in row)
    ids = torch.zeros(len(rows), longest, most, dtype=torch.int64)
    for row, words in zip(ids, rows, strict=True):
        for place, pieces in zip(row, words, strict=False):
            place[: len(pieces)] = torch.tensor(pieces)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(longest) < lengths[:, None]
    return ids.to(device), mask.to(device)
