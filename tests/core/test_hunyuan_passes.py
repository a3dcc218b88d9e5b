"""HunyuanImage-3's three passes against the official code's values, and against each other."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace

import pytest
import torch
from hunyuan_golden import (
    BASE,
    CONDITION,
    GENERATOR,
    LATENTS,
    SYSTEM,
    distance,
    distilled_folder,
    generator,
    golden,
    other_image,
    pipeline,
    source,
)

from hywu_core import HYWUError, inject, load_generator
from hywu_core.bases.hunyuan_image3 import Pipeline, Request, Sampler
from hywu_core.bases.hunyuan_image3.attention import KVCache
from hywu_core.bases.hunyuan_image3.editing import Denoiser, Sampling, sample
from hywu_core.bases.hunyuan_image3.passes import embed, prefill
from hywu_core.bases.hunyuan_image3.rope import rotation
from hywu_core.bases.hunyuan_image3.thinking import think
from hywu_core.images import to_pillow


def asked(name: str, seed: int | None = None) -> Request:
    """The request of a golden case. Its noise is what its seed draws."""
    metadata = golden(name).metadata
    images = [source()] if metadata.get("sources") else []
    seed = metadata["seed"] if seed is None else seed
    return Request(metadata["prompt"], images, metadata["cot"] or "", metadata["image_size"], seed)


def steps_of(name: str) -> dict:
    metadata = golden(name).metadata
    return {key: metadata[key] for key in ("steps", "guidance", "flow_shift")}


def test_the_seed_draws_the_official_noise():
    """VAE noise in float32, then the initial noise in bfloat16, from one generator."""
    edit = golden("edit")
    drawn = torch.Generator().manual_seed(edit.metadata["seed"])
    assert torch.equal(pipeline().encode_source.noise(source(), drawn), edit["prefill.vae_noise.0"])
    assert torch.equal(pipeline().prepare([asked("edit")])[0], edit["sample.noise.2"])


def test_condition_stage_by_stage():
    edit, p = golden("edit"), pipeline()
    request = asked("edit")
    sources = p.sources(request)
    edit.check("prefill.patch_embed.0.latent", sources[0].latent[None])
    edit.check("prefill.aligner.0", sources[0].tokens[None])
    sequence = p.prompts.ratio(request)
    assert torch.equal(sequence.ids, edit["prefill.tokens"][0].long())
    cos, sin = rotation(sequence.positions, p.config.head_dim, p.config.rope_theta)
    edit.check("prefill.cos", cos[None])
    edit.check("prefill.sin", sin[None])
    with torch.no_grad():
        edit.check("prefill.embeds", embed(p.model, [sequence], [sources], [len(sequence)]))
    kept = []
    handles = [
        layer.register_forward_hook(lambda _, args, out: kept.append(out))
        for layer in p.model.model.layers
    ]
    try:
        states = prefill(p.model, [sequence], [sources])
    finally:
        for handle in handles:
            handle.remove()
    for i, made in enumerate(kept):
        edit.check(f"prefill.layer.{i}", made, CONDITION)
    edit.check("condition", states, CONDITION)
    with torch.no_grad():
        logits = p.model.logits(states[:, -1])[:, list(p.prompts.tokens.ratios)]
    edit.check("prefill.ratio_logits", logits, CONDITION)


@pytest.mark.parametrize("name", ["edit", "text_to_image"])
def test_condition_and_ratio(name):
    made = pipeline().condition([asked(name)])
    golden(name).check("condition", made.parts["hidden_states"], CONDITION)
    assert made.fingerprint
    assert pipeline().ratios([asked(name)]) == [golden(name).metadata["ratio_index"]]


def test_the_generated_lora():
    edit = golden("edit")
    lora = generator()(pipeline().condition([asked("edit")]))
    assert lora.scale == float(edit["lora.scale"])
    names = [name for name in edit.values if name.startswith("lora.model.")]
    assert len(names) == 14
    for name in names:
        pair = lora[name.removeprefix("lora.").rpartition(".lora_")[0]]
        edit.check(name, pair.A if name.endswith("A") else pair.B, CONDITION)


@pytest.mark.parametrize(
    ("name", "kind"), [("edit", "plain"), ("edit", "lora"), ("text_to_image", "plain")]
)
def test_editing(name, kind):
    """Predictions of both branches, latents after each step, the image."""
    g, p, request = golden(name), pipeline(), asked(name)
    lora = generator()(p.condition([request])) if kind == "lora" else None
    noise, sequences, sources = p.prepare([request])
    assert torch.equal(torch.stack([s.ids for s in sequences]), g["sample.tokens"].long())
    predictions, latents = [], []

    class Watched(Denoiser):
        def __call__(self, *args):
            predictions.append(super().__call__(*args))
            return predictions[-1]

    with (
        inject(p.model, lora) if lora else contextlib.nullcontext(),
        Watched(p.model, sequences, sources) as denoiser,
    ):
        sampling = Sampling(**steps_of(name))
        sample(denoiser, noise, sampling, True, lambda *step: latents.append(step[2]))
    checked = 0
    for i, (made, after) in enumerate(zip(predictions, latents, strict=True)):
        for what, value in (("branches", made), ("next", after)):
            if f"{kind}.step.{i}.{what}" in g.values:
                g.check(f"{kind}.step.{i}.{what}", value, LATENTS)
                checked += 1
    assert checked >= 2
    g.check_image(f"{kind}.image", to_pillow(p.decode(latents[-1])[0]))
    if name == "edit" and kind == "plain":
        with torch.no_grad():
            frames = p.vae.frames(p.vae.unscaled(latents[-1])[:, :, None])
        g.check("plain.decoder_out_last_frame", frames[:, :, -1], LATENTS)


def test_the_whole_edit_by_its_seed():
    p, request = pipeline(), asked("edit")
    lora = generator()(p.condition([request]))
    plain, edited = (p.edit([request], given, **steps_of("edit"))[0] for given in (None, lora))
    golden("edit").check_image("plain.image", plain)
    golden("edit").check_image("lora.image", edited)
    assert plain.tobytes() != edited.tobytes()


def test_hidden_states_of_the_first_step_over_the_whole_sequence():
    """The official first step runs the whole sequence at once; prefix and image apart are the same."""
    edit, p, request = golden("edit"), pipeline(), asked("edit")
    noise, sequences, sources = p.prepare([request])
    lora, seen = generator()(p.condition([request])), []
    hook = p.model.model.layers[-1].register_forward_hook(lambda _, a, out: seen.append(out))
    try:
        with inject(p.model, lora), Denoiser(p.model, sequences, sources) as denoiser:
            denoiser(torch.cat((noise, noise)), torch.full((2,), 1000.0))
    finally:
        hook.remove()
    together = torch.cat(seen, dim=1)
    wanted = edit["lora.step.0.last_hidden"]
    # what follows the image is never computed
    made = edit.cut("lora.step.0.last_hidden", together)
    assert distance(made, wanted[:, : made.shape[1]]) <= LATENTS


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_distilled(tmp_path, kind):
    g, request = golden("distilled"), asked("distilled")
    folder = distilled_folder(tmp_path / "base")
    p = Pipeline.load(folder, dtype=torch.float32, system=SYSTEM)
    condition = p.condition([request])
    g.check("condition", condition.parts["hidden_states"], CONDITION)
    lora = generator()(condition) if kind == "lora" else None
    _noise, sequences, _sources = p.prepare([request])
    assert len(sequences) == 1
    assert torch.equal(sequences[0].ids, g["sample.tokens"][0].long())
    latents = []
    image = p.edit(
        [request], lora, on_step=lambda *s: latents.append(s[2]), **steps_of("distilled")
    )
    g.check(f"{kind}.step.2.next", latents[-1], LATENTS)
    g.check_image(f"{kind}.image", image[0])


# -- the text pass -----------------------------------------------------------------------------------


class Pushed(Sampler):
    """Greedy; adds to given logits at given steps, as the golden run did."""

    run: dict = {}

    def __call__(self, step, logits, generator):
        at = Pushed.run["bias_at_new_token"].get(str(step))
        if at is not None:
            logits = logits.clone()
            logits[at] += Pushed.run["bias_added"]
        else:
            wanted = Pushed.run["argmax_before_bias_and_processors"][step]
            assert int(logits.argmax()) == wanted
        return super().__call__(step, logits, generator)


@pytest.mark.parametrize("run", [0, 1])
def test_the_text_pass(run):
    g = golden("cot")
    Pushed.run = metadata = g.metadata["runs"][run]
    p = pipeline()
    request = Request(g.metadata["prompt"], [source()], size=metadata["image_size"])
    encode = p.encode_source
    given = [encode(source(), g[f"{metadata['image_size']}.vae_noise"])]
    wanted = [i for i, n in metadata["prompt_tokens"] for _ in range(n)]
    assert p.prompts.writing(request, "think").ids.tolist() == wanted
    told = []
    made = think(
        p.model, p.prompts, request, given, sampler=Pushed(), on_token=lambda *t: told.append(t)
    )
    assert list(made.ids) == metadata["new_tokens"]
    assert made.cot == metadata["cot_text"]
    assert made.ratio == (4 if run == 0 else None)
    assert made.finished
    assert [count for count, _, _ in told] == list(range(1, len(made.ids) + 1))
    assert KVCache.live() == 0


def test_the_text_is_seeded_and_ends_at_its_limit():
    p = pipeline()
    request = Request("an other thing", [], size="256x256", seed=5)
    hot = Sampler(temperature=1.0, top_k=100, top_p=0.9)
    first, again, other = (
        p.think(replace(request, seed=seed), sampler=hot, most=12).cot for seed in (5, 5, 6)
    )
    assert first == again != other
    assert first.startswith("<think>")
    assert first.endswith(("</think>", "</recaption>"))
    with pytest.raises(HYWUError, match="Task 'poem' is unknown"):
        p.think(request, task="poem")


def test_long_texts_make_room_for_themselves(monkeypatch):
    from hywu_core.bases.hunyuan_image3 import thinking

    p, request = pipeline(), Request("an other thing", [], size="256x256", seed=1)
    whole = p.think(request, sampler=Sampler(), most=20)
    monkeypatch.setattr(thinking, "ROOM", 3)
    assert p.think(request, sampler=Sampler(), most=20) == whole


def test_an_interrupted_text_frees_its_cache():
    class Stop(BaseException):
        pass

    def stop(count, most, text):
        assert KVCache.live() > 0
        if count == 3:
            raise Stop

    with pytest.raises(Stop):
        pipeline().think(Request("a thing", [], size="256x256"), sampler=Sampler(), on_token=stop)
    assert KVCache.live() == 0


def test_top_k_and_top_p():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    rng = torch.Generator().manual_seed(0)
    drawn = {Sampler(1.0, top_k=2)(0, logits, rng) for _ in range(200)}
    assert drawn == {0, 1}
    # shares 0.64, 0.24, 0.09, 0.03: the third starts below 0.9, the fourth doesn't
    drawn = {Sampler(1.0, top_p=0.9)(0, logits, rng) for _ in range(500)}
    assert drawn == {0, 1, 2}
    assert {Sampler(1.0, top_p=0.0)(0, logits, rng) for _ in range(20)} == {0}
    assert Sampler()(0, logits, rng) == 0


# -- batches, prefix, memory -----------------------------------------------------------------------------


def two() -> list[Request]:
    """Different instructions, lengths, images, chains of thought and seeds; one size."""
    return [
        Request("make it red", [source()], "", "256x256", 1),
        Request(
            "the other one, and keep the sky as it was before",
            [source(), other_image()],
            "<think>in the end</think><recaption>an other thing</recaption>",
            "256x256",
            2,
        ),
    ]


def test_a_batch_of_two_equals_each_alone():
    p = pipeline()
    requests = two()
    condition = p.condition(requests)
    lengths = condition.masks["hidden_states"].sum(dim=1).tolist()
    assert lengths[0] != lengths[1]
    loras = generator()(condition)
    together = p.sample(requests, loras, steps=2)
    for i, request in enumerate(requests):
        alone = p.condition([request])
        states = condition.parts["hidden_states"][i : i + 1, : lengths[i]]
        assert distance(states, alone.parts["hidden_states"]) < 1e-5
        made = p.sample([request], generator()(alone), steps=2)
        assert distance(together[i : i + 1], made) < 1e-4
        # and the LoRAs differ by much more
        wrong = p.sample([request], loras.select(1 - i), steps=2)
        assert distance(together[i : i + 1], wrong) > 1e-3


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_prefix_kept_is_bitwise_one_computed_again(with_lora):
    p, requests = pipeline(), two()
    loras = generator()(p.condition(requests)) if with_lora else None
    kept, again = (p.sample(requests, loras, steps=3, keep_prefix=keep) for keep in (True, False))
    assert torch.equal(kept, again)


def test_both_branches_share_a_pass():
    """A pass of all layers for the prefix and one per step, whatever the batch."""
    p, calls = pipeline(), []
    hook = p.model.model.layers[0].register_forward_hook(lambda _, a, out: calls.append(len(out)))
    try:
        p.sample([asked("edit")], steps=4)
    finally:
        hook.remove()
    assert calls == [2] * (4 + 1)


def test_the_cache_is_freed_after_sampling_interruption_and_error():
    p, request = pipeline(), asked("edit")
    seen = []

    class Stop(BaseException):
        pass

    def watch(step, steps, x, error=None):
        seen.append(KVCache.live())
        if error is not None:
            raise error

    p.sample([request], steps=1, on_step=watch)
    assert KVCache.live() == 0
    for error in (Stop(), RuntimeError("broken")):
        with pytest.raises(type(error)):
            p.sample([request], steps=2, on_step=lambda *s, e=error: watch(*s, error=e))
        assert KVCache.live() == 0
    # 2 branches x 3 layers x k and v x 2 heads x 760 tokens x 16 x float32
    assert set(seen) == {2 * 3 * 2 * 2 * 760 * 16 * 4}
    layer = p.model.model.layers[1]
    hook = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("layer")))
    try:
        with pytest.raises(RuntimeError, match="layer"):
            p.sample([request], steps=1)
    finally:
        hook.remove()
    gc.collect()
    assert KVCache.live() == 0
    lora = generator()(p.condition([request]))
    with pytest.raises(Stop):
        p.sample([request], lora, steps=2, on_step=lambda *s: watch(*s, error=Stop()))
    # the LoRA is gone with the exception
    after = p.sample([request], **steps_of("edit"))
    golden("edit").check("plain.step.2.next", after, LATENTS)


def test_an_automatic_size_is_the_base_models_choice():
    p, request = pipeline(), replace(asked("edit"), size="auto")
    lora = generator()(p.condition([request]))
    assert p.sample([request], lora, steps=1).shape[2:] == (128 // 16, 448 // 16)  # ratio 4
    chosen = replace(request, ratio=16)
    assert p.sample([chosen], lora, steps=1).shape[2:] == (16, 16)
    # the source, 280 x 320, shares the bucket 17 with the output and gives it its aspect
    aligned = p.edit([replace(request, ratio=17)], steps=1)[0]
    assert aligned.height / aligned.width == pytest.approx(320 / 280, abs=0.01)


# -- precision -------------------------------------------------------------------------------------------


def test_bfloat16_with_both_router_precisions():
    edit, request = golden("edit"), asked("edit")
    made = {}
    for router in ("float32", "bfloat16"):
        p = Pipeline.load(BASE, dtype=torch.bfloat16, router_precision=router, system=SYSTEM)
        assert p.model.dtype == torch.bfloat16
        assert p.model.model.layers[0].mlp.gate.wg.weight.dtype == torch.float32
        assert p.vae.decoder.conv_in.weight.dtype == torch.float32
        condition = p.condition([request])
        made[router] = condition.parts["hidden_states"]
        assert made[router].dtype == torch.bfloat16
        rows = edit.cut("condition", made[router])
        # a flipped choice of experts changes a token much, so the median tells
        errors = (rows.float() - edit["condition"]).norm(dim=-1) / edit["condition"].norm(dim=-1)
        assert errors.median() < 0.02
        p.sample([request], generator()(condition.to(dtype=torch.float32)), steps=1)
    assert not torch.equal(made["float32"], made["bfloat16"])


def test_token_ids_survive_every_dtype():
    """Ids above 256, beyond what bfloat16 can count, reach the embedding as they are."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        p = Pipeline.load(BASE, dtype=dtype, system=SYSTEM)
        seen = []
        hook = p.model.model.wte.register_forward_hook(lambda _, a, out, s=seen: s.append(a[0]))
        try:
            p.condition([asked("text_to_image")])
        finally:
            hook.remove()
        assert seen[0].dtype == torch.int64
        assert torch.equal(seen[0], golden("text_to_image")["prefill.tokens"].long())
        assert not torch.equal(seen[0].bfloat16().long(), seen[0])


# -- what is refused -------------------------------------------------------------------------------------


def test_what_a_batch_and_a_request_refuse():
    p, base = pipeline(), asked("edit")
    with pytest.raises(HYWUError, match="4 source images; HunyuanImage-3 edits with at most 3"):
        p.condition([replace(base, images=[source()] * 4)])
    with pytest.raises(HYWUError, match="instruction is empty"):
        p.condition([replace(base, instruction=" \n")])
    with pytest.raises(HYWUError, match="256x256, 128x512"):
        p.edit([base, replace(base, size="128x512")], steps=1)
    with pytest.raises(HYWUError, match="2 requests, but 3 LoRAs"):
        p.edit([base, base], generator()(p.condition([base, base, base])), steps=1)
    with pytest.raises(HYWUError, match=r"has 4,\d\d\d tokens, the checkpoint reads 4,096"):
        p.edit([replace(base, cot="a " * 2000)], steps=1)
    with pytest.raises(HYWUError, match="0 sampling steps"):
        p.edit([base], steps=0)


def test_the_official_precision_of_the_generator_is_its_own():
    """Loaded without a precision the generator computes as it is run officially."""
    assert load_generator(GENERATOR).config.rope_precision == "bfloat16"
