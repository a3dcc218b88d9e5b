"""Train the bundled editor on the pretraining tasks; run the same command again to go on.

example:
  hywu pretrain --out runs/editor --steps 4000
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..bases.bundled.checkpoint import save_editor
from ..bases.bundled.sampling import edit
from ..bases.bundled.transformer import TransformerConfig as EditorConfig
from ..bases.bundled.transformer import TransformerEditor as Editor
from ..console import say
from ..training.base import Batch
from ..training.logs import Log, save_grid
from ..training.schedule import Average, TrainConfig, chosen_precision, lr_at
from ..training.state import load_state, recorded_precision, save_state
from .images import PACKAGES, ImagePool, split_files
from .phrasings import nonsense
from .tasks import PRETRAINING, make_batch

#: What is not known is left as it is: words without meaning ask for the identity.
UNKNOWN = "unknown"
STATE, WEIGHTS = "state.safetensors", "editor.safetensors"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of state, log and weights")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps (default 4000)")
    parser.add_argument("--batch-size", type=int, default=32, help="crops a step (default 32)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops, tasks and noise")
    parser.add_argument(
        "--precision", choices=("auto", "no", "bf16"), default="auto",
        help="auto: bf16 where the CPU has it in hardware, else no (float32)",
    )  # fmt: skip
    parser.add_argument("--save-every", type=int, default=200, help="steps between states")
    parser.add_argument("--commit", default="", help="commit of the code, kept in the provenance")


def run(args: argparse.Namespace) -> int:
    recorded = recorded_precision(args.out / STATE)
    config = TrainConfig(
        args.steps, args.batch_size, args.lr, warmup=100, weight_decay=0.01, ema=0.998,
        precision=chosen_precision(args.precision, recorded, "cpu"), seed=args.seed,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    editor = Editor(EditorConfig())
    editor.reset_parameters()
    pool, samples = ImagePool(split_files("train")), ImagePool(split_files("held_out"))
    done = pretrain(editor, pool, config, args.out, samples, args.save_every, args.commit)
    if done < config.steps:
        say(f"interrupted after {done} steps; the same command goes on from there")
        return 130
    say(f"{args.out / WEIGHTS}: {config.steps} steps")
    return 0


def pretrain(
    editor: Editor,
    pool: ImagePool,
    config: TrainConfig,
    folder: Path,
    samples: ImagePool | None = None,
    save_every: int = 200,
    commit: str = "",
) -> int:
    """Train `editor` in place; returns the steps done, fewer than asked when interrupted (Ctrl-C).

    Everything random is a function of (seed, step), so that a resumed run sees what an uninterrupted one
    would. Raises HYWUError when `folder` holds a run with other settings.
    """
    parameters = dict(editor.named_parameters())
    average = Average(parameters, config.ema)
    optimizer = torch.optim.AdamW(
        parameters.values(), config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    step = 0
    if (folder / STATE).exists():
        header = load_state(folder / STATE, parameters, average, optimizer)
        config.check_same(header["config"], folder / STATE)
        step = int(header["step"])
    log, started = Log(folder, step), time.perf_counter()

    def save() -> None:
        save_state(
            folder / STATE, step, parameters, average, optimizer, {"config": config.to_json()}
        )
        with average.swapped():
            save_editor(editor, folder / WEIGHTS, provenance(config, step, commit))
            if samples is not None:
                _save_samples(editor, samples, folder / "samples.png")

    bar = tqdm(total=config.steps, initial=step, desc="pretrain", unit="step")
    try:
        while step < config.steps:
            rate = lr_at(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            examples = make_step(pool, config, step, editor.config.train_size)
            loss = editor_loss(editor, *examples, config.precision)
            loss.backward()
            size = nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(step)
            step += 1
            bar.update()
            if step % 10 == 0 or step == config.steps:
                values = (step, loss.item(), rate, size.item(), time.perf_counter() - started)
                log.add(
                    dict(zip(("step", "loss", "lr", "grad_norm", "seconds"), values, strict=True))
                )
                bar.set_postfix(loss=f"{values[1]:.4f}")
            if step % save_every == 0 and step < config.steps:
                save()
    except KeyboardInterrupt:
        # an interruption inside the optimizer's step could leave weights of two steps mixed: the last
        # state on disk is whole, and what came after it is repeated
        return _saved_step(folder, parameters, average, optimizer)
    finally:
        bar.close()
        log.close()
    save()
    return step


def make_step(
    pool: ImagePool, config: TrainConfig, step: int, size: int
) -> tuple[Batch, Tensor, Tensor]:
    """The examples, noise and times of a step: a function of (seed, step) alone."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    names = [*PRETRAINING, UNKNOWN]
    clean = pool.crops(config.batch_size, size, generator)
    picks = torch.randint(len(names), (config.batch_size,), generator=generator).tolist()
    chosen = [names[pick] for pick in picks]
    known = ["identity" if name == UNKNOWN else name for name in chosen]
    batch = make_batch(clean, known, generator, carriers=True)
    texts = [
        nonsense(generator) if name == UNKNOWN else text
        for name, text in zip(chosen, batch.instruction, strict=True)
    ]
    batch = replace(batch, instruction=tuple(texts))
    noise = torch.randn(clean.shape, generator=generator)
    # sampling starts at t = 1, where the error counts whole: half of the draws lie above 0.7
    times = torch.rand(config.batch_size, generator=generator).sqrt().clamp_min(1e-3)
    return batch, noise, times


def editor_loss(
    editor: Editor, batch: Batch, noise: Tensor, times: Tensor, precision: str = "no"
) -> Tensor:
    """Mean squared error of the predicted clean image, in units of -1..1."""
    source, target = batch.source * 2 - 1, batch.target * 2 - 1
    t = times[:, None, None, None]
    with torch.autocast(source.device.type, torch.bfloat16, enabled=precision == "bf16"):
        text, mask = editor.encode_text(batch.instruction)
        clean = editor.predict((1 - t) * target + t * noise, times, source, text, mask)
    return (clean.float() - target).square().mean()


def provenance(config: TrainConfig, step: int, commit: str) -> dict[str, object]:
    """What the weights come from; JSON-safe."""
    return {
        "commit": commit,
        "steps": step,
        "training": config.to_json(),
        "tasks": [*PRETRAINING, UNKNOWN],
        "data": dict(PACKAGES.values()),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }


def _saved_step(folder: Path, parameters, average: Average, optimizer) -> int:
    if not (folder / STATE).exists():
        return 0
    return int(load_state(folder / STATE, parameters, average, optimizer)["step"])


def _save_samples(editor: Editor, pool: ImagePool, path: Path) -> None:
    """Held-out crops: source, target, edit, one row a task."""
    generator = torch.Generator().manual_seed(1)
    names = list(PRETRAINING)
    batch = make_batch(
        pool.crops(len(names), editor.config.train_size, generator), names, generator
    )
    edited = edit(editor, batch.source, batch.instruction, steps=4)
    save_grid([batch.source, batch.target, edited], path)
