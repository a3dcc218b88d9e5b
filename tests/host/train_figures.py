"""Run inside ComfyUI's tree by test_train.py: training through a Wan and an SD3 MODEL, figures as JSON.

Arguments: ComfyUI's tree, this extension's folder, a folder to write to, and which figures: "wan",
"size" and a generator's, "conflict" with a seed and names of `ARMS`, "references", or "files" with the width
of the text's tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import inside_comfyui as inside

import architectures  # isort: skip
import comfy.model_management as mm
import comfy.taesd.taesd
import folder_paths
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from safetensors.torch import save_file
from torch import Tensor

import nodes as stock

FOLDER, WHICH = Path(inside.ARGUMENTS[0]), inside.ARGUMENTS[1]
folder_paths.set_input_directory(str(FOLDER / "input"))
folder_paths.set_output_directory(str(FOLDER / "output"))
folder_paths.models_dir = str(FOLDER / "models")
folder_paths.add_model_folder_path("diffusion_models", str(FOLDER / "models"), is_default=True)
NODES = inside.load_nodes()

import training_models as tools  # noqa: E402
from hywu_nodes.hywu_core.condition import Condition  # noqa: E402
from hywu_nodes.hywu_core.experiments.conflict.plan import GeneratorSize  # noqa: E402
from hywu_nodes.hywu_core.generator.checkpoints import load_generator  # noqa: E402
from hywu_nodes.hywu_core.generator.config import SIZES, GeneratorConfig  # noqa: E402
from hywu_nodes.hywu_core.generator.model import ParameterGenerator  # noqa: E402
from hywu_nodes.hywu_core.layout import LoRALayout  # noqa: E402
from hywu_nodes.hywu_core.training.base import Batch, frozen_digest  # noqa: E402
from hywu_nodes.hywu_core.training.logs import read_log  # noqa: E402
from hywu_nodes.hywu_core.training.schedule import TrainConfig  # noqa: E402
from hywu_nodes.hywu_core.training.strategies import StaticLoRA  # noqa: E402
from hywu_nodes.hywu_core.training.trainer import Trainer  # noqa: E402
from hywu_nodes.nodes.host.cache import TensorCache  # noqa: E402
from hywu_nodes.nodes.host.train import files  # noqa: E402
from hywu_nodes.nodes.host.train.base import HostBase  # noqa: E402
from hywu_nodes.nodes.host.train.conditions import CachedEncoder  # noqa: E402
from hywu_nodes.nodes.host.train.data import FixedCrops  # noqa: E402
from hywu_nodes.nodes.host.train.memory import (  # noqa: E402
    HeldNetwork,
    autograd_through_host,
    plain_patcher,
    recomputed,
)  # fmt: skip

WIDGETS: dict[str, Any] = {
    "name": "wan", "pairs": "colour", "generator_size": "XS", "rank": 2, "steps": 4, "batch_size": 4,
    "accumulation": 1, "learning_rate": 1e-3, "image_size": tools.SIZE, "crops": 1,
    "source_input": "both", "precision": "auto", "checkpointing": False, "sample_every": 0,
    "sample_steps": 2, "seed": 0, "include": "", "exclude": "",
}  # fmt: skip


def train(model: Any, vae: Any, clip: Any, **widgets: Any) -> tuple:
    return NODES["HYWUTrainGenerator"]().train(model, vae, clip, **{**WIDGETS, **widgets})["result"]


def checkpoint(name: str) -> Path:
    return FOLDER / "models" / "hywu" / f"{name}.safetensors"


def make_base(
    model: Any, vae: Any, clip: Any, kind: type[HostBase] = HostBase, reads: str = "encoders"
) -> HostBase:
    cache = TensorCache(FOLDER / "cache")
    patcher = plain_patcher(model)
    encoder = CachedEncoder(patcher, clip, None, cache, reads, vae, tools.SIZE)
    base = kind(patcher, vae, encoder, cache, "none", 2)
    base.load()
    return base


# -- one training, looked at from all sides --------------------------------------------------------


def wan() -> dict[str, Any]:
    tools.make_pairs(FOLDER / "input" / "colour")
    with torch.inference_mode():  # as ComfyUI runs its nodes
        model, vae, clip = tools.load_model("Wan 2.1"), tools.wan_vae(), tools.ToyCLIP(4096)
        before = frozen_digest(model.model)
        generator, report, plot, samples = train(model, vae, clip)
        found = {
            "report": json.loads(report),
            "base_same": frozen_digest(model.model) == before,
            "plot": list(plot.shape),
            "samples": list(samples.shape),
            **reloaded(model, clip, generator),
        }
        first = checkpoint("wan").read_bytes()
        train(model, vae, clip, name="again")
        found["again_same"] = tensors_equal(checkpoint("again"), checkpoint("wan"))
        found |= interrupted(model, vae, clip)
        train(model, vae, clip)  # done already: nothing is trained, the file is written again
        found["finished_same"] = len(checkpoint("wan").read_bytes()) == len(first)
        found |= refusals(model, vae, clip)
        found |= other_ways(vae, clip)
    found |= predictions(model, vae, clip)
    found |= recomputed_gap(model, vae, clip)
    return found


def tensors_equal(one: Path, two: Path) -> bool:
    a, b = (load_generator(path).state_dict() for path in (one, two))
    return all(torch.equal(a[key], b[key]) for key in a)


def reloaded(model: Any, clip: Any, generator: Any) -> dict[str, Any]:
    """The node's generator and the one that Load Generator loads write the same LoRA, which fits."""
    loaded = NODES["HYWULoadGenerator"]().load("wan.safetensors", "auto")[0]
    image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    loras = []
    for made in (generator, loaded):
        encode = NODES["HYWUConditionEncode"]()
        condition = encode.encode(made, image, "make it warm", clip=clip)["result"][0]
        loras.append(NODES["HYWUGenerateLoRA"]().generate(made, condition)["result"][0])
    sample = architectures.sampler("Wan 2.1", stock.common_ksampler)
    plain = sample(model)
    applied = NODES["HYWUApplyLoRA"]().apply(model, loras[0], 1.0, "unmerged")["result"]
    return {
        "reload_same": all(torch.equal(loras[0][p].B, loras[1][p].B) for p in loras[0]),
        "matched": json.loads(
            NODES["HYWUApplyLoRA"]().apply(model, loras[0], 1.0, "merge")["ui"]["text"][0]
        ),
        "effect": float((sample(applied[0]) - plain).abs().max()),
        "plain_same": torch.equal(sample(model), plain),
    }


def interrupted_at(step: int, action: Callable[[], Any]) -> str:
    """How a training ended that was stopped after a step, by the flag that the stop button sets."""
    calls = {"left": step}
    ask = mm.processing_interrupted

    def stop() -> bool:
        calls["left"] -= 1
        return calls["left"] == 0

    mm.processing_interrupted = stop
    try:
        action()
        return "went on"
    except mm.InterruptProcessingException:
        return "interrupted"
    finally:
        mm.processing_interrupted = ask


def interrupted(model: Any, vae: Any, clip: Any) -> dict[str, Any]:
    """Stopped after a step, and run again."""
    how = interrupted_at(2, lambda: train(model, vae, clip, name="stopped"))
    log = (files.run_folder("stopped") / "log.csv").read_text().splitlines()
    kept = (files.run_folder("stopped") / "state.safetensors").is_file()
    written = checkpoint("stopped").exists()
    train(model, vae, clip, name="stopped")
    return {
        "interrupted": how,
        "steps_before": len(log) - 1,
        "state_kept": kept,
        "written_early": written,
        "resumed_same": tensors_equal(checkpoint("stopped"), checkpoint("wan")),
    }


def refusals(model: Any, vae: Any, clip: Any) -> dict[str, str]:
    """Errors in one sentence, and nothing of the user's touched."""
    outside = FOLDER / "input" / "outside"
    outside.mkdir()
    row = {"source": "../../secret.png", "target": "../../secret.png", "instruction": "x"}
    (outside / "pairs.jsonl").write_text(json.dumps(row))
    foreign = checkpoint("foreign")
    foreign.write_bytes(checkpoint("wan").read_bytes())
    cases = {
        "outside": {"pairs": "outside"},
        "above": {"pairs": "../output"},
        "empty": {"pairs": ""},
        "name": {"name": "../x"},
        "bundled": {"name": "bundled"},
        "foreign": {"name": "foreign"},
        "other": {"rank": 4},
        "steps": {"steps": 3},
        "split": {"name": "split", "accumulation": 3},
    }
    found = {
        key: inside.error(lambda case=case: train(model, vae, clip, **case))
        for key, case in cases.items()
    }
    found["vae"] = inside.error(
        lambda: train(model, stock.VAELoader().load_vae("pixel_space")[0], clip, name="vae")
    )
    found |= short_of_memory(model, vae, clip)
    return {f"error_{key}": text for key, text in found.items()}


def other_ways(vae: Any, clip: Any) -> dict[str, Any]:
    """An fp8 base, bfloat16 with recomputed layers, and a generator that sees the picture."""
    seeing = tools.clip_vision(FOLDER)
    fp8 = stock.UNETLoader().load_unet("Wan 2.1.safetensors", "fp8_e4m3fn")[0]
    before = frozen_digest(fp8.model)
    result = train(
        fp8, vae, clip, name="fp8", clip_vision=seeing, precision="bfloat16", checkpointing=True
    )
    report = json.loads(result[1])
    kinds = {str(value.dtype) for value in fp8.model.diffusion_model.parameters()}
    return {
        "fp8_weights": "torch.float8_e4m3fn" in kinds,
        "fp8_base_same": frozen_digest(fp8.model) == before,
        "fp8_losses": [report["loss_first_tenth"], report["loss_last_tenth"]],
        "fp8_precision": report["precision"],
        "seeing_parts": dict(result[0].config.condition),
        "seeing_note": report.get("note"),
    }


def short_of_memory(model: Any, vae: Any, clip: Any) -> dict[str, str]:
    """On a machine said to have less than the weights need, and on one with less than a step needs."""
    found, weights = {}, 16 * 3_737_216
    for case, (function, size) in {
        "memory": ("get_total_memory", weights),
        "step": ("get_free_memory", weights + (4 << 20)),
    }.items():
        whole = getattr(mm, function)

        def said(device: Any = None, both: bool = False, size: int = size, **_: Any) -> Any:
            return (size, size) if both else size

        setattr(mm, function, said)
        try:
            found[case] = inside.error(lambda case=case: train(model, vae, clip, name=case))
        finally:
            setattr(mm, function, whole)
    return found


def predictions(model: Any, vae: Any, clip: Any) -> dict[str, float]:
    """The loss against the error of the network's own output, written out for each kind of sampling."""
    found = {}
    for kind in ("flow", "eps", "v_prediction"):
        with torch.inference_mode():
            patched = (
                model if kind == "flow" else ModelSamplingDiscrete().patch(model, kind, False)[0]
            )
        with autograd_through_host(), torch.no_grad():
            base = make_base(patched, vae, clip)
            batch = FixedCrops(files.training_pairs("colour")[0], 4, tools.SIZE, 1, 0)(0)
            draws = base.draw(batch, 0)
            seen = []
            handle = base.module.register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(out)
            )
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
            found[f"loss_{kind}"] = float(((loss - own) / own).abs().max())
            base.patcher.detach()
    return found


def recomputed_gap(model: Any, vae: Any, clip: Any) -> dict[str, float]:
    """Largest difference of a gradient with recomputed layers from the one without, relative.

    Also how often a layer ran, and the least of the largest gradients of a parameter.
    """
    with autograd_through_host():
        base = make_base(model, vae, clip)
        strategy = make_generator(base, LoRALayout.of(base.module, 2))
        torch.nn.init.normal_(strategy.trained.model.proj_out_B.weight, std=0.05)
        batch = FixedCrops(files.training_pairs("colour")[0], 4, tools.SIZE, 1, 0)(0)
        draws, gradients, runs = base.draw(batch, 0), [], []
        layer = base.module.blocks[0].self_attn
        layer.register_forward_pre_hook(lambda *_: runs[-1].append(1))
        for again in (False, True):
            strategy.trained.zero_grad()
            strategy.trained.checkpointing = again
            runs.append([])
            layout = strategy.trained.config.layout
            with recomputed(base.module, layout) if again else contextlib.nullcontext():
                backward(strategy, batch, draws)
            gradients.append([p.grad.clone() for p in strategy.trained.parameters()])
        pairs = list(zip(*gradients, strict=True))
        sizes = [float(x.abs().max()) for x, _ in pairs]
        gaps = [float((x - y).abs().max()) for x, y in pairs]
        return {
            "recomputed": max(gap / max(size, 1e-9) for gap, size in zip(gaps, sizes, strict=True)),
            "recomputed_runs": [len(r) for r in runs],
            "recomputed_gradient": max(sizes),
        }


def backward(strategy: HeldNetwork, batch: Batch, draws: dict) -> None:
    with strategy.adapted(batch) as module:
        loss = strategy.base.loss(module, batch, draws).mean()
    loss.backward()
    strategy.release()


def make_generator(base: HostBase, layout: LoRALayout, seed: int = 1) -> HeldNetwork:
    usual = GeneratorSize()
    config = GeneratorConfig(
        layout, dict(base.condition_parts), 192, layout.rank, 128, 64, 1,
        lora_a_scale=usual.lora_a_scale, lora_b_scale=usual.lora_b_scale,
        encoder=dict(base.encoder), base=base.name,
    )  # fmt: skip
    torch.manual_seed(seed)
    return HeldNetwork(base, config, checkpointing=False)


# -- pairs with references ---------------------------------------------------------------------------


def references() -> dict[str, Any]:
    """A generator that sees three pictures by a CLIP_VISION, gone on with, then used; and refusals."""
    folder = FOLDER / "input" / "colour"
    rows = [json.loads(row) for row in tools.make_pairs(folder, references=2).open()]
    seeing, clip = tools.clip_vision(FOLDER), tools.ToyCLIP(4096)
    with torch.inference_mode():
        model, vae = tools.load_model("Wan 2.1"), tools.wan_vae()
        inputs = {"clip_vision": seeing, "name": "references", "steps": 2}
        generator, report, *_ = train(model, vae, clip, **inputs)
        written = checkpoint("references").read_bytes()
        cached = sorted((files.run_folder("references") / "cache").iterdir())
        stamps = [path.stat().st_mtime_ns for path in cached]
        train(model, vae, clip, **inputs)
        found = {
            "report": json.loads(report),
            "parts": dict(generator.config.condition),
            "images": generator.config.encoder["images"],
            "again_same": len(checkpoint("references").read_bytes()) == len(written),
            "cache_kept": stamps == [path.stat().st_mtime_ns for path in cached],
            "condition": condition_gaps(generator, model, clip, seeing),
        }
        bundled = NODES["HYWULoadBundledEditor"]().load()
        found["bundled"] = inside.error(
            lambda: train(bundled[0], bundled[2], bundled[1], name="bundled_base")
        )
        # another reference alone makes it another list
        first = folder / rows[0]["references"][0]
        first.write_bytes((folder / rows[-1]["references"][0]).read_bytes())
        found["other"] = inside.error(lambda: train(model, vae, clip, **inputs))
        found |= refused_references(
            folder, rows, lambda **more: train(model, vae, clip, **more), seeing
        )
    return found


def condition_gaps(generator: Any, model: Any, clip: Any, seeing: Any) -> dict[str, float]:
    """A crop's condition in the training against Condition Encode's; and with the references changed."""
    crop = FixedCrops(files.training_pairs("colour")[0], 1, tools.SIZE, 1, 0).batch([0])
    cache = TensorCache(files.run_folder("references") / "cache")
    encoder = CachedEncoder(model, clip, seeing, cache, images=3)
    kept = encoder.condition(crop.source, crop.instruction[0], crop.references[0])
    places = [crop.source[0], *crop.references[0]]

    def encoded(*pictures: torch.Tensor) -> torch.Tensor:
        first, *further = [picture.movedim(0, -1)[None] for picture in pictures]
        more = {f"image{i}": picture for i, picture in enumerate(further, 2)}
        done = NODES["HYWUConditionEncode"]().encode(
            generator, first, crop.instruction[0], clip=clip, clip_vision=seeing, **more
        )
        said = json.loads(done["ui"]["text"][0])
        assert bool(said["warnings"]) == (len(pictures) != 3), said
        return done["result"][0].parts["vision"]

    def gap(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((one - two).abs().max())

    return {
        "shapes": [list(picture.shape) for picture in places],
        "same": gap(kept.parts["vision"], encoded(*places)),
        "swapped": gap(kept.parts["vision"], encoded(places[0], places[2], places[1])),
        "first": gap(kept.parts["vision"][:, :5], encoded(places[0])),
    }


def refused_references(folder: Path, rows: list[dict], attempt: Any, seeing: Any) -> dict[str, str]:
    found = {"text only": inside.error(lambda: attempt(name="blind"))}
    lists = {
        "uneven": [rows[0], {**rows[1], "references": rows[1]["references"][:1]}],
        "outside": [rows[0], {**rows[1], "references": ["0.png", "../../secret.png"]}],
    }
    for name, changed in lists.items():
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, changed)))
        found[name] = inside.error(lambda name=name: attempt(name=name, clip_vision=seeing))
    return found


# -- every size of generator -----------------------------------------------------------------------------


#: Real models in their full width and depth, without storage.
FULL = {
    "Wan 2.1 14B": ("Wan 2.1", {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}),
    "Flux": ("Flux", {"depth": 19, "depth_single_blocks": 38}),
    "SDXL": ("SDXL", {}),
}


def counts(tiny: Any) -> dict[str, dict[str, int]]:
    """Model -> size -> weights of its generator of rank 4 that reads a text encoder's 4096 channels."""
    networks = {"tiny": tiny.model.diffusion_model}
    for name, (kind, options) in FULL.items():
        known = architectures.ARCHITECTURES[kind]
        wide = dataclasses.replace(known, options={**known.options, **options})
        architectures.ARCHITECTURES[name] = wide
        networks[name] = architectures.build(name)
    found: dict[str, dict[str, int]] = {name: {} for name in networks}
    for name, network in networks.items():
        layout = LoRALayout.of(network, 4)
        for size in SIZES:
            config = GeneratorConfig.of_size(layout, size, {"text": 4096})
            with torch.device("meta"):
                generator = ParameterGenerator(config)
            found[name][size] = sum(p.numel() for p in generator.parameters())
    return found


def resident() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held() -> int:
    """Bytes of all tensors that Python knows of."""
    # some objects of libraries warn or fail when they are asked what they are
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def trained_size(size: str) -> dict[str, Any]:
    """Three steps of a size: stopped after the first, gone on with, loaded, a LoRA generated."""
    tools.make_pairs(FOLDER / "input" / "colour")
    with torch.inference_mode():
        model, vae, clip = tools.load_model("Wan 2.1"), tools.wan_vae(), tools.ToyCLIP(4096)
        widgets, before = {"name": size, "generator_size": size, "steps": 3}, resident()
        held_before = held()
        how = interrupted_at(1, lambda: train(model, vae, clip, **widgets))
        measured = resident() - before
        gc.collect()  # as ComfyUI does between prompts
        left = [held() - held_before]
        report = json.loads(train(model, vae, clip, **widgets)[1])
        left.append(held() - held_before)
        loaded = NODES["HYWULoadGenerator"]().load(f"{size}.safetensors", "auto")[0]
        image = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0))
        encode = NODES["HYWUConditionEncode"]()
        condition = encode.encode(loaded, image, "make it warm", clip=clip)["result"][0]
        lora = NODES["HYWUGenerateLoRA"]().generate(loaded, condition)["result"][0]
        odd_rank = NODES["HYWUModelLayout"]().show(model, 12, size, 64, 1)["result"][1]
    values = torch.cat([lora[path].B.flatten() for path in lora])
    return {
        "interrupted": how,
        "losses": [row["loss"] for row in read_log(files.run_folder(size) / "log.csv")],
        "weights": report["generator_weights"],
        "state_bytes": (files.run_folder(size) / "state.safetensors").stat().st_size,
        "checkpoint_bytes": checkpoint(size).stat().st_size,
        "estimate": report["memory_estimate_bytes"],
        "measured": measured,
        "left": left,
        "modules": len(lora),
        "largest": float(values.abs().max()),
        "finite": bool(torch.isfinite(values).all()),
        "odd_rank": json.loads(odd_rank)["generator"]["parameters"],
        "counts": counts(model),
    }


# -- two contradictory tasks ---------------------------------------------------------------------------

STEPS, RANK, PICTURES, VALIDATION = 300, 2, 16, 10_000


class OtherPicture(HostBase):
    """Items come in pairs of one picture in both tasks; each gets the condition of the next pair's picture.

    So a condition tells the instruction and nothing about the picture that is to be made.
    """

    def encode(self, source: Tensor, instruction: Sequence[str]) -> Condition:
        return super().encode(source.roll(2, 0), instruction)


#: Name -> the base, and what its generator reads. "own" sees what no static LoRA sees: the picture.
ARMS = {
    "encoders": (HostBase, "encoders"),
    "model": (OtherPicture, "model"),
    "own": (HostBase, "model"),
}


class Balanced:
    """Four pictures a batch, each in both tasks, or in the one named; later steps are never trained on."""

    def __init__(self, crops: FixedCrops, task: str = "", seed: int = 0) -> None:
        self.crops, self.task, self.seed = crops, task, seed

    def __call__(self, step: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.randperm(PICTURES, generator=generator)[:4].tolist()
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


def conflict(seed: str, *arms: str) -> dict[str, Any]:
    """Validation losses of generators, of one LoRA for both tasks and of one LoRA a task.

    All see the same examples, noise, text conditioning and schedule. The shared LoRA gets the best of
    two learning rates, the others one: what favours it.
    """
    tools.make_pairs(FOLDER / "input" / "colour", PICTURES)
    number = int(seed)
    with torch.inference_mode():
        model, vae, clip = tools.load_model("Wan 2.1"), tools.wan_vae(), tools.ToyCLIP(4096)
    with autograd_through_host():
        bases = {arm: make_base(model, vae, clip, *ARMS[arm]) for arm in arms}
        crops = FixedCrops(files.training_pairs("colour")[0], 8, tools.SIZE, 1, 0)
        layout = LoRALayout.of(bases["model"].module, RANK)

        def run(name: str, rate: float, task: str = "", arm: str = "model") -> float:
            torch.manual_seed(1 + number)
            batches, base = Balanced(crops, task, number), bases[arm]
            if name == "hywu":
                strategy = make_generator(base, layout, 1 + number)
                # all of them, before a LoRA lies on the MODEL whose states they are
                whole = crops.batch(range(len(crops)))
                strategy.standardize([base.encode(whole.source, whole.instruction)])
            else:
                strategy = StaticLoRA(base, layout)
            config = TrainConfig(STEPS, len(batches(0)), rate, warmup=20, seed=number)
            folder = FOLDER / "runs" / f"{name}{task}{rate:g}{arm}"
            trainer = Trainer(base, strategy, batches, config, folder, device="cpu")
            trainer.run()
            loss = validation_loss(trainer, batches)
            if name == "hywu":
                strategy.release()
            return loss

        shared = {rate: run("shared", rate) for rate in (3e-2, 6e-2)}
        single = {task: run("single", 3e-2, task) for task in tools.TASKS}
        hywu = {arm: run("hywu", 2e-3, arm=arm) for arm in arms}
    floor = sum(single.values()) / len(single)
    excess = min(shared.values()) - floor
    return {
        "parts": {arm: dict(base.condition_parts) for arm, base in bases.items()},
        "shared": shared, "single": single, "hywu": hywu, "excess_shared": excess,
        "falls_by": {arm: 1 - (loss - floor) / excess for arm, loss in hywu.items()},
    }  # fmt: skip


# -- files for a server ----------------------------------------------------------------------------------


def server_files(width: str) -> dict[str, Any]:
    """A tiny SD3 that reads the bundled CLIP's tokens, and a tiny VAE, in a server's model folders."""
    sd3 = architectures.ARCHITECTURES["SD3"]
    sd3.options["context_embedder_config"]["params"]["in_features"] = int(width)
    weights = architectures.random_weights(architectures.build("SD3"), torch.float32)
    models = FOLDER / "models"
    save_file(
        {f"model.diffusion_model.{key}": value for key, value in weights.items()},
        models / "diffusion_models" / "tiny_sd3.safetensors",
    )
    vae = comfy.taesd.taesd.TAESD(latent_channels=16)
    save_file(architectures.random_weights(vae, torch.float32), models / "vae" / "tiny.safetensors")
    tools.make_pairs(FOLDER / "input" / "colour")
    return {"parameters": sum(value.numel() for value in weights.values())}


ASKED = {
    "wan": wan, "size": trained_size, "conflict": conflict, "references": references,
    "files": server_files,
}  # fmt: skip
inside.show(ASKED[WHICH](*inside.ARGUMENTS[2:]))
