"""Any base model: LoRAs on random-weight checkpoints of real architectures, by stock loaders and samplers."""

from __future__ import annotations

import gc
import json

import architectures
import comfy.lora
import comfy.model_management as mm
import folder_paths
import pytest
import torch
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.layout import LoRALayout
from hywu_nodes.hywu_core.lora import GeneratedLoRA
from hywu_nodes.hywu_core.training.base import frozen_digest
from safetensors.torch import load_file, save_file

import nodes as stock

#: name -> (class in ComfyUI, number of stacks at least)
EXPECTED = {
    "SD 1.5": ("BaseModel", 2),
    "SDXL": ("SDXL", 1),
    "SD3": ("SD3", 2),
    "Flux": ("Flux", 2),
    "Chroma": ("Chroma", 2),
    "Qwen-Image": ("QwenImage", 1),
    "Wan 2.1": ("WAN21", 1),
    "HunyuanImage 2.1": ("HunyuanImage21", 2),
    "Lumina 2": ("Lumina2", 2),
    "Z-Image": ("Lumina2", 2),
}
SMALL = [name for name, kind in architectures.ARCHITECTURES.items() if kind.small]
#: Largest difference of two latents that count as equal, as a share of the largest value.
EQUAL = 1e-5
FP8 = "fp8_e4m3fn"
#: Strength at which most of the LoRA is below half a step of fp8.
FAINT = 0.05


class Model:
    """A checkpoint of one architecture by the stock loader, its layout and a LoRA for it."""

    def __init__(self, name: str, folder) -> None:
        self.name, self.folder, self.files = name, folder, []
        weights = architectures.random_weights(architectures.build(name), torch.float32)
        self.file = self.write("base", weights)
        del weights
        self.model = self.load(self.file)
        self.network = self.model.model.diffusion_model
        self.layout = LoRALayout.of(self.network, 2)
        self.sample = architectures.sampler(name, stock.common_ksampler)
        self.both = random_lora(self.layout)
        self.lora = self.both.select(0)

    def write(self, name: str, weights: dict) -> str:
        tensors = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
        path = self.folder / f"architecture_{name}.safetensors"
        save_file(tensors, path)
        self.files.append(path)
        folder_paths.filename_list_cache.clear()
        return path.name

    @staticmethod
    def load(file: str, dtype: str = "default"):
        return stock.UNETLoader().load_unet(file, dtype)[0]


def random_lora(layout: LoRALayout) -> GeneratedLoRA:
    """Two, each moving every target's output by about a fifth of its size."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(2, *shape, generator=generator)

    pairs = {
        t.path: (
            draw(layout.rank, t.module.in_features) * t.module.in_features**-0.5,
            draw(t.module.out_features, layout.rank) * 0.15,
        )
        for t in layout.targets()
    }
    layers = {t.path: layout.stacks[t.stack].layers[t.layer] for t in layout.targets()}
    conv = {t.path for t in layout.targets() if t.module.conv}
    return GeneratedLoRA.from_pairs(pairs, layout.alpha, layers=layers, conv=conv)


@pytest.fixture(scope="module", params=EXPECTED)
def made(request, base):
    folder = base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        model = Model(request.param, folder)
    yield model
    files = model.files
    del model
    mm.unload_all_models()
    gc.collect()
    for file in files:
        file.unlink()  # gigabytes


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def apply(call):
    def run(model, lora, strength=1.0, mode="unmerged"):
        return call.HYWUApplyLoRA(model, lora, strength, mode)[0]

    return run


@pytest.fixture(scope="module")
def saved(made, base):
    """The LoRA as a file for ComfyUI's own loaders."""
    path = base / "models" / "loras" / "architecture_lora.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    made.lora.save(path, format="comfyui", overwrite=True)
    made.files.append(path)
    folder_paths.filename_list_cache.clear()
    return path


def gap(one, two) -> float:
    return float((one - two).abs().max() / two.abs().max())


def test_every_target_is_one_that_comfyuis_own_lora_keys_lead_to(made):
    kind, stacks = EXPECTED[made.name]
    assert type(made.model.model).__name__ == kind
    assert len(made.layout.stacks) >= stacks
    known = comfy.lora.model_lora_keys_unet(made.model.model, {})
    weights = dict(made.model.model.named_parameters())
    for target in made.layout.targets():
        shape = weights[known[f"diffusion_model.{target.path}"]].flatten(1).shape
        assert shape == (target.module.out_features, target.module.in_features)


def test_model_layout_says_what_is_so(made, call):
    table, text = call.HYWUModelLayout(made.model, 16, "XS", 256, 2)
    report = json.loads(text)
    stacks = report["stacks"]
    assert report["targets"] == len(made.lora)
    assert report["tokens"] == sum(s["tokens_per_layer"] * len(s["layers"]) for s in stacks)
    assert report["lora_values"] == made.layout.with_rank(16).num_values
    assert 1e6 < report["generator"]["parameters"] < 1e7
    assert report["generator"]["seconds"] > 0
    assert table.count("\n") > len(made.layout.stacks)


def test_names_that_have_lost_their_dots_are_read_with_the_models_help(made, call, saved, base):
    flat = {}
    for key, value in load_file(saved).items():
        path, _, end = key.removeprefix("diffusion_model.").partition(".lora_")
        path, end = (path, f".lora_{end}") if end else (path.removesuffix(".alpha"), ".alpha")
        flat[f"lora_unet_{path.replace('.', '_')}{end}"] = value
    file = saved.with_name("architecture_flat.safetensors")
    save_file(flat, file)
    made.files.append(file)
    loaded = call.HYWULoadLoRA(file.name, made.model)[0]
    assert set(loaded) == set(made.lora)
    for path in made.lora:
        for mine, theirs in zip(loaded[path], made.lora[path], strict=True):
            assert torch.equal(mine, theirs)
    with pytest.raises(HYWUError, match="connect the MODEL"):
        call.HYWULoadLoRA(file.name)


def test_a_generated_lora_acts_like_the_same_lora_from_a_file(made, saved, apply):
    before, plain = frozen_digest(made.network), made.sample(made.model)
    assert torch.isfinite(plain).all()
    loader = stock.LoraLoaderModelOnly()
    from_file = made.sample(loader.load_lora_model_only(made.model, saved.name, 1.0)[0])
    unmerged = made.sample(apply(made.model, made.lora))
    assert gap(unmerged, plain) > 10 * EQUAL
    assert gap(unmerged, from_file) < EQUAL
    assert gap(made.sample(apply(made.model, made.lora, mode="merge")), from_file) < EQUAL
    # two runs of one model: on some CPUs products round by where in memory their operands lie
    assert gap(made.sample(made.model), plain) < EQUAL / 10
    assert frozen_digest(made.network) == before


def test_each_image_of_a_batch_gets_its_own(made, apply):
    batch = made.sample(apply(made.model, made.both), batch=2)
    for i in range(2):
        alone = made.sample(apply(made.model, made.both.select(i)), batch=2)
        assert gap(batch[i : i + 1], alone[i : i + 1]) < EQUAL


def test_unmerged_is_exact_on_an_fp8_copy(made, apply):
    """Against the same rounded weights in float32 with the LoRA merged."""
    if made.name not in SMALL:
        return  # two more copies of gigabytes
    model = made.load(made.file, FP8)
    # what the loader made of the file: it leaves some weights as they were
    weights = model.model.diffusion_model.state_dict()
    assert sum(value.dtype == torch.float8_e4m3fn for value in weights.values()) > 0
    rounded = made.write("rounded", {key: value.float() for key, value in weights.items()})
    reference, plain = made.load(rounded), made.sample(model)
    exact = made.sample(apply(reference, made.lora, FAINT, "merge"))
    effect = gap(exact, plain)
    assert gap(plain, made.sample(reference)) < EQUAL
    assert effect > 10 * EQUAL
    assert gap(made.sample(apply(model, made.lora, FAINT)), exact) < EQUAL
    # most of a faint LoRA is below half a step of fp8
    assert gap(made.sample(apply(model, made.lora, FAINT, "merge")), exact) > 0.5 * effect
