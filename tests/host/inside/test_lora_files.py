"""Load Generated LoRA: files of other programs, by the names that ComfyUI's own loader knows."""

from __future__ import annotations

import comfy.lora
import comfy.sd
import pytest
import torch
import training_models
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.lora import GeneratedLoRA
from safetensors.torch import save_file

BLOCK = "joint_blocks.0.x_block"
#: Of SD3's fused projection, as diffusers names its slices; and of a module that is whole there too.
SLICES = [f"transformer_blocks.0.attn.to_{name}" for name in "qkv"]
WHOLE = "transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def model(base):
    return training_models.load_model("SD3")


@pytest.fixture(scope="module")
def known(model):
    return comfy.lora.model_lora_keys_unet(model.model, {})


@pytest.fixture
def write(base):
    """(name, tensors) -> the file in output/loras, by its name in the list."""

    def run(name, tensors):
        folder = base / "output" / "loras"
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
        return name

    return run


def shape_of(model, target):
    """(out, in) of a weight, or of its slice."""
    key, *place = (target,) if isinstance(target, str) else target
    out, into = comfy.utils.get_attr(model.model, key).shape
    return (place[0][2] if place else out), into


def pair(model, known, name, rank=2, alpha=None, dots=("lora_A", "lora_B"), seed=0):
    out, into = shape_of(model, known[name])
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, generator=generator) for s in ((rank, into), (out, rank)))
    tensors = {f"{name}.{dots[0]}.weight": a * into**-0.5, f"{name}.{dots[1]}.weight": b * 0.1}
    return tensors | ({} if alpha is None else {f"{name}.alpha": torch.tensor(float(alpha))})


def weights(patcher):
    """Copies of all weights with what lies on the MODEL."""
    patcher.patch_model()
    found = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    patcher.unpatch_model()
    return found


def gap_to_stock(call, model, tensors, name) -> tuple[float, float]:
    """(largest difference to ComfyUI's own loader, largest change) of any weight."""
    plain = weights(model)
    theirs = weights(comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0)[0])
    lora = call.HYWULoadLoRA(name, model)[0]
    ours = weights(call.HYWUApplyLoRA(model, lora, 1.0, "merge")[0])
    changed = max(float((theirs[k] - plain[k]).abs().max()) for k in plain)
    return max(float((ours[k] - theirs[k]).abs().max()) for k in plain), changed


@pytest.mark.parametrize("prefix", ["transformer.", "lycoris_", "lora_transformer_"])
def test_names_of_diffusers_load_with_the_model_slices_of_fused_layers_too(
    call, model, known, write, prefix
):
    names = [f"{prefix}{name}" for name in (*SLICES, WHOLE)]
    if not prefix.endswith("."):
        names = [prefix + name.replace(".", "_") for name in (*SLICES, WHOLE)]
    assert isinstance(known[names[0]], tuple)
    tensors = {}
    for i, name in enumerate(names):  # ranks and alphas that differ
        tensors |= pair(model, known, name, rank=2 + i, alpha=None if i == 1 else i + 1, seed=i)
    gap, changed = gap_to_stock(call, model, tensors, write("diffusers.safetensors", tensors))
    assert changed > 0.01
    assert gap < 1e-5


@pytest.mark.parametrize("missing", SLICES)
def test_some_slices_of_a_fused_layer_are_enough(call, model, known, write, missing):
    names = [f"transformer.{name}" for name in SLICES if name != missing]
    tensors = {k: v for n in names for k, v in pair(model, known, n, alpha=4).items()}
    gap, changed = gap_to_stock(call, model, tensors, write("some.safetensors", tensors))
    assert changed > 0.01
    assert gap < 1e-5


@pytest.mark.parametrize(
    "dots", [("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")]
)
def test_names_that_have_lost_their_dots_load_with_the_model(call, model, known, write, dots):
    name = f"lora_unet_{BLOCK}.attn.qkv".replace(".", "_")
    tensors = pair(model, known, name, alpha=1, dots=dots)
    file = write("kohya.safetensors", tensors)
    gap, changed = gap_to_stock(call, model, tensors, file)
    assert changed > 0.01
    assert gap < 1e-6
    with pytest.raises(HYWUError, match="connect the MODEL that this LoRA is for"):
        call.HYWULoadLoRA(file)


def test_a_file_with_a_text_encoders_half_is_an_error_that_counts_and_names(
    call, model, known, write
):
    tensors = pair(model, known, f"lora_unet_{BLOCK}.attn.qkv".replace(".", "_"))
    for i in range(3):
        name = f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1"
        tensors |= {
            f"{name}.lora_down.weight": torch.zeros(2, 4),
            f"{name}.lora_up.weight": torch.zeros(4, 2),
            f"{name}.alpha": torch.tensor(2.0),
        }
    file = write("with_text.safetensors", tensors)
    words = (
        r"3 of its modules, such as lora_te1_text_model_encoder_layers_0_mlp_fc1, are no modules"
    )
    with pytest.raises(HYWUError, match=words):
        call.HYWULoadLoRA(file, model)
    lora = call.HYWULoadLoRA(file, model, skip_missing=True)[0]
    assert list(lora) == [f"{BLOCK}.attn.qkv"]
    ui = call.shown("HYWULoadLoRA", file, model, skip_missing=True)
    assert "3 of its modules" in ui["hywu_warnings"][0]
    assert "were left out" in ui["text"][0]


def test_what_is_no_plain_pair_names_the_stock_loader(call, model, known, write):
    name = f"lora_unet_{BLOCK}.attn.qkv".replace(".", "_")
    out, into = shape_of(model, known[name])
    tensors = pair(model, known, name) | {f"{name}.dora_scale": torch.ones(out, 1)}
    with pytest.raises(HYWUError, match="use ComfyUI's own Load LoRA"):
        call.HYWULoadLoRA(write("dora.safetensors", tensors), model)
    loha = {f"{name}.hada_w{i}_{s}": torch.ones(*((out, 2) if s == "a" else (2, into)))
            for i in (1, 2) for s in "ab"}  # fmt: skip
    with pytest.raises(HYWUError, match="use ComfyUI's own Load LoRA"):
        call.HYWULoadLoRA(write("loha.safetensors", loha), model)


WIDE, NARROW = f"transformer.{WHOLE}", f"transformer.{SLICES[0]}"


def _changed(name, side, change):
    return lambda t: t.update({f"{name}.{side}": change(t[f"{name}.{side}"])})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (WIDE, lambda t: t.pop(f"{WIDE}.lora_A.weight"), "has only one of its two matrices"),
        (WIDE, lambda t: t.pop(f"{WIDE}.lora_B.weight"), "has only one of its two matrices"),
        (WIDE, lambda t: t.update({f"{WIDE}.alpha": torch.ones(2)}), "no single finite number"),
        (WIDE, lambda t: t.update({f"{WIDE}.alpha": torch.ones(0)}), "no single finite number"),
        (WIDE, _changed(WIDE, "lora_A.weight", lambda a: a.sum()), "the ranks differ"),
        (NARROW, _changed(NARROW, "lora_A.weight", lambda a: a[:1]), "the ranks differ"),
        (NARROW, _changed(NARROW, "lora_A.weight", lambda a: a[:, 1:]), "is 128 x 127, and that is 128 x 128"),
        (NARROW, _changed(NARROW, "lora_B.weight", lambda b: b[1:]), "is 127 x 128, and that is 128 x 128"),
        (WIDE, lambda t: t.update({f"{WIDE}.reshape_weight": torch.tensor([9, 9])}), "own Load LoRA"),
        (WIDE, lambda t: t.update({f"{WIDE}.lora_mid.weight": torch.ones(2)}), "own Load LoRA"),
        (WIDE, lambda t: t.update({f"{WIDE}.diff_b": torch.ones(2)}), "own Load LoRA"),
        (WIDE, lambda t: t.clear(), "is empty"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_in_words_whatever_is_asked_for(
    call, model, known, write, name, change, words
):
    tensors = pair(model, known, name)
    change(tensors)
    file = write("damaged.safetensors", tensors)
    for skip in (False, True):
        with pytest.raises(HYWUError, match=words):
            call.HYWULoadLoRA(file, model, skip_missing=skip)


def test_one_module_under_two_names_is_an_error(call, model, known, write):
    flat = "lora_transformer_" + WHOLE.replace(".", "_")
    tensors = pair(model, known, WIDE) | pair(model, known, flat, seed=1)
    with pytest.raises(HYWUError, match="mlp.fc2 twice, under two names"):
        call.HYWULoadLoRA(write("twice.safetensors", tensors), model)


def test_a_fused_layer_and_a_slice_of_it_both_count(call, model, known, write):
    fused = f"diffusion_model.{BLOCK}.attn.qkv"
    tensors = pair(model, known, fused, alpha=1) | pair(model, known, NARROW, rank=3, seed=1)
    for ordered in (tensors, dict(reversed(tensors.items()))):
        gap, changed = gap_to_stock(call, model, tensors, write("both.safetensors", ordered))
        assert changed > 0.01
        assert gap < 1e-5


def test_slices_of_several_dtypes_lose_nothing(call, model, known, write):
    tensors = {k: v.bfloat16() for k, v in pair(model, known, NARROW).items()}
    tensors |= pair(model, known, f"transformer.{SLICES[1]}", seed=1)
    gap, changed = gap_to_stock(call, model, tensors, write("dtypes.safetensors", tensors))
    assert changed > 0.01
    assert gap < 1e-6


def test_matrices_of_8_bits_load_with_the_model(call, model, known, write):
    tensors = {
        k: v.to(torch.float8_e4m3fn)
        for name in (WIDE, NARROW)
        for k, v in pair(model, known, name).items()
    }
    wide = {k: v.bfloat16() for k, v in tensors.items()}
    lora = call.HYWULoadLoRA(write("f8.safetensors", tensors), model)[0]
    same = call.HYWULoadLoRA(write("bf16.safetensors", wide), model)[0]
    for path in same:
        assert all(torch.equal(x, y) for x, y in zip(lora[path], same[path], strict=True))


def test_an_alpha_that_only_the_metadata_has_counts_with_the_model_too(call, model, known, base):
    folder = base / "output" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    told = {"ss_network_alpha": "2", "ss_network_dim": "8"}
    tensors = pair(model, known, WIDE, rank=8)
    save_file(tensors, folder / "told.safetensors", told)
    assert call.HYWULoadLoRA("told.safetensors", model)[0].scale == 0.25
    assert call.HYWULoadLoRA("told.safetensors")[0].scale == 0.25
    # the note of a training, of a file that was resized since: as ComfyUI, and said
    save_file(tensors | {f"{WIDE}.alpha": torch.tensor(8.0)}, folder / "resized.safetensors", told)
    assert call.HYWULoadLoRA("resized.safetensors", model)[0].scale == 1
    shown = call.shown("HYWULoadLoRA", "resized.safetensors", model)["hywu_warnings"]
    assert "says the scale 1, the file's metadata 0.25; the tensors count." in shown[0]


def test_every_spelling_of_a_pair_that_comfyui_reads(call, model, known, write):
    spelled = [
        ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"), ("lora_A", "lora_B"),
        ("lora.down.weight", "lora.up.weight"), ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    ]  # fmt: skip
    for down, up in spelled:
        a, b = pair(model, known, WIDE).values()
        tensors = {f"{WIDE}.{down}": a, f"{WIDE}.{up}": b}
        gap, changed = gap_to_stock(call, model, tensors, write("spelled.safetensors", tensors))
        assert changed > 0.01, down
        assert gap < 1e-6, down


def test_a_file_of_another_model_is_refused_whatever_is_asked_for(call, model, write):
    tensors = {
        "diffusion_model.elsewhere.lora_A.weight": torch.zeros(2, 4),
        "diffusion_model.elsewhere.lora_B.weight": torch.zeros(4, 2),
    }
    file = write("other.safetensors", tensors)
    for skip in (False, True):
        with pytest.raises(HYWUError, match="connect the model that it is for"):
            call.HYWULoadLoRA(file, model, skip_missing=skip)


def test_our_own_files_are_read_as_they_were_written(call, model, base):
    pairs = {f"{BLOCK}.attn.qkv": (torch.randn(1, 2, 128), torch.randn(1, 384, 2))}
    lora = GeneratedLoRA.from_pairs(pairs, 2.0, provenance={"base": "SD3"})
    lora.save(base / "output" / "loras" / "own.safetensors", "comfyui")
    for connected in (None, model):
        loaded = call.HYWULoadLoRA("own.safetensors", connected)[0]
        assert torch.equal(loaded[f"{BLOCK}.attn.qkv"].A, pairs[f"{BLOCK}.attn.qkv"][0])
        assert loaded.provenance["base"] == "SD3"
