"""Run inside ComfyUI's tree by test_apply.py: applies LoRAs to a small MODEL, prints figures as JSON.

Arguments: ComfyUI's tree, this extension's folder. The MODEL is a real BaseModel under ModelPatcher,
sampled by ComfyUI's own sampler with both branches of guidance in one batch.
"""

from __future__ import annotations

import json

from inside_comfyui import error, load_nodes, show

# isort: split
import comfy.hooks
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.supported_models_base
import torch

NODES = load_nodes()
from hywu_nodes.hywu_core.lora import GeneratedLoRA  # noqa: E402

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    def __init__(self, device=None, operations=None, dtype=None, **_):
        super().__init__()
        self.dtype = torch.float32
        self.blocks = torch.nn.ModuleList(operations.Linear(4, 4) for _ in range(3))

    def forward(self, x, t, context=None, control=None, transformer_options=None, **_):
        hidden = x.movedim(1, -1)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return hidden.movedim(-1, 1)


class Config(comfy.supported_models_base.BASE):
    unet_config = {"in_channels": 4}
    memory_usage_factor = 0.1


def base() -> comfy.model_patcher.ModelPatcher:
    config = Config({"in_channels": 4})
    config.set_inference_dtype(torch.float32, None)
    flow = comfy.model_base.ModelType.FLOW
    model = comfy.model_base.BaseModel(config, flow, device="cpu", unet_model=Net)
    for parameter in model.parameters():
        parameter.requires_grad_(False).normal_(0, 0.3)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def sample(patcher, batch=3, cfg=3.0, hooks=None):
    """hooks: on the positive conditioning."""
    latent, empty = torch.zeros(batch, 4, 8, 8), [[torch.zeros(1, 1, 4), {}]]
    positive = comfy.hooks.set_hooks_for_conditioning(empty, hooks) if hooks else empty
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample(
        patcher, noise, 4, cfg, "euler", "simple", positive, empty, latent, denoise=1.0, seed=1
    )


def lora_of(paths, width=4) -> GeneratedLoRA:
    pairs = {p: (torch.randn(3, 2, width), torch.randn(3, 4, 2) * 0.3) for p in paths}
    return GeneratedLoRA.from_pairs(pairs, 2.0)


def apply(model, lora, strength=1.0, mode="auto", negative=True, scope=None):
    return NODES["HYWUApplyLoRA"]().apply(model, lora, strength, mode, negative, scope)["result"]


def scope_of(start=0.0, end=1.0, modules=""):
    return NODES["HYWULoRAScope"]().make(start, end, modules)[0]


def hook(model, lora, strength=1.0, before=None):
    return NODES["HYWULoRAHook"]().hook(model, lora, strength, before)["result"][0]


def keyframes(hooks, *frames):
    group = comfy.hooks.HookKeyframeGroup()
    for strength, start in frames:
        group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks = hooks.clone()
    hooks.set_keyframes_on_hooks(group)
    return hooks


def gap(one, two) -> float:
    return float((one - two).abs().max() / two.abs().max())


torch.manual_seed(0)
model = base()
lora = lora_of([f"blocks.{i}" for i in range(3)])
one, plain = lora.select(1), sample(model)
merged = sample(apply(model, one, 0.7, "merge")[0])
unmerged = sample(apply(model, one, 0.7, "unmerged")[0])
batch = sample(apply(model, lora)[0])
singles = [sample(apply(model, lora.select(i))[0])[i] for i in range(3)]
chain = [apply(apply(model, one, 0.5, a)[0], lora.select(0), 0.5, b)[0]
         for a, b in (("merge", "unmerged"), ("unmerged", "merge"))]  # fmt: skip
stock = NODES["HYWUSelectLoRA"]().select(lora, 1)[1]
half = apply(model, lora_of(["blocks.0", "elsewhere.0"]).select(0))

begin, finish = scope_of(end=0.5), scope_of(0.5)
early = sample(apply(model, one, scope=begin)[0])
parts = sample(apply(apply(model, one, scope=begin)[0], one, scope=finish)[0])
last = lora_of(["blocks.2"]).select(0)
only = GeneratedLoRA.from_pairs({"blocks.2": one["blocks.2"]}, 2.0)
masked = scope_of(modules="blocks.* = 0\nblocks.2 = 0.5")
positive = sample(apply(model, one, negative=False)[0])
hooked = sample(model, hooks=hook(model, one))
several = apply(apply(model, one, 0.5, scope=begin)[0], last, 0.3, "merge")[0]
several = comfy.sd.load_lora_for_models(several, None, stock, 0.2, 0)[0]
swapped = comfy.sd.load_lora_for_models(model, None, stock, 0.2, 0)[0]
swapped = apply(apply(swapped, last, 0.3)[0], one, 0.5, scope=begin)[0]
scopes = {
    "early": min(gap(early, plain), gap(early, unmerged)),
    "parts": gap(parts, sample(apply(model, one)[0])),
    "masked": gap(sample(apply(model, one, scope=masked)[0]), sample(apply(model, only, 0.5)[0])),
    "masked_merge": gap(
        sample(apply(model, one, mode="merge", scope=masked)[0]), sample(apply(model, only, 0.5)[0])
    ),
    "several": gap(sample(several), sample(swapped)),
    "hook": gap(hooked, positive),
    "hook_effect": gap(hooked, plain),
    "hook_two": gap(sample(model, hooks=hook(model, one, 0.5, hook(model, one, 0.5))), positive),
    "keyframes": gap(
        sample(model, hooks=keyframes(hook(model, one), (1.0, 0.0), (0.0, 0.6))),
        sample(apply(model, one, negative=False, scope=scope_of(end=0.6))[0]),
    ),
    "siblings": gap(sample(model), plain),
}
show({
    "effect": gap(unmerged, plain),
    "merge": gap(merged, unmerged),
    "items": max(gap(batch[i], singles[i]) for i in range(3)),
    "chain": gap(sample(chain[0]), sample(chain[1])),
    "stock": gap(sample(comfy.sd.load_lora_for_models(model, None, stock, 0.7, 0)[0]), merged),
    "negative": gap(sample(apply(model, one, negative=False)[0]), sample(apply(model, one)[0])),
    "cfg1": gap(sample(apply(model, one, negative=False)[0], cfg=1.0),
                sample(apply(model, one)[0], cfg=1.0)),
    "scopes": scopes,
    "report": json.loads(half[1]),
    "errors": {
        "nan": error(lambda: apply(model, one, float("nan"))),
        "batch": error(lambda: apply(model, lora, mode="merge")),
        "latents": error(lambda: sample(apply(model, lora)[0], batch=2)),
        "base": error(lambda: apply(model, lora_of(["blocks.0"], 5))),
        "range": error(lambda: scope_of(0.5, 0.5)),
        "line": error(lambda: apply(model, one, scope=scope_of(modules="blocks.0"))),
        "idle": error(lambda: apply(model, one, scope=scope_of(modules="x* = 1"))),
        "merged range": error(lambda: apply(model, one, mode="merge", scope=begin)),
        "hook batch": error(lambda: hook(model, lora)),
        "hook base": error(lambda: hook(model, lora_of(["other.0"]).select(0))),
        "nothing": error(lambda: apply(model, lora_of(["other.0"]))),
    },
    "untouched": gap(sample(model), plain),
})  # fmt: skip
