"""HY-WU Train Generator on a MODEL that isn't ours: a tiny Wan of random weights, by the stock loader."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import architectures
import comfy.model_management as mm
import pytest
import torch
import training_models
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from hywu_nodes.hywu_core.condition import Condition
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.generator.checkpoints import load_generator
from hywu_nodes.hywu_core.generator.config import SIZES as NAMED
from hywu_nodes.hywu_core.generator.config import GeneratorConfig
from hywu_nodes.hywu_core.generator.model import ParameterGenerator
from hywu_nodes.hywu_core.layout import LoRALayout
from hywu_nodes.hywu_core.training.base import Batch, frozen_digest
from hywu_nodes.hywu_core.training.logs import read_log
from hywu_nodes.hywu_core.training.schedule import TrainConfig
from hywu_nodes.hywu_core.training.strategies import StaticLoRA
from hywu_nodes.hywu_core.training.trainer import Trainer
from hywu_nodes.nodes.host.cache import TensorCache
from hywu_nodes.nodes.host.train import files
from hywu_nodes.nodes.host.train.base import HostBase
from hywu_nodes.nodes.host.train.conditions import CachedEncoder
from hywu_nodes.nodes.host.train.data import FixedCrops
from hywu_nodes.nodes.host.train.memory import (
    HeldNetwork,
    autograd_through_host,
    plain_patcher,
    recomputed,
)
from pairs import SIZE, TASKS, make_pairs
from torch import Tensor

import nodes as stock

WIDGETS: dict[str, Any] = {
    "name": "wan", "pairs": "colour", "generator_size": "XS", "rank": 2, "steps": 4, "batch_size": 4,
    "accumulation": 1, "learning_rate": 1e-3, "image_size": SIZE, "crops": 1, "source_input": "both",
    "precision": "auto", "checkpointing": False, "sample_every": 0, "sample_steps": 2, "seed": 0,
    "include": "", "exclude": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def colour(base) -> Path:
    """The list of the pairs."""
    return make_pairs(base / "input" / "colour")


@pytest.fixture(scope="module")
def loaded(colour):
    """(MODEL, VAE, CLIP), loaded as ComfyUI loads them: in inference mode."""
    with torch.inference_mode():
        wan = training_models.load_model("Wan 2.1")
        return wan, training_models.wan_vae(), training_models.ToyCLIP(4096)


@pytest.fixture(scope="module")
def train(call, loaded):
    """The node's outputs; `on` are the three sockets where they are others."""

    def run(on=None, **widgets):
        with torch.inference_mode():
            return call.HYWUTrainGenerator(*(on or loaded), **{**WIDGETS, **widgets})

    return run


@pytest.fixture(scope="module")
def trained(train, loaded):
    before = frozen_digest(loaded[0].model)
    outputs = train()
    assert frozen_digest(loaded[0].model) == before  # bit by bit
    return outputs


def checkpoint(name: str) -> Path:
    return files.checkpoint_path(name)


def tensors_equal(one: Path, two: Path) -> bool:
    a, b = (load_generator(path).state_dict() for path in (one, two))
    return all(torch.equal(a[key], b[key]) for key in a)


# -- one training, looked at from all sides ----------------------------------------------------------


def test_the_report_says_what_was_trained(trained):
    _, text, plot, samples = trained
    report = json.loads(text)
    assert report["base"].startswith("WanModel-")
    assert "CONST" in report["sampling"]
    assert (report["pairs"], report["examples"], report["steps"]) == (8, 8, 4)
    assert 2e6 < report["generator_weights"] < 4e6
    assert report["memory_estimate_bytes"] > 24 * report["generator_weights"]
    assert "instruction only" in report["note"]
    assert list(plot.shape) == [1, 360, 640, 3]
    # source, target and edit of two instructions' first pairs and two more
    assert list(samples.shape) == [1, 4 * 68, 3 * 68, 3]


@torch.inference_mode()
def test_the_checkpoint_reloads_and_fits(call, loaded, trained):
    """The node's generator and the one that Load Generator loads write the same LoRA."""
    model, _, clip = loaded
    image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    again = call.HYWULoadGenerator("wan.safetensors", "auto")[0]
    one, two = (
        call.HYWUGenerateLoRA(made, call.HYWUConditionEncode(made, image, "make it warm", clip=clip)[0])[0]
        for made in (trained[0], again)
    )  # fmt: skip
    assert all(torch.equal(one[path].B, two[path].B) for path in one)
    report = call.report("HYWUApplyLoRA", model, one, 1.0, "merge")
    assert (report["matched"], report["skipped"]) == (20, 0)
    sample = architectures.sampler("Wan 2.1", stock.common_ksampler)
    plain = sample(model)
    assert (
        float((sample(call.HYWUApplyLoRA(model, one, 1.0, "unmerged")[0]) - plain).abs().max())
        > 1e-4
    )
    assert torch.equal(sample(model), plain)


def test_it_reproduces_and_a_finished_one_is_not_trained_again(train, trained):
    train(name="again")
    assert tensors_equal(checkpoint("again"), checkpoint("wan"))
    first, log = checkpoint("wan").read_bytes(), files.run_folder("wan") / "log.csv"
    rows = log.read_text()
    train()
    assert len(checkpoint("wan").read_bytes()) == len(first)
    assert log.read_text() == rows


def interrupt_at(step: int, action: Callable[[], Any]) -> None:
    """Stopped after a step, by the flag that the stop button sets."""
    left, ask = [step], mm.processing_interrupted

    def stop() -> bool:
        left[0] -= 1
        return left[0] == 0

    mm.processing_interrupted = stop
    try:
        with pytest.raises(mm.InterruptProcessingException):
            action()
    finally:
        mm.processing_interrupted = ask


def test_an_interrupted_training_goes_on_to_the_same_weights(train, trained):
    interrupt_at(2, lambda: train(name="stopped"))
    folder = files.run_folder("stopped")
    assert len(read_log(folder / "log.csv")) == 2
    assert (folder / "state.safetensors").is_file()
    assert not checkpoint("stopped").exists()
    train(name="stopped")
    assert tensors_equal(checkpoint("stopped"), checkpoint("wan"))


def test_more_steps_than_before_go_on_where_it_ended(train, trained):
    train(name="longer")
    train(name="longer", steps=6)
    steps = [row["step"] for row in read_log(files.run_folder("longer") / "log.csv")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not tensors_equal(checkpoint("longer"), checkpoint("wan"))


def test_an_fp8_base_is_trained_through_in_bfloat16_by_a_generator_that_sees(
    train, loaded, tmp_path
):
    """With recomputed layers; with clip_vision the generator sees the image."""
    seeing = training_models.clip_vision(tmp_path)
    with torch.inference_mode():
        fp8 = stock.UNETLoader().load_unet("Wan 2.1.safetensors", "fp8_e4m3fn")[0]
    before = frozen_digest(fp8.model)
    generator, text, *_ = train(
        on=(fp8, *loaded[1:]),
        name="fp8",
        clip_vision=seeing,
        precision="bfloat16",
        checkpointing=True,
    )
    report = json.loads(text)
    kinds = {value.dtype for value in fp8.model.diffusion_model.parameters()}
    assert torch.float8_e4m3fn in kinds
    assert frozen_digest(fp8.model) == before
    assert report["precision"] == "bf16"
    assert all(0 < report[f"loss_{part}_tenth"] < 10 for part in ("first", "last"))
    assert dict(generator.config.condition) == {"vision": 32, "text": 4096}
    assert report.get("note") is None


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("widgets", "words"),
    [
        ({"pairs": "outside"}, "lies outside"),
        ({"pairs": "../output"}, "no such folder or .jsonl file inside"),
        ({"pairs": ""}, "no such folder or .jsonl file inside"),
        ({"name": "../x"}, "name can't be used"),
        ({"name": "bundled"}, "choose another one"),
        ({"name": "foreign"}, "is not of this training"),
        ({"rank": 4}, "was started from another generator"),
        ({"batch_size": 2}, "batch_size 4 -> 2"),
        ({"steps": 3}, "steps 4 -> 3"),
        ({"name": "split", "accumulation": 3}, "can't be split evenly"),
    ],
)
def test_settings_that_cannot_be_used(train, trained, base, widgets, words):
    outside = base / "input" / "outside"
    outside.mkdir(exist_ok=True)
    row = {"source": "../../secret.png", "target": "../../secret.png", "instruction": "x"}
    (outside / "pairs.jsonl").write_text(json.dumps(row))
    checkpoint("foreign").write_bytes(checkpoint("wan").read_bytes())
    with pytest.raises(HYWUError) as caught:
        train(**widgets)
    assert words in str(caught.value)


def test_a_vae_of_another_model(train, loaded):
    pixels = stock.VAELoader().load_vae("pixel_space")[0]
    with pytest.raises(HYWUError, match="connect the model's own VAE"):
        train(on=(loaded[0], pixels, loaded[2]), name="vae")


@pytest.mark.parametrize(
    ("function", "more", "words"),
    [
        ("get_total_memory", 0, "takes at least"),  # less than the weights need
        ("get_free_memory", 4 << 20, "4 examples at once"),  # less than a step needs
    ],
)
def test_a_machine_with_too_little_memory(train, trained, monkeypatch, function, more, words):
    size = 16 * json.loads(trained[1])["generator_weights"] + more
    monkeypatch.setattr(
        mm, function, lambda device=None, both=False, **_: (size, size) if both else size
    )
    with pytest.raises(HYWUError, match=words):
        train(name=function)


# -- what is trained ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_base(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")

    def make(model=None, kind: type[HostBase] = HostBase, reads: str = "encoders") -> HostBase:
        cache = TensorCache(folder / "cache")
        patcher = plain_patcher(model or loaded[0])
        encoder = CachedEncoder(patcher, loaded[2], None, cache, reads, loaded[1], SIZE)
        made = kind(patcher, loaded[1], encoder, cache, "none", 2)
        made.load()
        return made

    return make


def make_generator(base: HostBase, layout: LoRALayout, seed: int = 1) -> HeldNetwork:
    config = GeneratorConfig(
        layout, dict(base.condition_parts), 192, layout.rank, 128, 64, 1, lora_a_scale=0.05,
        lora_b_scale=0.6, encoder=dict(base.encoder), base=base.name,
    )  # fmt: skip
    torch.manual_seed(seed)
    return HeldNetwork(base, config, checkpointing=False)


def four(batch: int = 4) -> Batch:
    return FixedCrops(files.training_pairs("colour")[0], batch, SIZE, 1, 0)(0)


@pytest.mark.parametrize("kind", ["flow", "eps", "v_prediction"])
def test_the_loss_is_that_of_the_models_own_output(loaded, make_base, kind):
    """Against the error of the network's own output, written out for each kind of sampling."""
    model = loaded[0]
    with torch.inference_mode():
        if kind != "flow":
            model = ModelSamplingDiscrete().patch(model, kind, False)[0]
    with autograd_through_host(), torch.no_grad():
        base, batch, seen = make_base(model), four(), []
        draws = base.draw(batch, 0)
        handle = base.module.register_forward_hook(lambda m, a, out: seen.append(out))
        loss = base.loss(base.module, batch, draws)
        handle.remove()
        clean, noise = base.model.process_latent_in(base.latents(batch.target)), draws["noise"]
        sigmas = base.model.model_sampling.sigmas
        sigma = sigmas[(draws["u"] * len(sigmas)).long()].view(-1, 1, 1, 1, 1)
        cosine = (1 + sigma**2) ** -0.5
        wanted = {
            "flow": noise - clean,
            "eps": noise,
            "v_prediction": cosine * noise - sigma * cosine * clean,
        }[kind]
        own = (seen[0] - wanted).square().flatten(1).mean(1)
        base.patcher.detach()
    assert float(((loss - own) / own).abs().max()) < 1e-3


def test_recomputed_layers_give_the_same_gradients(make_base):
    gradients, runs = [], []
    with autograd_through_host():
        base = make_base()
        strategy = make_generator(base, LoRALayout.of(base.module, 2))
        torch.nn.init.normal_(strategy.trained.model.proj_out_B.weight, std=0.05)
        batch, layout = four(), strategy.trained.config.layout
        draws, layer = base.draw(batch, 0), base.module.blocks[0].self_attn
        handle = layer.register_forward_pre_hook(lambda *_: runs[-1].append(1))
        for again in (False, True):
            strategy.trained.zero_grad()
            strategy.trained.checkpointing = again
            runs.append([])
            with recomputed(base.module, layout) if again else contextlib.nullcontext():
                with strategy.adapted(batch) as module:
                    loss = base.loss(module, batch, draws).mean()
                loss.backward()
                strategy.release()
            gradients.append([p.grad.clone() for p in strategy.trained.parameters()])
        handle.remove()
    assert [len(run) for run in runs] == [1, 2]
    assert max(float(x.abs().max()) for x in gradients[0]) > 1e-4
    for one, two in zip(*gradients, strict=True):
        assert float((one - two).abs().max()) < 1e-4 * max(float(one.abs().max()), 1e-9)


# -- pairs with references ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return training_models.clip_vision(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def references(base, train, seeing):
    """A generator that sees three images by a CLIP_VISION: its outputs."""
    make_pairs(base / "input" / "references", references=2)
    return train(pairs="references", clip_vision=seeing, name="references", steps=2)


def test_a_generator_sees_the_references_of_its_pairs(train, references, seeing):
    generator, text, *_ = references
    report = json.loads(text)
    assert dict(generator.config.condition) == {"vision": 32, "text": 4096}
    assert generator.config.encoder["images"] == report["pictures_each"] == 3
    assert report["skipped_rows"] == []
    written = checkpoint("references").read_bytes()
    cached = sorted((files.run_folder("references") / "cache").iterdir())
    stamps = [path.stat().st_mtime_ns for path in cached]
    train(pairs="references", clip_vision=seeing, name="references", steps=2)
    assert len(checkpoint("references").read_bytes()) == len(written)
    assert [path.stat().st_mtime_ns for path in cached] == stamps


def test_condition_encode_gives_what_it_saw(call, loaded, references, seeing):
    """A crop's condition in the training against Condition Encode's; and with the references changed."""
    generator, clip = references[0], loaded[2]
    crop = FixedCrops(files.training_pairs("references")[0], 1, SIZE, 1, 0).batch([0])
    cache = TensorCache(files.run_folder("references") / "cache")
    encoder = CachedEncoder(loaded[0], clip, seeing, cache, images=3)
    kept = encoder.condition(crop.source, crop.instruction[0], crop.references[0]).parts["vision"]
    first, second, third = crop.source[0], *crop.references[0]
    # the crop, and both references with about as many pixels and their own proportions
    shapes = [list(image.shape) for image in (first, second, third)]
    assert shapes == [[3, 64, 64], [3, 91, 45], [3, 78, 52]]

    def encoded(*images: Tensor) -> Tensor:
        source, *further = [image.movedim(0, -1)[None] for image in images]
        more = {f"image{i}": image for i, image in enumerate(further, 2)}
        arguments = (generator, source, crop.instruction[0])
        warned = call.report(
            "HYWUConditionEncode", *arguments, clip=clip, clip_vision=seeing, **more
        )["warnings"]
        assert bool(warned) == (len(images) != 3)
        made = call.HYWUConditionEncode(*arguments, clip=clip, clip_vision=seeing, **more)
        return made[0].parts["vision"]

    def gap(one: Tensor, two: Tensor) -> float:
        return float((one - two).abs().max())

    assert gap(kept, encoded(first, second, third)) < 1e-5
    assert gap(kept, encoded(first, third, second)) > 1e-3
    assert gap(kept[:, :5], encoded(first)) < 1e-5


def refused(words: str, action: Callable[[], Any]) -> None:
    with pytest.raises(HYWUError) as caught:
        action()
    assert words in str(caught.value)


def test_references_that_cannot_be_used_are_refused(call, base, weights, train, seeing):
    folder = base / "input" / "refused_references"
    rows = [json.loads(row) for row in make_pairs(folder, references=2).open()]
    here: dict[str, Any] = {"pairs": "refused_references", "steps": 2}
    words = "which a generator that reads the instruction only doesn't see"
    refused(words, lambda: train(name="blind", **here))
    model, clip, vae = call.HYWULoadBundledEditor()
    words = "The bundled editor reads one image per item, here are 3"
    refused(words, lambda: train(on=(model, vae, clip), name="bundled_base", **here))
    train(name="other_list", clip_vision=seeing, **here)
    # another reference alone makes it another list
    (folder / rows[0]["references"][0]).write_bytes(
        (folder / rows[-1]["references"][0]).read_bytes()
    )
    words = "was started from another list of pairs"
    refused(words, lambda: train(name="other_list", clip_vision=seeing, **here))
    for words, changed in {
        "has 2 references and": rows[1]["references"][:1],
        "'../../secret.png' lies outside": ["0.png", "../../secret.png"],
    }.items():
        lines = [rows[0], {**rows[1], "references": changed}]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
        refused(words, lambda: train(name="changed", clip_vision=seeing, **here))


# -- every size of generator -------------------------------------------------------------------------

#: Size -> weights that a generator of its name may have.
SIZES = {"XS": (2e6, 4.2e6), "S": (16e6, 25e6), "M": (80e6, 120e6), "L": (320e6, 450e6)}
#: Real models in their full width and depth, without storage.
FULL = {
    "Wan 2.1": {},
    "Wan 2.1 14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
    "Flux": {"depth": 19, "depth_single_blocks": 38},
    "SDXL": {},
}


@pytest.mark.parametrize("name", FULL)
def test_a_size_is_what_its_name_says_for_a_tiny_model_and_for_real_ones(monkeypatch, name):
    """Of rank 4, reading a text encoder's 4096 channels."""
    known = architectures.ARCHITECTURES[name.removesuffix(" 14B")]
    wide = dataclasses.replace(known, options={**known.options, **FULL[name]})
    monkeypatch.setitem(architectures.ARCHITECTURES, name, wide)
    layout = LoRALayout.of(architectures.build(name), 4)
    assert NAMED.keys() == SIZES.keys()
    for size, (low, high) in SIZES.items():
        config = GeneratorConfig.of_size(layout, size, {"text": 4096})
        with torch.device("meta"):
            generator = ParameterGenerator(config)
        assert low < sum(p.numel() for p in generator.parameters()) < high


class Memory:
    """Linux's own count of this process's pages, in bytes."""

    @staticmethod
    def read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith(f"{name}:")]
        return int(line.split()[1]) * 1024

    @staticmethod
    def forget_the_most() -> None:
        Path("/proc/self/clear_refs").write_text("5")


def held() -> int:
    """Bytes of all tensors that Python knows of."""
    # some objects of libraries warn or fail when they are asked what they are
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_size_s_is_stopped_gone_on_with_loaded_and_generates(call, train, loaded):
    """Its memory is about what was estimated, and nothing of it stays."""
    widgets = {"name": "size_s", "generator_size": "S", "steps": 3}
    gc.collect()
    before, most = held(), None
    if Path("/proc/self/clear_refs").exists():
        Memory.forget_the_most()
        resident = Memory.read("VmRSS")
    interrupt_at(1, lambda: train(**widgets))
    if Path("/proc/self/clear_refs").exists():
        most = Memory.read("VmHWM") - resident
    gc.collect()  # as ComfyUI does between prompts
    left = [held() - before]
    report = json.loads(train(**widgets)[1])
    for thread in threading.enumerate():
        if thread.name == "hywu-digest":  # of the generator that the node gave
            thread.join()
    left.append(held() - before)
    weights, folder = report["generator_weights"], files.run_folder("size_s")
    assert SIZES["S"][0] < weights < SIZES["S"][1]
    losses = [row["loss"] for row in read_log(folder / "log.csv")]
    assert len(losses) == 3
    assert all(0 < loss < 10 for loss in losses)
    # weights, average and two moments in float32; the checkpoint in float16
    assert 16 * weights < (folder / "state.safetensors").stat().st_size < 16.1 * weights
    assert 2 * weights < checkpoint("size_s").stat().st_size < 2.1 * weights
    # neither of one that was stopped nor of one that ended: a copy of the weights has 4 bytes each
    assert max(left) < weights
    assert report["memory_estimate_bytes"] >= 24 * weights
    assert most is None or 0.6 < most / report["memory_estimate_bytes"] < 1.4
    with torch.inference_mode():
        made = call.HYWULoadGenerator("size_s.safetensors", "auto")[0]
        image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0))
        condition = call.HYWUConditionEncode(made, image, "make it warm", clip=loaded[2])[0]
        lora = call.HYWUGenerateLoRA(made, condition)[0]
    values = torch.cat([lora[path].B.flatten() for path in lora])
    assert len(lora) == 20
    assert torch.isfinite(values).all()
    assert float(values.abs().max()) > 1e-4


def test_model_layout_takes_any_rank(call, loaded):
    """12 doesn't divide the generator's width."""
    report = json.loads(call.HYWUModelLayout(loaded[0], 12, "S", 64, 1)[1])
    assert SIZES["S"][0] < report["generator"]["parameters"] < SIZES["S"][1]


# -- two contradictory tasks -------------------------------------------------------------------------

STEPS, RANK, IMAGES, VALIDATION = 300, 2, 16, 10_000


class OtherImage(HostBase):
    """Items come in pairs of one image in both tasks; each gets the condition of the next pair's image.

    So a condition tells the instruction and nothing about the image that is to be made.
    """

    def encode(
        self, source: Tensor, instruction: Sequence[str], references: Sequence[Any] = ()
    ) -> Condition:
        return super().encode(source.roll(2, 0), instruction, references)


class Balanced:
    """Four images per batch, each in both tasks, or in the one named; later steps are never trained on."""

    def __init__(self, crops: FixedCrops, task: str = "") -> None:
        self.crops, self.task = crops, task

    def __call__(self, step: int) -> Batch:
        chosen = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(step))[:4].tolist()
        batch = self.crops.batch([2 * i + side for i in chosen for side in (0, 1)])
        return batch.select([i for i, task in enumerate(batch.task) if self.task in ("", task)])


def validation_loss(trainer: Trainer, batches: Balanced) -> float:
    """Mean over batches of fresh noise, with the averaged weights."""
    base, losses = trainer.base, []
    with torch.no_grad(), trainer.average.swapped():
        for step in range(VALIDATION, VALIDATION + 8):
            whole = Balanced(batches.crops)(step)
            draws = base.draw(whole, step)
            kept = [i for i, task in enumerate(whole.task) if batches.task in ("", task)]
            batch, draws = whole.select(kept), {k: v[kept] for k, v in draws.items()}
            with trainer.strategy.adapted(batch) as module:
                losses.append(float(base.loss(module, batch, draws).mean()))
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def lora_losses(base, make_base, tmp_path_factory):
    """(crops, train a strategy and give its validation loss, one LoRA for both tasks, one LoRA per task).

    All see the same examples, noise, text conditioning and schedule. The shared LoRA gets the best of
    two learning rates, the others one: what favours it.
    """
    make_pairs(base / "input" / "conflict", IMAGES)
    runs = tmp_path_factory.mktemp("runs")
    with autograd_through_host():
        crops = FixedCrops(files.training_pairs("conflict")[0], 8, SIZE, 1, 0)

        def run(strategy, rate: float, base: HostBase, task: str = "") -> float:
            batches = Balanced(crops, task)
            config = TrainConfig(STEPS, len(batches(0)), rate, warmup=20, seed=0)
            folder = runs / f"{type(strategy).__name__}{task}{rate:g}{len(list(runs.iterdir()))}"
            trainer = Trainer(base, strategy, batches, config, folder, device="cpu")
            trainer.run()
            loss = validation_loss(trainer, batches)
            getattr(strategy, "release", lambda: None)()
            return loss

        own = make_base(reads="model")
        layout = LoRALayout.of(own.module, RANK)

        def static(rate: float, task: str = "") -> float:
            torch.manual_seed(1)
            return run(StaticLoRA(own, layout), rate, own, task)

        shared = min(static(rate) for rate in (3e-2, 6e-2))
        single = sum(static(3e-2, task) for task in TASKS) / len(TASKS)
    return crops, run, shared, single


@pytest.mark.parametrize(
    ("reads", "kind", "part"),
    [("encoders", HostBase, "text"), ("model", OtherImage, "hidden_states")],
)
def test_two_contradictory_tasks(make_base, lora_losses, reads, kind, part):
    """The excess loss of one static LoRA over one per task falls by at least half with a generator.

    It reads a text encoder's tokens, or nothing but the MODEL's own hidden states, of another image
    than the one to be made: the instruction alone must tell the tasks apart.
    """
    crops, run, shared, single = lora_losses
    assert shared - single > 0.005
    with autograd_through_host():
        base = make_base(kind=kind, reads=reads)
        assert list(base.condition_parts) == [part]
        strategy = make_generator(base, LoRALayout.of(base.module, RANK))
        # all of them, before a LoRA lies on the MODEL whose states they are
        whole = crops.batch(range(len(crops)))
        strategy.standardize([base.encode(whole.source, whole.instruction)])
        loss = run(strategy, 2e-3, base)
    assert 1 - (loss - single) / (shared - single) > 0.5
