"""The bundled editor under ComfyUI's stock nodes, against the engine alone; weights left behind; the cache."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from hywu_nodes.hywu_core.bases.bundled.checkpoint import load_editor
from hywu_nodes.hywu_core.bases.bundled.sampling import edit
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.nodes.host import cache, generators

import nodes as stock

TEXT = "Make it BLURRY, grüße"


class Loaded:
    """The editor's three sockets, the engine's own editor, and two small images."""

    def __init__(self, call) -> None:
        torch.manual_seed(0)
        self.model, self.clip, self.vae = call.HYWULoadBundledEditor()
        self.plain = load_editor()
        self.side = 32
        self.images = torch.rand(2, self.side, self.side, 3)

    def sample(
        self, image, text=TEXT, negative="", steps=6, cfg=1.0, sampler="euler", scheduler="simple",
        seed=3, denoise=1.0, model=None,
    ):  # fmt: skip
        """Stock nodes only; the latent ``[B, 3, H, W]`` that KSampler gives."""
        encode = stock.CLIPTextEncode().encode
        result = InstructPixToPixConditioning.execute(
            encode(self.clip, text)[0], encode(self.clip, negative)[0], image, self.vae
        )
        positive, negative, latent = result.args if hasattr(result, "args") else result.result
        latent = {"samples": self.vae.encode(image)} if denoise < 1 else latent
        return stock.common_ksampler(
            model or self.model, seed, steps, cfg, sampler, scheduler, positive, negative, latent,
            denoise=denoise,
        )[0]["samples"]  # fmt: skip

    def image(self, *args, **kwargs):
        """``[B, H, W, 3]`` in 0..1."""
        return self.vae.decode(self.sample(*args, **kwargs))

    def engine(self, image, texts, steps=6, seed=3):
        """The same by hywu_core alone."""
        return edit(self.plain, image.movedim(-1, 1), texts, steps=steps, seed=seed).movedim(1, -1)


@pytest.fixture(scope="module")
def editor(call, weights):
    return Loaded(call)


def gap(one, two) -> float:
    return float((one - two).abs().max())


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_stock_nodes_give_what_the_engine_gives(editor):
    images, (tile, _) = editor.images, editor.plain.config.tile(4096, 4096)
    large = torch.rand(1, 2 * tile + 8, tile + 24, 3, generator=torch.Generator().manual_seed(1))
    assert gap(editor.image(images), images) > 0.01
    assert gap(editor.image(images), editor.engine(images, [TEXT] * 2)) < 1e-3
    assert gap(editor.image(large), editor.engine(large, [TEXT])) < 1e-3
    assert gap(editor.image(images, steps=4), editor.engine(images, [TEXT] * 2, 4)) < 1e-3
    lines = editor.image(images, text="blur\nsharpen it")
    assert gap(lines, editor.engine(images, ["blur", "sharpen it"])) < 1e-3


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_every_stock_scheduler_works(editor, scheduler):
    assert torch.isfinite(editor.sample(editor.images[:1], steps=3, scheduler=scheduler)).all()


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_every_stock_sampler_works(editor, sampler):
    assert torch.isfinite(editor.sample(editor.images[:1], steps=3, sampler=sampler)).all()


def test_guidance_and_denoise_have_an_effect(editor):
    images = editor.images
    assert gap(editor.image(images, cfg=3.0), editor.image(images)) > 1e-3
    assert gap(editor.image(images, denoise=0.5), images) > 1e-3


def test_nodes_that_replace_the_sampling_keep_the_scale_of_time(editor):
    """ModelSamplingSD3 counts in thousandths."""
    shifted = ModelSamplingSD3().patch(editor.model, 1.0)[0]
    wanted = editor.image(editor.images, steps=4)
    assert gap(editor.image(editor.images, steps=4, model=shifted), wanted) < 1e-3


def leave_behind(patcher) -> None:
    """With a few KB for weights, the rest stays behind and is cast where it is used."""
    patcher.detach()
    patcher.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=20_000)
    assert patcher.model.model_lowvram


def test_a_partly_loaded_editor_gives_the_same(editor, call):
    fresh = call.HYWULoadBundledEditor()[0]
    before = editor.sample(editor.images, model=fresh)
    leave_behind(fresh)
    assert gap(editor.sample(editor.images, model=fresh), before) < 1e-5
    fresh.detach()
    assert torch.equal(editor.sample(editor.images, model=fresh), before)


@pytest.fixture
def generated(editor, call):
    """A LoRA for a generator, from scratch."""

    def run(generator, text="blur the image"):
        generators.CACHE._kept.clear()
        condition = call.HYWUConditionEncode(generator, editor.images[:1], text)[0]
        return call.HYWUGenerateLoRA(generator, condition)[0]

    return run


def test_a_partly_loaded_generator_gives_the_same(call, generated):
    generator = call.HYWULoadGenerator("bundled", "float32")[0]
    whole = generated(generator)
    leave_behind(generator.patcher)
    after = generated(generator)
    assert max(gap(whole[path].B, after[path].B) for path in whole) < 1e-5
    generator.patcher.detach()
    again = generated(generator)
    assert all(torch.equal(whole[path].B, again[path].B) for path in whole)


def test_the_lora_cache_keeps_to_its_limit(call, generated):
    """The one that was not used for longest goes; what exceeds the limit alone is not kept."""
    lora = generated(call.HYWULoadGenerator("bundled", "float32")[0])
    kept = cache.LoRACache(2 * lora.nbytes)
    a, b, c = (lora._map(torch.clone) for _ in range(3))
    for key, value in (("a", a), ("b", b), ("a", None), ("c", c)):
        kept.get(key) if value is None else kept.put(key, value)
    assert [key for key in "abc" if kept.get(key) is not None] == ["a", "c"]
    assert kept.nbytes == 2 * lora.nbytes
    small = cache.LoRACache(lora.nbytes - 1)
    small.put("a", a)
    assert small.nbytes == 0


@pytest.mark.parametrize(("text", "limit"), [("16", 16), ("much", 2048), ("-3", 2048), ("", 2048)])
def test_the_caches_limit_is_a_number_of_mib_or_the_default(monkeypatch, text, limit):
    monkeypatch.setenv(cache.VARIABLE, text)
    assert cache.limit_from_environment() == limit << 20


def test_gray_and_transparent_images(editor):
    images, vae = editor.images, editor.vae
    transparent = torch.cat([images, images[..., :1]], -1)
    assert torch.equal(vae.encode(transparent), vae.encode(images))
    assert vae.encode(images[..., :1]).shape[1] == 3


def test_errors_say_what_disagrees(editor):
    with pytest.raises(HYWUError, match="3 lines and the latent 1 images"):
        editor.sample(editor.images[:1], text="one\ntwo\nthree")
    with pytest.raises(HYWUError, match="at least 8 x 8"):
        editor.sample(editor.images[:, :1, :1])


def test_the_import_costs_less_than_a_second(import_seconds):
    assert import_seconds < 1
