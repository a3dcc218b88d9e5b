"""Apply, Scope and Hook on a small MODEL: merged, unmerged, per item, chained, narrowed, refused.

The MODEL is a real BaseModel under ModelPatcher, sampled by ComfyUI's own sampler with both branches of
guidance in one batch.
"""

from __future__ import annotations

import time

import comfy.hooks
import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.supported_models_base
import pytest
import torch
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.lora import GeneratedLoRA

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


def sample(patcher, batch=3, cfg=3.0, hooks=None):
    """hooks: on the positive conditioning."""
    latent, empty = torch.zeros(batch, 4, 8, 8), [[torch.zeros(1, 1, 4), {}]]
    positive = comfy.hooks.set_hooks_for_conditioning(empty, hooks) if hooks else empty
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    return comfy.sample.sample(
        patcher, noise, 4, cfg, "euler", "simple", positive, empty, latent, denoise=1.0, seed=1
    )


def lora_of(paths, width=4) -> GeneratedLoRA:
    """A batch of three."""
    generator = torch.Generator().manual_seed(len(paths))
    pairs = {
        path: (
            torch.randn(3, 2, width, generator=generator),
            torch.randn(3, 4, 2, generator=generator) * 0.3,
        )
        for path in paths
    }
    return GeneratedLoRA.from_pairs(pairs, 2.0)


def gap(one, two) -> float:
    return float((one - two).abs().max() / two.abs().max())


def keyframes(hooks, *frames):
    group = comfy.hooks.HookKeyframeGroup()
    for strength, start in frames:
        group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks = hooks.clone()
    hooks.set_keyframes_on_hooks(group)
    return hooks


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Config({"in_channels": 4})
    config.set_inference_dtype(torch.float32, None)
    flow = comfy.model_base.ModelType.FLOW
    made = comfy.model_base.BaseModel(config, flow, device="cpu", unet_model=Net)
    for parameter in made.parameters():
        parameter.requires_grad_(False).normal_(0, 0.3)
    return comfy.model_patcher.ModelPatcher(made, CPU, CPU)


@pytest.fixture(scope="module")
def batch():
    return lora_of([f"blocks.{i}" for i in range(3)])


@pytest.fixture(scope="module")
def one(batch):
    return batch.select(1)


@pytest.fixture(scope="module")
def stock(call, batch):
    """The same for ComfyUI's own loaders."""
    return call.HYWUSelectLoRA(batch, 1)[1]


@pytest.fixture(scope="module")
def apply(call, model):
    """The patched MODEL; `base` is the one of the module where none is given."""

    def run(lora, strength=1.0, mode="auto", base=None, **more):
        return call.HYWUApplyLoRA(base or model, lora, strength, mode, **more)[0]

    return run


@pytest.fixture(scope="module")
def scope(call):
    return lambda start=0.0, end=1.0, modules="": call.HYWULoRAScope(start, end, modules)[0]


@pytest.fixture(scope="module")
def hook(call, model):
    return lambda lora, strength=1.0, *more: call.HYWULoRAHook(model, lora, strength, *more)[0]


def test_merged_unmerged_and_stock_give_the_same(model, apply, one, stock):
    unmerged, merged = (sample(apply(one, 0.7, mode)) for mode in ("unmerged", "merge"))
    assert gap(unmerged, sample(model)) > 0.01
    assert gap(merged, unmerged) < 1e-4
    by_stock = comfy.sd.load_lora_for_models(model, None, stock, 0.7, 0)[0]
    assert gap(sample(by_stock), merged) < 1e-5


def test_each_image_of_a_batch_gets_its_own_lora(apply, batch):
    together = sample(apply(batch))
    for i in range(3):
        assert gap(together[i], sample(apply(batch.select(i)))[i]) < 1e-5


def test_two_in_a_row_add_up_and_the_model_that_went_in_is_unchanged(model, apply, batch, one):
    before = sample(model)
    chains = [
        sample(apply(batch.select(0), 0.5, second, base=apply(one, 0.5, first)))
        for first, second in (("merge", "unmerged"), ("unmerged", "merge"))
    ]
    assert gap(*chains) < 1e-4
    assert torch.equal(sample(model), before)


def test_the_negative_branch_can_be_left_alone(apply, one):
    both, positive = apply(one), apply(one, apply_to_negative=False)
    assert gap(sample(positive), sample(both)) > 1e-3
    assert torch.equal(sample(positive, cfg=1.0), sample(both, cfg=1.0))


def test_ranges_of_the_sampling_add_up_to_the_whole(model, apply, scope, one):
    begin, finish = scope(end=0.5), scope(0.5)
    early, whole = sample(apply(one, scope=begin)), sample(apply(one))
    assert min(gap(early, sample(model)), gap(early, whole)) > 0.01
    assert gap(sample(apply(one, scope=finish, base=apply(one, scope=begin))), whole) < 1e-6


def test_modules_have_strengths_of_their_own(apply, scope, one):
    only = GeneratedLoRA.from_pairs({"blocks.2": one["blocks.2"]}, 2.0)
    masked, wanted = scope(modules="blocks.* = 0\nblocks.2 = 0.5"), sample(apply(only, 0.5))
    assert gap(sample(apply(one, scope=masked)), wanted) < 1e-6
    assert gap(sample(apply(one, mode="merge", scope=masked)), wanted) < 1e-4


def test_several_generated_and_stock_loras_stack_in_any_order(model, apply, scope, one, stock):
    before, begin = sample(model), scope(end=0.5)
    last = lora_of(["blocks.2"]).select(0)
    ours_first = apply(last, 0.3, "merge", base=apply(one, 0.5, scope=begin))
    ours_first = comfy.sd.load_lora_for_models(ours_first, None, stock, 0.2, 0)[0]
    stock_first = comfy.sd.load_lora_for_models(model, None, stock, 0.2, 0)[0]
    stock_first = apply(one, 0.5, scope=begin, base=apply(last, 0.3, base=stock_first))
    assert gap(sample(ours_first), sample(stock_first)) < 1e-4
    assert torch.equal(sample(model), before)


def test_a_hook_acts_on_its_conditioning_only_and_keyframes_on_it(model, apply, scope, hook, one):
    positive, hooked = sample(apply(one, apply_to_negative=False)), sample(model, hooks=hook(one))
    assert gap(hooked, sample(model)) > 0.01
    assert gap(hooked, positive) < 1e-4
    assert gap(sample(model, hooks=hook(one, 0.5, hook(one, 0.5))), positive) < 1e-4
    framed = sample(model, hooks=keyframes(hook(one), (1.0, 0.0), (0.0, 0.6)))
    assert gap(framed, sample(apply(one, apply_to_negative=False, scope=scope(end=0.6)))) < 1e-4


# -- LoRAs that fit in part --------------------------------------------------------------------------


PARTLY = ["blocks.0", "elsewhere.0", "elsewhere.1"]


@pytest.mark.parametrize("name", ["HYWUApplyLoRA", "HYWULoRAHook"])
def test_a_lora_that_fits_in_part_is_an_error_that_counts_and_names(call, model, name):
    more = ("auto",) if name == "HYWUApplyLoRA" else ()
    with pytest.raises(HYWUError, match=r"2 of the LoRA's 3 modules aren't in Net, such as else"):
        getattr(call, name)(model, lora_of(PARTLY).select(0), 1.0, *more)


@pytest.mark.parametrize("name", ["HYWUApplyLoRA", "HYWULoRAHook"])
def test_unless_it_is_asked_for_and_then_it_is_said_everywhere(call, model, name, caplog):
    more = ("auto",) if name == "HYWUApplyLoRA" else ()
    arguments = (name, model, lora_of(PARTLY).select(0), 1.0, *more)
    ui = call.shown(*arguments, skip_missing=True)
    sentence = (
        "2 of the LoRA's 3 modules aren't in the model and were left out, such as elsewhere.0."
    )
    assert ui["hywu_warnings"] == [sentence]
    assert sentence in caplog.text
    report = call.report(*arguments, skip_missing=True)
    assert (report["matched"], report["skipped"]) == (1, 2)
    assert report["skipped_modules"] == ["elsewhere.0", "elsewhere.1"]


def test_what_is_left_of_it_acts(model, apply, call):
    part = lora_of(PARTLY).select(0)
    only = GeneratedLoRA.from_pairs({"blocks.0": part["blocks.0"]}, 2.0)
    wanted = sample(apply(only))
    assert gap(wanted, sample(model)) > 0.01
    for mode in ("merge", "unmerged"):
        assert gap(sample(apply(part, mode=mode, skip_missing=True)), wanted) < 1e-4
    hooks = call.HYWULoRAHook(model, part, 1.0, skip_missing=True)[0]
    assert gap(sample(model, hooks=hooks), sample(apply(only, apply_to_negative=False))) < 1e-4


def test_a_lora_that_fits_whole_warns_of_nothing(call, model, one):
    assert call.shown("HYWUApplyLoRA", model, one, 1.0, "auto")["hywu_warnings"] == []
    assert call.report("HYWULoRAHook", model, one, 1.0)["skipped"] == 0


@pytest.mark.parametrize("skip", [False, True])
def test_a_lora_of_another_shape_or_of_nothing_here_is_always_refused(call, model, skip):
    for lora, words in (
        (lora_of(["blocks.0"], 5), "4 x 4, the LoRA says 4 x 5"),
        (lora_of(["other.0"]), "none of its 1 modules"),
    ):
        with pytest.raises(HYWUError, match=words):
            call.HYWUApplyLoRA(model, lora, 1.0, "auto", skip_missing=skip)
        with pytest.raises(HYWUError, match=words):
            call.HYWULoRAHook(model, lora.select(0), 1.0, skip_missing=skip)


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e39])
def test_a_strength_that_is_no_strength_is_refused(apply, hook, one, strength):
    for action in (apply, hook):
        with pytest.raises(HYWUError, match="finite number"):
            action(one, strength)


@pytest.mark.parametrize("mode", ["merge", "unmerged"])
def test_a_strength_times_a_modules_is_a_strength_too(apply, scope, one, mode):
    with pytest.raises(HYWUError, match="finite number from -10000 to 10000"):
        apply(one, 9000.0, mode, scope=scope(modules="blocks.* = 9000"))


@pytest.mark.parametrize("line", ["blocks.0", "= 3", "blocks.* = 1e39", "blocks.* = nan", "a = b"])
def test_a_line_of_strengths_that_cannot_be_read_is_said_before_the_run(
    nodes, scope, apply, one, line
):
    said = nodes["HYWULoRAScope"].VALIDATE_INPUTS(module_strengths=line)
    assert f"'{line}'" in said
    with pytest.raises(HYWUError, match="module_strengths"):
        apply(one, scope=scope(modules=line))


def test_hundreds_of_thousands_of_lines_are_refused_at_once(nodes, scope, apply, one):
    many = "\n".join(f"blocks.*[!{number}] = 1" for number in range(300_000))
    started = time.process_time()
    assert "300,000 lines, at most 5,000" in nodes["HYWULoRAScope"].VALIDATE_INPUTS(
        module_strengths=many
    )
    with pytest.raises(HYWUError, match="300,000 lines"):
        apply(one, scope=scope(modules=many))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("text", [None, "", "blocks.* = 0.5\n\n blocks.1 = -2 "])
def test_lines_that_can_be_read_are_taken(nodes, text):
    assert nodes["HYWULoRAScope"].VALIDATE_INPUTS(module_strengths=text) is True


def test_errors_say_what_disagrees(model, apply, scope, hook, batch, one):
    cases = {
        "HY-WU Select LoRA": lambda: apply(batch, mode="merge"),
        "2 images, but there are 3 LoRAs": lambda: sample(apply(batch), batch=2),
        "start_percent must be below end_percent": lambda: scope(0.5, 0.5),
        r"'x\*' matches none": lambda: apply(one, scope=scope(modules="x* = 1")),
        "Merged weights serve all steps": lambda: apply(one, mode="merge", scope=scope(end=0.5)),
        "this is a batch of 3; pick one with HY-WU Select LoRA": lambda: hook(batch),
    }
    for words, action in cases.items():
        with pytest.raises(HYWUError, match=words):
            action()
