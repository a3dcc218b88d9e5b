"""Trains a generator for the MODEL of a graph: prepares, checks that it fits, trains, keeps, shows."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from torch import Tensor

from ....hywu_core.condition import Condition
from ....hywu_core.errors import HYWUError, get_logger, out_of_memory
from ....hywu_core.fingerprint import of_file
from ....hywu_core.generator.config import GeneratorConfig
from ....hywu_core.images import load_image
from ....hywu_core.layout import LoRALayout
from ....hywu_core.training.logs import read_log
from ....hywu_core.training.recompute import HeldNetwork
from ....hywu_core.training.schedule import RATES, TrainConfig
from ....hywu_core.training.state import state_header
from ....hywu_core.training.trainer import STATE, Trainer
from ..cache import TensorCache, digest
from ..generators import HostGenerator
from ..layouts import patterns
from . import files
from .base import HostBase
from .conditions import READS, CachedEncoder
from .data import FixedCrops
from .memory import (
    autograd_through_host,
    check_step,
    check_weights,
    plain_patcher,
    recomputed,
)  # fmt: skip
from .plot import grid, loss_plot, side_by_side, to_tensor

log = get_logger(__name__)

#: What a run is begun with: the recipe that made the bundled weights.
OPTIMIZER = "muon"
#: Examples over which the conditions' means and deviations are taken.
STATISTICS = 64
#: Examples that are drawn as samples, and seconds between previews on the node.
SAMPLES, PREVIEW_SECONDS = 4, 5.0
#: A report's note, and a warning.
TEXT_ONLY = "Without clip_vision the generator reads the instruction only."
#: The bundled editor's text is encoded before its blocks, by the CLIP of the graph.
EDITOR_TEXT = "text.*"


@dataclass(frozen=True)
class Request:
    """What the node asks for; every field is one of its widgets."""

    name: str
    pairs: str
    generator_size: str
    rank: int
    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    image_size: int
    crops: int
    source_input: str
    precision: str
    checkpointing: bool
    sample_every: int
    sample_steps: int
    seed: int
    include: str = ""
    exclude: str = ""
    reads: str = READS[0]


@dataclass(frozen=True)
class Trained:
    """What the node gives: the generator, a JSON report, ``[1, H, W, 3]`` of the loss and samples, warnings."""

    generator: HostGenerator
    report: str
    plot: Tensor
    samples: Tensor
    warnings: list[str]


def train(model: Any, vae: Any, clip: Any, clip_vision: Any, request: Request) -> Trained:
    """Train to the end, or go on where an earlier run of this name stopped.

    Interrupted, it keeps a state and raises ComfyUI's exception. Raises HYWUError on pairs, names and
    sizes that can't be used, and when the training doesn't fit the memory.
    """
    with autograd_through_host():
        trained = _Training(model, vae, clip, clip_vision, request).run()
    # the trainer's parts refer to each other in circles, and hold all that was trained until these are found
    gc.collect()
    return trained


class _Training:
    def __init__(self, model: Any, vae: Any, clip: Any, clip_vision: Any, request: Request) -> None:
        self.request, self.started = request, time.perf_counter()
        self.folder = files.run_folder(request.name)
        self.target = files.checkpoint_path(request.name)
        pairs, self.bad = files.training_pairs(request.pairs)
        self.crops = FixedCrops(
            pairs, request.batch_size, request.image_size, request.crops, request.seed
        )
        cache = TensorCache(self.folder / "cache")
        patcher = plain_patcher(model)
        encoder = CachedEncoder(
            patcher, clip, clip_vision, cache, request.reads, vae, request.image_size,
            images=1 + self.crops.references,
        )  # fmt: skip
        self.base = HostBase(
            patcher, vae, encoder, cache, request.source_input, request.sample_steps
        )
        self.device = self.base.device
        self.config = self._generator_config()
        self.layout = self.config.layout
        state = self.folder / STATE
        #: the settings that a run was begun with, empty for a new one
        self.begun = state_header(state).get("config", {}) if state.exists() else {}
        self.optimizer = self.begun.get("optimizer", "adamw") if self.begun else OPTIMIZER
        at_once = self._at_once(request.accumulation)
        check_weights(self.config, self.optimizer, self.device, at_once)
        self.run_id = files.start_run(request.name, self._made_from())
        self.shown: Tensor | None = None

    def _generator_config(self) -> GeneratorConfig:
        request, base = self.request, self.base
        exclude = patterns(request.exclude) or []
        exclude += [EDITOR_TEXT] if base.predicts_clean else []
        layout = LoRALayout.of(
            base.module, request.rank, include=patterns(request.include), exclude=exclude or None
        )
        return GeneratorConfig.of_size(
            layout, request.generator_size, dict(base.condition_parts),
            encoder=dict(base.encoder), base=base.name,
        )  # fmt: skip

    def _made_from(self) -> dict[str, Any]:
        """What a run can't go on without: everything but the schedule, which the state records."""
        rows = [
            [of_file(p.source), of_file(p.target), p.instruction, *map(of_file, p.references)]
            for p in self.crops.pairs
        ]
        return {
            "base model": self.base.name + self.base.weights,
            "VAE": self.base.vae_weights,
            "encoder": [dict(self.base.encoder), self.base.graph_encoder.text_weights],
            "generator": self.config.to_json(),
            "list of pairs": digest(rows),
            "image_size": self.request.image_size,
            "number of crops": self.request.crops,
            "source_input": self.request.source_input,
        }

    def _at_once(self, accumulation: int) -> int:
        return max(1, self.request.batch_size // accumulation)

    # -- the run ---------------------------------------------------------------------------------

    def run(self) -> Trained:
        self._prepare_examples()
        self.base.load()
        accumulation = self._accumulation()
        torch.manual_seed(self.request.seed + 1)
        strategy = HeldNetwork(self.base, self.config, self.request.checkpointing)
        strategy.standardize([self._examples(STATISTICS)])
        strategy.trained.to(self.device)
        recompute = recomputed(self.base.module, self.layout)
        with recompute if self.request.checkpointing else contextlib.nullcontext():
            try:
                at_once = self._at_once(accumulation)
                example = self.crops.batch([0])
                self.memory = check_step(
                    strategy, self.optimizer, example, at_once, self.request.checkpointing
                )
                trainer = self._trainer(strategy, accumulation)
                self._run(trainer)
                edits = trainer.edit(self.sampled.to(self.device))
            finally:
                strategy.release()
        path = trainer.export(self.target, self._provenance())
        self.shown = grid([self.sampled.source, self.sampled.target, edits])
        generator = HostGenerator(path, torch.float32)
        plot = to_tensor(loss_plot(read_log(self.folder / "log.csv"), self.request.steps))
        report = self._report(trainer, generator)
        return Trained(generator, report, plot, self.shown, self._warnings())

    def _prepare_examples(self) -> None:
        """Encode every crop once: latents, conditions and texts, kept on disk."""
        base, encoder = self.base, self.base.graph_encoder
        bar = comfy.utils.ProgressBar(3 * len(self.crops))
        # one model after another: the VAE, the text encoder, what the generator reads
        for make in (
            lambda one: base.latents(torch.cat([one.source, one.target])),
            lambda one: encoder.conditioning(one.instruction[0]),
            lambda one: base.encode(*one.asked),
        ):
            for batch in self.crops.singles():
                mm.throw_exception_if_processing_interrupted()
                make(batch)
                bar.update(1)
        self.sampled = self.crops.samples(SAMPLES)

    def _examples(self, count: int) -> Condition:
        places = [i * len(self.crops) // count for i in range(count)]
        batch = self.crops.batch(list(dict.fromkeys(places)))
        return self.base.encode(*batch.asked)

    def _accumulation(self) -> int:
        """Parts of a batch: as asked, or one per example where the MODEL takes texts one by one."""
        texts = list(dict.fromkeys(pair.instruction for pair in self.crops.pairs))
        like = self.base.latent(self.crops.batch([0]).source).to(self.device)
        if self.base.batchable(texts[:64], like):
            return self.request.accumulation
        log.info("HY-WU: this MODEL takes texts of one length per batch; examples run one by one.")
        return self.request.batch_size

    def _trainer(self, strategy: HeldNetwork, accumulation: int) -> Trainer:
        request, begun = self.request, self.begun
        rate = request.learning_rate or begun.get("lr") or RATES[self.optimizer]["hywu"]
        config = TrainConfig(
            request.steps, request.batch_size, rate, optimizer=self.optimizer,
            # a run that goes on beyond its end keeps the warm-up that it was begun with
            accumulation=accumulation, warmup=begun.get("warmup", min(40, request.steps // 5)),
            precision=self._precision(), seed=request.seed,
        )  # fmt: skip
        self.bar = comfy.utils.ProgressBar(request.steps)
        self.rows: list[dict[str, float]] = []
        self.previewed = 0.0
        return Trainer(
            self.base, strategy, self.crops, config, self.folder, samples=self.sampled,
            save_every=max(50, request.sample_every), sample_every=request.sample_every,
            device="cpu" if self.device.type == "cpu" else None, on_step=self._on_step,
        )  # fmt: skip

    def _precision(self) -> str:
        if self.request.precision != "auto":
            return "no" if self.request.precision == "float32" else "bf16"
        return "bf16" if self.device.type == "cuda" and mm.should_use_bf16(self.device) else "no"

    def _run(self, trainer: Trainer) -> None:
        self.rows = read_log(self.folder / "log.csv") if (self.folder / STATE).exists() else []
        try:
            done = trainer.run()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise HYWUError(
                f"{self.device} ran out of memory in step {trainer.step + 1}; raise accumulation, turn "
                "checkpointing on, or choose a smaller generator_size, rank or image_size. The state "
                f"so far is in {self.folder}."
            ) from error
        except mm.InterruptProcessingException:
            # raised inside the base model, between two steps' updates: the weights are whole
            trainer.save()
            raise
        if not done:
            log.info("HY-WU: stopped after step %d; the same graph goes on there.", trainer.step)
            raise mm.InterruptProcessingException()

    def _on_step(self, step: int, loss: float) -> bool:
        """Progress with the loss and the newest samples; whether the user has interrupted."""
        self.rows.append({"step": step, "loss": loss})
        preview = None
        if time.perf_counter() - self.previewed > PREVIEW_SECONDS:
            self.previewed = time.perf_counter()
            plot = loss_plot(self.rows, self.request.steps)
            preview = ("JPEG", side_by_side(plot, self._newest_samples()), 640)
        self.bar.update_absolute(step, self.request.steps, preview)
        return mm.processing_interrupted()

    def _newest_samples(self) -> Tensor | None:
        found = sorted((self.folder / "samples").glob("step_*.png"))
        if not found:
            return None
        return to_tensor(load_image(found[-1]))

    # -- what is left ----------------------------------------------------------------------------

    def _provenance(self) -> dict[str, Any]:
        phrasings: dict[str, list[str]] = {}
        for pair in self.crops.pairs:
            texts = phrasings.setdefault(pair.task, [])
            if pair.instruction not in texts and len(texts) < 16:
                texts.append(pair.instruction)
        return {"run": self.run_id, "phrasings": phrasings, "request": asdict(self.request)}

    def _report(self, trainer: Trainer, generator: HostGenerator) -> str:
        losses = [row["loss"] for row in read_log(self.folder / "log.csv")]
        share = max(1, len(losses) // 10)
        report = {
            "checkpoint": self.target.name,
            "base": self.base.name,
            "sampling": [kind.__name__ for kind in type(self.base.model.model_sampling).__bases__],
            "pairs": len(self.crops.pairs),
            "skipped_rows": self.bad,
            "examples": len(self.crops),
            "pictures_each": 1 + self.crops.references,
            "steps": trainer.step,
            "batch_size": self.request.batch_size,
            "parts": trainer.config.accumulation,
            "precision": trainer.config.precision,
            "generator_weights": sum(p.numel() for p in generator.patcher.model.parameters()),
            "lora_values": self.layout.num_values,
            "loss_first_tenth": round(fmean(losses[:share]), 6),
            "loss_last_tenth": round(fmean(losses[-share:]), 6),
            "memory_estimate_bytes": self.memory,
            "training_seconds": round(trainer.seconds, 1),
            "seconds": round(time.perf_counter() - self.started, 1),
            "folder": str(Path(files.FOLDER) / self.folder.name),
        }
        if self.reads_text_only:
            report["note"] = TEXT_ONLY
        return json.dumps(report, ensure_ascii=False)

    @property
    def reads_text_only(self) -> bool:
        return set(self.base.condition_parts) == {"text"}

    def _warnings(self) -> list[str]:
        """What of the pairs was left out, and what the generator doesn't see."""
        return [f"Left out: {row}" for row in self.bad] + [TEXT_ONLY] * self.reads_text_only
