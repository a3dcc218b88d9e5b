"""Running the decoder over sequences: the embedding of what stands in them, and a prefill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import KVCache
from .model import HunyuanImage3, Progress
from .sequence import TokenSequence
from .sources import Source


def embed(
    model: HunyuanImage3, sequences: Sequence[TokenSequence], sources: Sequence[Sequence[Source]],
    stop: Sequence[int],
) -> Tensor:  # fmt: skip
    """Embeddings ``[B, longest, hidden]`` of the tokens [0, stop) of each sequence, padded.

    sources: of each sequence, in order.
    Images to generate are not part of it (see `Denoiser`).
    """
    device = model.device
    ids = torch.zeros(len(sequences), max(stop), dtype=torch.int64)
    for row, (sequence, end) in enumerate(zip(sequences, stop, strict=True)):
        ids[row, :end] = sequence.ids[:end]
    x = model.model.wte(ids.to(device))
    zero = torch.zeros(1, device=device)
    known: dict[int, Tensor] = {}
    for row, (sequence, given) in enumerate(zip(sequences, sources, strict=True)):
        for span, source in zip(sequence.sources, given, strict=True):
            # both branches of an item show the same images
            if id(source) not in known:
                latent = source.latent[None].to(x)
                known[id(source)] = model.patch_embed(latent, model.time_embed(zero, x.dtype))[0]
            x[row, span.timestep] = model.timestep_emb(zero, x.dtype)[0]
            x[row, span.vae.start : span.vae.stop] = known[id(source)]
            x[row, span.vision.start : span.stop] = source.tokens.to(x)
    return x


def places(sequences: Sequence[TokenSequence], start: Sequence[int], stop: Sequence[int]) -> Tensor:
    """Positions int64 ``[B, longest, 2]`` of the tokens [start, stop) of each sequence, padded."""
    longest = max(last - first for first, last in zip(start, stop, strict=True))
    yx = torch.zeros(len(sequences), longest, 2, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        piece = sequence.positions[start[row] : stop[row]]
        yx[row, : len(piece)] = piece
    return yx


@torch.no_grad()
def prefill(
    model: HunyuanImage3,
    sequences: Sequence[TokenSequence],
    sources: Sequence[Sequence[Source]],
    stop: Sequence[int] | None = None,
    cache: KVCache | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Hidden states ``[B, longest, hidden]`` of the tokens [0, stop) of each sequence.

    stop: without it, whole sequences.
    cache: keeps keys and values.
    """
    stop = [len(s) for s in sequences] if stop is None else stop
    x = embed(model, sequences, sources, stop)
    plan = [s.rows(0, end) for s, end in zip(sequences, stop, strict=True)]
    return model.decode(x, places(sequences, [0] * len(stop), stop), plan, cache, progress)
