"""The ways to train through a base model: a generator, one static LoRA, all weights of a copy or of itself.

Each strategy holds the parameters that are trained and says how the base runs with them; the loop,
the loss, the data and the schedule are the same for all.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..condition import Condition
from ..errors import HYWUError, need, one_line, out_of_memory
from ..generator.config import GeneratorConfig
from ..generator.model import ParameterGenerator
from ..injection import inject
from ..layout import LoRALayout
from ..lora import GeneratedLoRA
from .base import BaseModel, Batch, BatchSource, device_of

#: Batches over which the conditions' means and deviations are taken.
STATISTICS = 4


class Strategy(Protocol):
    """name; the module whose trainable parameters are optimized."""

    name: str
    trained: nn.Module

    def adapted(self, batch: Batch) -> contextlib.AbstractContextManager[nn.Module]:
        """The base model as adapted for the items of `batch`, inside a with block.

        A strategy that reads conditions encodes the batch itself.
        """

    def export(self, path: Path, provenance: Mapping[str, Any]) -> Path:
        """Write the weights for use: a generator, a LoRA, or the base's own weights."""

    def read(self, path: Path) -> Mapping[str, Any]:
        """Take in what `export` wrote; returns the provenance in it."""


class HyperNetwork:
    """HY-WU: a generator writes a LoRA for every item; the base itself is never changed."""

    name = "hywu"

    def __init__(self, base: BaseModel, config: GeneratorConfig, checkpointing: bool = False):
        self.base = base
        config.layout.check(base.module)
        generator = ParameterGenerator(config)
        generator.reset_parameters()
        generator.checkpointing = checkpointing
        self.trained: ParameterGenerator = generator
        self._statistics: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def begun_with(cls, base: BaseModel, path: Path, checkpointing: bool = False) -> HyperNetwork:
        """With the weights of a checkpoint, which says its size, rank and what it reads.

        Raises HYWUError when it was made for another base or encoder.
        """
        from ..generator.checkpoints import load_generator

        generator = load_generator(path, dtype=torch.float32).requires_grad_(True).train()
        config, mine = generator.config, dict(base.encoder)
        if config.encoder and dict(config.encoder) != mine:
            raise HYWUError(
                f"{path}: reads what {dict(config.encoder)} makes, the base's encoder is {mine}; begin with a "
                "generator that was trained for this base."
            )
        made = cls(base, config, checkpointing)
        made.trained.load_state_dict(generator.state_dict())
        return made

    @torch.no_grad()
    def standardize(self, conditions: Sequence[Condition]) -> None:
        """Train on standardized conditions: each channel minus its mean over these, by its deviation.

        Hidden states of transformers have a few huge channels that hardly vary and a large part that
        all tokens share (Sun et al. 2024, "Massive activations"); what differs between tasks drowns in
        them. Channels that vary by less than a twentieth of their mean are left out. `export` folds
        all this into the input projection, so that the checkpoint is an ordinary one.
        """
        for name in self.trained.config.condition:
            rows = []
            for condition in conditions:
                tokens, mask = condition.parts[name].float(), condition.masks.get(name)
                rows.append(tokens.flatten(0, 1) if mask is None else tokens[mask])
            mean, std = torch.cat(rows).mean(0), torch.cat(rows).std(0)
            factor = torch.where(std > mean.abs() / 20, 1 / std.clamp_min(1e-4), 0.0)
            self._statistics[name] = (mean, factor)

    def standardize_on(self, batches: BatchSource, first: int) -> None:
        """`standardize` by the conditions of `STATISTICS` batches of a source, from step `first` on."""
        device = device_of(self.base.module)
        examples = [batches(first + i).to(device) for i in range(STATISTICS)]
        self.standardize([self.base.encode(*batch.asked) for batch in examples])

    def generate(self, condition: Condition) -> GeneratedLoRA:
        """The LoRAs of a condition's items."""
        if self._statistics:
            parts = {}
            for name, tokens in condition.parts.items():
                mean, factor = self._statistics[name] = tuple(
                    value.to(tokens.device) for value in self._statistics[name]
                )
                mean, factor = mean.to(tokens), factor.to(tokens)
                parts[name] = (tokens - mean) * factor
            condition = replace(condition, parts=parts)
        return self.trained(condition)

    @torch.no_grad()
    def _folded(self) -> dict[str, Tensor]:
        """The generator's state in float16, with the standardization inside its input projection."""
        state = {name: value.detach().half() for name, value in self.trained.state_dict().items()}
        single = len(self.trained.config.condition) == 1
        for name, (mean, factor) in self._statistics.items():
            prefix = "hidden_in" if single else f"hidden_in.{name}"
            layer = self.trained.get_submodule(prefix)
            weight = layer.weight * factor.to(layer.weight)
            state[f"{prefix}.bias"] = (layer.bias - weight @ mean.to(weight)).half()
            state[f"{prefix}.weight"] = weight.half()
        return state

    def loras(self, batch: Batch) -> GeneratedLoRA:
        """The LoRAs of a batch's items, from what the base's encoder makes of their images and texts."""
        return self.generate(self.base.encode(*batch.asked))

    @contextlib.contextmanager
    def adapted(self, batch: Batch) -> Iterator[nn.Module]:
        with inject(self.base.module, self.loras(batch)) as module:
            yield module

    def export(self, path: Path, provenance: Mapping[str, Any]) -> Path:
        from ..generator.checkpoints import save_generator

        config = self.trained.config
        whole = {**config.provenance, **provenance}
        with torch.device("meta"):  # a large one's weights are in memory often enough
            half = ParameterGenerator(config.with_(provenance=whole))
        half.load_state_dict(self._folded(), assign=True)
        return save_generator(half, path, overwrite=True)

    def read(self, path: Path) -> Mapping[str, Any]:
        from ..generator.checkpoints import load_generator

        read = load_generator(path, dtype=torch.float32)
        self.trained.load_state_dict(read.state_dict())
        self._statistics = {}  # they are in the input projection now
        return read.config.provenance


class StaticLoRA:
    """One LoRA for everything it is trained on, through PEFT on a copy of the base."""

    def __init__(self, base: BaseModel, layout: LoRALayout, name: str = "shared") -> None:
        peft = need("peft", "to train a static LoRA")
        layout.check(base.module)
        self.name, self.layout = name, layout
        self.paths = [target.path for target in layout.targets()]
        config = peft.LoraConfig(
            r=layout.rank,
            lora_alpha=layout.alpha,
            target_modules=self.paths,
            lora_dropout=0.0,
            bias="none",
        )
        self.trained = peft.inject_adapter_in_model(config, copy.deepcopy(base.module))
        wrapped = {n for n, m in self.trained.named_modules() if hasattr(m, "lora_A")}
        if wrapped != set(self.paths):
            # PEFT matches suffixes too; anything beyond the layout would be an unfair advantage
            others = sorted(wrapped ^ set(self.paths))
            raise HYWUError(
                f"PEFT adapts other modules than the layout says: {', '.join(others[:5])}."
            )

    @contextlib.contextmanager
    def adapted(self, batch: Batch) -> Iterator[nn.Module]:
        yield self.trained

    def lora(self, provenance: Mapping[str, Any] | None = None) -> GeneratedLoRA:
        """The trained LoRA as a value with a batch of 1."""
        pairs = {}
        for path in self.paths:
            module = self.trained.get_submodule(path)
            pairs[path] = tuple(
                side["default"].weight.detach().clone().flatten(1)[None]
                for side in (module.lora_A, module.lora_B)
            )
        conv = {t.path for t in self.layout.targets() if t.module.conv}
        layers = {
            t.path: self.layout.stacks[t.stack].layers[t.layer] for t in self.layout.targets()
        }
        return GeneratedLoRA.from_pairs(
            pairs, self.layout.alpha, conv=conv, layers=layers, provenance=provenance or {}
        )

    def export(self, path: Path, provenance: Mapping[str, Any]) -> Path:
        lora = self.lora({**provenance, "strategy": self.name}).to(dtype=torch.float16)
        return Path(lora.save(path, format="native", overwrite=True))

    @torch.no_grad()
    def read(self, path: Path) -> Mapping[str, Any]:
        from ..formats import load_lora

        lora = load_lora(path)
        for target in self.paths:
            module = self.trained.get_submodule(target)
            for side, value in zip((module.lora_A, module.lora_B), lora[target], strict=True):
                side["default"].weight.copy_(value[0].view_as(side["default"].weight))
        return lora.provenance


class FullFineTuning:
    """Every weight is trained: of a copy of the base (SFT), or of the base itself (pretraining).

    of_itself: the base is what is trained; nothing of it stays frozen.
    """

    def __init__(self, base: BaseModel, of_itself: bool = False) -> None:
        self.name = "pretraining" if of_itself else "sft"
        module = base.module if of_itself else copy.deepcopy(base.module)
        self.trained = module.requires_grad_(True)

    @contextlib.contextmanager
    def adapted(self, batch: Batch) -> Iterator[nn.Module]:
        yield self.trained

    def export(self, path: Path, provenance: Mapping[str, Any]) -> Path:
        from ..files import save_tensors

        tensors = {name: value.half() for name, value in self.trained.state_dict().items()}
        header = {"strategy": self.name, "provenance": dict(provenance)}
        return save_tensors(path, tensors, header, overwrite=True)

    def read(self, path: Path) -> Mapping[str, Any]:
        from ..files import read_weights

        tensors, header = read_weights(path)
        self.trained.load_state_dict(tensors)
        return header["provenance"]


def read_export(strategy: Strategy, path: Path) -> Mapping[str, Any]:
    """`Strategy.read`. Raises HYWUError where the file is not what this strategy's `export` writes."""
    from ..files import check_fields

    try:
        about = strategy.read(path)
    except (KeyError, RuntimeError, TypeError) as error:
        if out_of_memory(error):
            raise
        raise HYWUError(
            f"{path}: not the weights of this run ({one_line(error)}); remove it to train the run anew."
        ) from error
    if not isinstance(about, Mapping):
        raise HYWUError(f"{path}: its header says nothing of a training; remove it to train anew.")
    check_fields(about, {"seconds": (int, float)}, str(path), null=False)
    return about


def count_parameters(strategy: Strategy) -> int:
    """Number of trained values."""
    return sum(p.numel() for p in strategy.trained.parameters() if p.requires_grad)


def rank_for(layout: LoRALayout, parameters: int) -> int:
    """The rank at which one LoRA of this layout has about `parameters` values."""
    return max(1, round(parameters / layout.with_rank(1).num_values))
