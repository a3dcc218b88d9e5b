"""HunyuanImage-3 without its image encoders: embeddings, decoder, heads. Names as the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...grouped import GroupedLinear
from .attention import KVCache, Norm, Rows
from .config import HunyuanConfig
from .embed import FinalLayer, PatchEmbed, TimeEmbedding
from .layers import DecoderLayer, RouterPrecision
from .rope import rotation

#: Called with (layers done, layers) after each; what it raises ends the pass.
Progress = Callable[[int, int], None]


class Decoder(nn.Module):
    """Token embeddings, layers, the last norm. `residency` decides where layers rest between uses."""

    def __init__(self, config: HunyuanConfig, operations: Any, grouped: Any) -> None:
        super().__init__()
        self.wte = operations.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, operations, grouped) for i in range(config.num_layers)
        )
        self.ln_f = Norm(config.hidden_size, config.eps)


class HunyuanImage3(nn.Module):
    """The transformer that reads text and images and predicts text and images.

    operations: where Linear, Embedding, Conv2d and GroupNorm come from.
    grouped: the class of expert banks.
    """

    def __init__(
        self, config: HunyuanConfig, operations: Any = nn, grouped: Any = GroupedLinear
    ) -> None:
        super().__init__()
        self.config = config
        hidden, channels = config.hidden_size, config.vae.latent_channels
        self.model = Decoder(config, operations, grouped)
        self.lm_head = operations.Linear(hidden, config.vocab_size, bias=False)
        self.timestep_emb = TimeEmbedding(hidden, operations)
        self.time_embed = TimeEmbedding(hidden, operations)
        self.time_embed_2 = TimeEmbedding(hidden, operations)
        if config.distilled:
            self.guidance_emb = TimeEmbedding(hidden, operations)
        if config.meanflow:
            self.timestep_r_emb = TimeEmbedding(hidden, operations)
        self.patch_embed = PatchEmbed(channels, config.patch_hidden, hidden, operations)
        self.final_layer = FinalLayer(hidden, config.patch_hidden, channels, operations)
        #: Where keys and values rest between uses, None where the model is.
        self.kv_device: torch.device | None = None
        #: Yields the layers in turn, each ready on the device until the next is asked for.
        self.residency: Callable[[], Iterable[DecoderLayer]] = self.resident

    def resident(self) -> Iterator[DecoderLayer]:
        """The layers where they are."""
        yield from self.model.layers  # type: ignore[misc]

    def set_router_precision(self, precision: RouterPrecision) -> None:
        """How the routers multiply: float32 (exact), or bfloat16 as official runs on a GPU."""
        for layer in self.model.layers:
            layer.mlp.gate.precision = precision

    @property
    def device(self) -> torch.device:
        """Where a pass runs."""
        return self.model.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.wte.weight.dtype

    def decode(
        self,
        x: Tensor,
        yx: Tensor,
        plan: Sequence[Rows],
        cache: KVCache | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Hidden states of the last layer, before the last norm.

        x ``[B, S, hidden]``; yx int ``[B, S, 2]``: positions of the rows;
        plan: what each item's rows are and see.
        cache: keeps keys and values, and holds those of rows before.
        """
        turn = rotation(yx.to(x.device), self.config.head_dim, self.config.rope_theta)
        for i, layer in enumerate(self.residency(), 1):
            x = layer(x, turn, plan, cache)
            if progress is not None:
                progress(i, self.config.num_layers)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, float32, of hidden states before the last norm."""
        return self.lm_head(self.model.ln_f(hidden)).float()
