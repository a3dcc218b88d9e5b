"""Apply on MODELs with experts in every form: per item, per branch, chained; what is refused."""

from __future__ import annotations

import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.supported_models_base
import pytest
import torch
from expert_models import FORMS, Mixture, expert_pairs
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.lora import GeneratedLoRA

CPU = torch.device("cpu")


class Config(comfy.supported_models_base.BASE):
    unet_config = {"in_channels": 8}
    memory_usage_factor = 0.1


def model(form: str):
    """A MODEL whose two layers mix experts; all forms compute the same."""

    class Net(torch.nn.Module):
        def __init__(self, **_):
            super().__init__()
            self.dtype = torch.float32
            self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
            for layer in self.layers:
                layer.mlp = Mixture(form)
                layer.proj = torch.nn.Linear(8, 8)
                with torch.no_grad():
                    layer.proj.weight.copy_(torch.eye(8))
                    layer.proj.bias.zero_()

        def forward(self, x, t, context=None, control=None, transformer_options=None, **_):
            hidden = x.flatten(2).mT + context.mean(dim=2, keepdim=True)
            for layer in self.layers:
                hidden = layer.proj(hidden) + torch.tanh(layer.mlp(hidden) / 20)
            return hidden.mT.view_as(x)

    config = Config({"in_channels": 8})
    config.set_inference_dtype(torch.float32, None)
    flow = comfy.model_base.ModelType.FLOW
    made = comfy.model_base.BaseModel(config, flow, device="cpu", unet_model=Net)
    made.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(made, CPU, CPU)


def sample(patcher, batch=3, cfg=3.0):
    latent = torch.zeros(batch, 8, 4, 4)
    positive, negative = ([[torch.full((1, 1, 4), value), {}]] for value in (0.1, -0.1))
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample(
        patcher, noise, 3, cfg, "euler", "simple", positive, negative, latent, denoise=1.0, seed=1
    )


def gap(one, two) -> float:
    return float((one - two).abs().max() / two.abs().max())


@pytest.fixture(scope="module")
def batch() -> GeneratedLoRA:
    """Three LoRAs on all experts and on a plain module."""
    rng = torch.Generator().manual_seed(7)
    pairs = {}
    for i in range(2):
        pairs |= expert_pairs(3, f"layers.{i}.mlp")
        pairs[f"layers.{i}.proj"] = (
            torch.randn(3, 2, 8, generator=rng) * 0.2,
            torch.randn(3, 8, 2, generator=rng) * 0.2,
        )
    return GeneratedLoRA.from_pairs(pairs, 2.0, layers={p: p.rpartition(".")[0] for p in pairs})


@pytest.fixture(scope="module")
def wanted(batch):
    """Each image with its LoRA by the engine's injection, one by one: of the form that it is tested on."""
    from hywu_nodes.hywu_core.injection import inject

    base = model("grouped")
    made = []
    for i in range(3):
        with inject(base.model.diffusion_model, batch.select(i)):
            made.append(sample(base)[i])
    return torch.stack(made)


@pytest.mark.parametrize("form", FORMS)
def test_each_image_gets_its_own_experts(call, batch, wanted, form):
    base = model(form)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    plain = sample(base)
    together = sample(call.HYWUApplyLoRA(base, batch, 1.0, "auto")[0])
    assert gap(together, wanted) < 1e-4
    assert gap(plain, wanted) > 0.01
    single = sample(call.HYWUApplyLoRA(base, batch.select(2), 1.0, "unmerged")[0])
    assert gap(single[2], wanted[2]) < 1e-4
    assert torch.equal(sample(base), plain)
    after = base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [False, True])
def test_the_positive_branch_alone(call, batch, form, several):
    """At cfg 1 there is no other branch; with guidance the negative one is the base model's."""
    lora = batch if several else batch.select(1)
    base, reference = model(form), model("grouped")
    alone = call.HYWUApplyLoRA(base, lora, 1.0, "auto", apply_to_negative=False)[0]
    both = call.HYWUApplyLoRA(base, lora, 1.0, "auto")[0]
    assert gap(sample(alone, cfg=1.0), sample(both, cfg=1.0)) < 1e-5
    expected = call.HYWUApplyLoRA(reference, lora, 1.0, "auto", apply_to_negative=False)[0]
    assert gap(sample(alone), sample(expected)) < 1e-4
    assert gap(sample(alone), sample(both)) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_two_applied_add_up(call, batch, form):
    base, one = model(form), batch.select(0)
    twice = call.HYWUApplyLoRA(call.HYWUApplyLoRA(base, one, 0.25, "auto")[0], one, 0.5, "auto")[0]
    once = call.HYWUApplyLoRA(base, one, 0.75, "auto")[0]
    assert gap(sample(twice), sample(once)) < 1e-4


def test_merge_says_why_it_wont(call, batch):
    base, one = model("grouped"), batch.select(0)
    with pytest.raises(HYWUError, match=r"experts aren't merged .* use mode 'unmerged'"):
        call.HYWUApplyLoRA(base, one, 1.0, "merge")
    assert call.report("HYWUApplyLoRA", base, one, 1.0, "auto")["mode"] == "unmerged"
    with pytest.raises(HYWUError, match="ComfyUI's hooks can't hold"):
        call.HYWULoRAHook(base, one, 1.0)


def test_another_number_of_experts_is_refused(call):
    pairs = {name: (a[:, :3], b[:, :3]) for name, (a, b) in expert_pairs(1, "layers.0.mlp").items()}
    lora = GeneratedLoRA.from_pairs(pairs, 2.0)
    for form in FORMS:
        with pytest.raises(HYWUError, match="does not fit"):
            call.HYWUApplyLoRA(model(form), lora, 1.0, "auto")
