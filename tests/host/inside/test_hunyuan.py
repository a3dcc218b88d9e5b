"""HunyuanImage-3's nodes on the tiny folder: the whole path by stock samplers, against the engine and the
official code's values; batches, sizes, what is kept and freed, what is refused.
"""

from __future__ import annotations

import shutil
import time
import types

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import numpy as np
import pytest
import torch
from hunyuan_golden import (
    BASE,
    GENERATOR,
    LATENTS,
    SYSTEM,
    copy_folder,
    distance,
    edit_json,
    generator,
    golden,
    pipeline,
    source,
)
from hywu_nodes.hywu_core.bases.hunyuan_image3.attention import KVCache
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.nodes.host.encode import encode
from hywu_nodes.nodes.host.hunyuan_image3 import prompt
from hywu_nodes.nodes.host.hunyuan_image3.model import Banks

from hywu_core.bases.hunyuan_image3 import Pipeline, Request
from hywu_core.bases.hunyuan_image3.quantize import quantize

EQUAL = 1e-4


def pixels(image) -> torch.Tensor:
    """ComfyUI's ``[1, H, W, 3]`` in 0..1."""
    return torch.from_numpy(np.array(image))[None].float() / 255


def install(base, name: str, make) -> str:
    """A folder of models/hunyuan_image_3, made once."""
    folder = base / "models" / "hunyuan_image_3" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        make(folder)
    return name


@pytest.fixture(scope="module")
def loaded(call, base):
    name = install(base, "tiny", lambda target: shutil.copytree(BASE, target))
    return call.HYWULoadHunyuanImage3(name, "float32", "float32", SYSTEM)


@pytest.fixture(scope="module")
def hypernetwork(call, base):
    folder = base / "models" / "hywu" / "tiny-hunyuan"
    if not folder.exists():
        shutil.copytree(GENERATOR, folder)
        # the golden LoRA was made with positions in float32
        edit_json(folder / "config.json", rope_precision="float32")
    return call.HYWULoadGenerator("tiny-hunyuan", "float32")[0]


def asked(call, hunyuan, name="edit", **more):
    metadata = golden(name).metadata
    images = {"image": pixels(source())} if metadata.get("sources") else {}
    options = {
        "size": metadata["image_size"],
        "seed": metadata["seed"],
        "cot": metadata["cot"] or "",
    }
    return call.HYWUHunyuanEditPrompt(hunyuan, metadata["prompt"], **{**options, **images, **more})


def run(model, positive, negative, latent, noise, steps=3, cfg=2.5):
    """Stock euler and simple with a given noise; latents as VAE Decode gets them."""
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", positive, negative, latent["samples"], denoise=1.0,
        seed=1, disable_pbar=True,
    )  # fmt: skip


def unscaled(latents):
    """The engine's latents as ComfyUI's."""
    return pipeline().vae.unscaled(latents)


def test_stages_against_golden(call, loaded, hypernetwork):
    model, vae, hunyuan = loaded
    edit = golden("edit")
    positive, negative, latent, report = asked(call, hunyuan)
    assert report == "256 x 256, 763 tokens of 4,096"
    assert latent["samples"].shape == (1, 8, 16, 16)
    condition = call.HYWUConditionEncode(
        hypernetwork, pixels(source()), edit.metadata["prompt"], model=model, conditioning=positive
    )[0]
    edit.check("condition", condition.parts["hidden_states"], 1e-4)
    lora = call.HYWUGenerateLoRA(hypernetwork, condition)[0]
    for name in edit.values:
        if name.startswith("lora.model."):
            pair = lora[name.removeprefix("lora.").rpartition(".lora_")[0]]
            edit.check(name, pair.A if name.endswith("A") else pair.B, 1e-4)
    noise = edit["sample.noise.2"]
    for kind, sampled in (
        ("plain", model),
        ("lora", call.HYWUApplyLoRA(model, lora, 1.0, "auto")[0]),
    ):
        made = run(sampled, positive, negative, latent, noise)
        edit.check(f"{kind}.step.2.next", made * pipeline().config.vae.scaling_factor, LATENTS)
        image = vae.decode(made)[0]
        levels = edit.cut(f"{kind}.image", image.mul(255).round()).int()
        assert (levels - edit[f"{kind}.image"].int()).abs().max() <= 1
        request = Request(
            edit.metadata["prompt"],
            [source()],
            edit.metadata["cot"],
            "256x256",
            edit.metadata["seed"],
        )
        alone = pipeline().sample(
            [request],
            generator()(pipeline().condition([request])) if kind == "lora" else None,
            steps=3, guidance=2.5, flow_shift=3.0,
        )  # fmt: skip
        assert distance(made, unscaled(alone)) < EQUAL
    assert KVCache.live() == 0


def test_a_quantized_folder_stays_quantized(call, base, hypernetwork):
    """The condition is the engine's; the memory manager counts the bytes as they are stored."""
    name = install(base, "tiny-nf4", lambda target: quantize(BASE, target, "nf4"))
    model, _, hunyuan = call.HYWULoadHunyuanImage3(name, "float32", "float32", SYSTEM)
    positive, *_ = asked(call, hunyuan)
    given = (hypernetwork, pixels(source()), golden("edit").metadata["prompt"])
    made = call.HYWUConditionEncode(*given, model=model, conditioning=positive)[0]
    folder = base / "models" / "hunyuan_image_3" / name
    alone = Pipeline.load(folder, dtype=torch.float32, system=SYSTEM)
    metadata = golden("edit").metadata
    request = Request(
        metadata["prompt"], [source()], metadata["cot"], metadata["image_size"], metadata["seed"]
    )
    wanted = alone.condition([request]).parts["hidden_states"]
    assert distance(made.parts["hidden_states"], wanted) < EQUAL
    # the rest are the schedule's noise levels
    weights = model.model_size() - mm.module_size(model.model.model_sampling)
    assert weights == sum(p.nbytes for p in alone.model.parameters())
    bank = model.model.diffusion_model.model.layers[0].mlp.experts.w1
    # 4 bits and a bfloat16 scale: 64 numbers in 34 bytes
    assert (bank.coded.nbytes, bank.coded.dtype) == (8 * 48 * 34, torch.uint8)


def test_banks_elsewhere_are_copied_in_chunks():
    """Weights that aren't ready where they are used, 8 experts at a time, only those with rows."""
    torch.manual_seed(0)
    bank = Banks(20, 16, 24).requires_grad_(False)
    x = torch.randn(30, 16)
    ends = torch.tensor([0, 3, 3] + [5] * 6 + [15] * 5 + [22] * 5 + [30], dtype=torch.int32)
    wanted = bank.bfloat16()(x, ends)
    assert torch.equal(wanted, bank.float()(x, ends))


def test_a_lora_on_the_positive_branch_or_a_part_of_the_sampling(call, loaded, hypernetwork):
    """The prefix that is kept belongs to the LoRAs that act."""
    model, _, hunyuan = loaded
    positive, negative, latent, _ = asked(call, hunyuan)
    condition = call.HYWUConditionEncode(
        hypernetwork, pixels(source()), "-", model=model, conditioning=positive
    )[0]
    lora = call.HYWUGenerateLoRA(hypernetwork, condition)[0]
    noise = golden("edit")["sample.noise.2"]
    half = call.HYWUApplyLoRA(model, lora, 1.0, "auto", scope=call.HYWULoRAScope(0.5, 1.0, "")[0])[
        0
    ]
    first = run(model, positive, negative, latent, noise, steps=4)
    late = run(half, positive, negative, latent, noise, steps=4)
    whole = run(
        call.HYWUApplyLoRA(model, lora, 1.0, "auto")[0], positive, negative, latent, noise, steps=4
    )
    assert min(distance(late, first), distance(late, whole)) > 1e-3
    only = call.HYWUApplyLoRA(model, lora, 1.0, "auto", apply_to_negative=False)[0]
    made = run(only, positive, negative, latent, noise, steps=1)
    parts = [
        run(m, positive, negative, latent, noise, steps=1, cfg=1.0)
        for m in (call.HYWUApplyLoRA(model, lora, 1.0, "auto")[0], )
    ]  # fmt: skip
    alone = run(model, negative, negative, latent, noise, steps=1, cfg=1.0)
    assert distance(made, alone + 2.5 * (parts[0] - alone)) < EQUAL
    assert KVCache.live() == 0


def test_a_condition_of_two_images_warns_of_nothing(call, loaded, hypernetwork):
    """Without a prompt the node's own images are read, any number of them."""
    image = pixels(source())
    node = call.HYWUConditionEncode
    one, two = (
        node(hypernetwork, image, "make it red", model=loaded[0], **more)[0]
        for more in ({}, {"image2": image})
    )
    assert two.num_tokens > one.num_tokens
    made, _, warnings = encode(
        hypernetwork, {"image": image, "image2": image}, "make it red", model=loaded[0]
    )
    assert warnings == []
    assert made.digest() == two.digest()


def test_one_pass_over_the_prefix_and_one_per_step(call, loaded):
    model, _, hunyuan = loaded
    positive, negative, latent, _ = asked(call, hunyuan)
    calls = []
    layer = model.model.diffusion_model.model.layers[0]
    hook = layer.register_forward_hook(lambda _, args, out: calls.append(tuple(out.shape[:2])))
    try:
        run(model, positive, negative, latent, golden("edit")["sample.noise.2"], steps=4)
    finally:
        hook.remove()
    assert calls == [(2, 503), *[(2, 257)] * 4]


@pytest.mark.parametrize("error", ["interrupted", "broken"])
def test_what_is_kept_is_freed_when_a_sampling_ends_early(call, loaded, error):
    model, _, hunyuan = loaded
    positive, negative, latent, _ = asked(call, hunyuan)
    seen = []

    def stop(step, *_):
        seen.append(KVCache.live())
        if step == 1:
            if error == "broken":
                raise RuntimeError("broken")
            mm.interrupt_current_processing()

    kind = RuntimeError if error == "broken" else mm.InterruptProcessingException
    with pytest.raises(kind):
        comfy.sample.sample(
            model, golden("edit")["sample.noise.2"], 4, 2.5, "euler", "simple", positive, negative,
            latent["samples"], denoise=1.0, seed=1, callback=stop, disable_pbar=True,
        )  # fmt: skip
    assert seen[0] > 0
    assert KVCache.live() == 0
    assert not model.model.diffusion_model.sessions._kept


def test_think(call, loaded):
    model, _, hunyuan = loaded
    text = call.HYWUHunyuanThink(
        model, "make it red", "auto", 3, "think_recaption", 12, 0.0, image=pixels(source())
    )[0]
    request = Request("make it red", [source()], seed=3)
    from hywu_core.bases.hunyuan_image3 import Sampler

    wanted = pipeline().think(request, sampler=Sampler(), most=12)
    end = "" if wanted.ratio is None else f"<img_ratio_{wanted.ratio}>"
    assert text == wanted.cot + end
    both = call.HYWUHunyuanThink(model, "one\ntwo", "256x256", 3, "think", 4, 1.0)[0]
    assert len(both.split("\n---\n")) == 2
    made = call.HYWUHunyuanEditPrompt(hunyuan, "one\ntwo", "256x256", 3, cot=both)
    assert made[2]["samples"].shape[0] == 2


def test_sizes(call, loaded):
    model, _, hunyuan = loaded
    image = pixels(source())

    def size(text="auto", **more):
        latent = call.HYWUHunyuanEditPrompt(hunyuan, "make it red", text, 0, **more)[2]["samples"]
        return latent.shape[2] * 16, latent.shape[3] * 16

    assert size("144x272") == (144, 272)
    assert size("3:2") == (208, 304)
    assert size(image=image) == (272, 240)  # the image's own
    assert size() == (256, 256)
    assert size(cot="<think>a</think><img_ratio_3>") == (128, 464)
    chosen = pipeline().ratios([Request("make it red", [source()])])[0]
    wanted = hunyuan.prompts.bucket(chosen)
    assert size(image=image, model=model) == (wanted.height, wanted.width)


def test_a_custom_size_is_the_engines(call, loaded):
    model, _, hunyuan = loaded
    positive, negative, latent, _ = asked(call, hunyuan, size="144x272", cot="")
    noise = torch.randn(1, 8, 9, 17, generator=torch.Generator().manual_seed(2))
    made = run(model, positive, negative, latent, noise, steps=2)
    request = Request(golden("edit").metadata["prompt"], [source()], "", "144x272", 42)
    how = {"steps": 2, "guidance": 2.5, "flow_shift": 3.0, "noise": noise}
    assert distance(made, unscaled(pipeline().sample([request], **how))) < EQUAL


def test_simple_gives_the_official_noise_levels(loaded):
    sampling = loaded[0].get_model_object("model_sampling")
    from hywu_core.bases.hunyuan_image3.editing import schedule

    for steps in (1, 3, 8, 30, 50):
        made = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
        torch.testing.assert_close(made, schedule(steps, 3.0), rtol=2e-6, atol=2e-6)


def test_the_vae_is_the_engines(call, loaded):
    vae = loaded[1]
    image = pixels(source())[:, :272, :240]
    with torch.no_grad():
        mean = pipeline().vae.moments(image.movedim(-1, 1) * 2 - 1)[:, :8, 0]
    assert distance(vae.encode(image), mean) < EQUAL
    tiled = vae.decode_tiled(mean, tile_x=32, tile_y=32, overlap=8)
    assert tiled.shape == (1, 272, 240, 3)


def test_bfloat16(call, base, hypernetwork):
    """Ids survive; the routers' precision is the node's."""
    name = install(base, "tiny", lambda target: shutil.copytree(BASE, target))
    model, _, hunyuan = call.HYWULoadHunyuanImage3(name, "bfloat16", "bfloat16", SYSTEM)
    network = model.model.diffusion_model
    assert network.dtype == torch.bfloat16
    assert network.model.layers[0].mlp.gate.wg.weight.dtype == torch.float32
    assert network.model.layers[0].mlp.gate.precision == "bfloat16"
    positive, negative, latent, _ = asked(call, hunyuan)
    seen = []
    hook = network.model.wte.register_forward_hook(lambda _, a, out: seen.append(a[0]))
    try:
        made = run(model, positive, negative, latent, golden("edit")["sample.noise.2"], steps=1)
    finally:
        hook.remove()
    assert torch.isfinite(made).all()
    wanted = golden("edit")["sample.tokens"].long()[:, : seen[0].shape[1]]
    # guidance rows come in ComfyUI's order
    assert sorted(seen[0].tolist()) == sorted(wanted.tolist())


def test_refused(call, loaded, hypernetwork, base):
    model, _, hunyuan = loaded
    image = pixels(source())

    def refuses(said, action):
        with pytest.raises(HYWUError, match=said):
            action()

    make = call.HYWUHunyuanEditPrompt
    refuses("instruction is empty", lambda: make(hunyuan, " ", "auto", 0))
    refuses("multiples of 16", lambda: make(hunyuan, "red", "250x250", 0))
    refuses(
        "the checkpoint reads 4,096", lambda: make(hunyuan, "red", "256x256", 0, cot="a " * 3000)
    )
    refuses("1 x 1 pixels", lambda: make(hunyuan, "red", "auto", 0, image=image[:, :1, :1]))
    wide = torch.zeros(1, 10, 20_000, 3)
    refuses("20000 x 10 pixels", lambda: make(hunyuan, "red", "auto", 0, image=wide))
    refuses(
        "2 and 3 images|3 and 2 images",
        lambda: make(
            hunyuan,
            "red",
            "auto",
            0,
            image=image.repeat(2, 1, 1, 1),
            image2=image.repeat(3, 1, 1, 1),
        ),
    )
    refuses("never closes it", lambda: make(hunyuan, "red", "auto", 0, cot="<think>a"))
    encode = call.HYWUConditionEncode
    refuses("connect the MODEL of Load", lambda: encode(hypernetwork, image, "red"))
    _positive, _negative, latent, _ = asked(call, hunyuan)
    other = [[torch.zeros(1, 4, 8), {}]]
    refuses(
        "isn't HunyuanImage-3's",
        lambda: encode(hypernetwork, image, "red", model=model, conditioning=other),
    )
    noise = torch.zeros(1, 8, 16, 16)
    refuses("isn't its own", lambda: run(model, other, other, latent, noise))
    editor = call.HYWULoadBundledEditor()[0]
    refuses("not HunyuanImage-3", lambda: encode(hypernetwork, image, "red", model=editor))
    broken = install(base, "other", lambda t: copy_folder(t, model_type="llama"))
    refuses(
        "model_type is 'llama'",
        lambda: call.HYWULoadHunyuanImage3(broken, "auto", "float32", SYSTEM),
    )
    refuses(
        "system prompt 'en_unified'", lambda: call.HYWULoadHunyuanImage3("tiny", "auto", "float32")
    )
    refuses("no such file", lambda: call.HYWULoadHunyuanImage3("../..", "auto", "float32"))


def test_the_generator_that_fits(call, loaded, hypernetwork):
    """'auto' reads it off the model's layers."""
    editor, other = call.HYWULoadBundledEditor()[0], types.SimpleNamespace()
    for model in (loaded[0], editor):
        made = call.HYWULoadGenerator("auto", "float32", model)[0]
        made.config.layout.check(model.model.diffusion_model)
    other.model = types.SimpleNamespace(diffusion_model=torch.nn.Linear(2, 2))
    for model, said in (
        (None, "connect the MODEL"),
        (other, "No generator fits .*Linear.* bundled"),
    ):
        with pytest.raises(HYWUError, match=said):
            call.HYWULoadGenerator("auto", "float32", model)
    with pytest.raises(
        HYWUError, match="'tiny-hunyuan' doesn't fit the connected MODEL: .* missing"
    ):
        call.HYWULoadGenerator("tiny-hunyuan", "float32", editor)


def test_chains_of_thought_are_divided_by_lines_of_dashes():
    assert prompt.divided("a\n  ---\r\nb -- c\n\n-----\n\n---\n--") == ["a", "b -- c", "", "--"]
    started = time.process_time()
    assert prompt.divided("\n" * 200_000 + "x") == ["x"]
    assert time.process_time() - started < 2.0
