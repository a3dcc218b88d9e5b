"""A tiny checkpoint with random weights in the hub's form, and a generator for it.

The whole path can be tried with it in seconds, without 166 GB of weights; its images are noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...condition import OFFICIAL_PART
from ...errors import need
from ...files import atomic_folder, atomic_path, write_json, write_text
from ...generator.config import GeneratorConfig
from ...generator.model import ParameterGenerator
from ...generator.official import save_official
from ...layout import LoRALayout, Module, Stack
from . import vision
from .checkpoint import INDEX, stored_tensors
from .config import HunyuanConfig
from .embed import Aligner
from .images import buckets
from .model import HunyuanImage3
from .system_prompt import FILE
from .vae import VAE

LAYERS, HIDDEN, HEAD, EXPERTS, WIDTH = 3, 64, 16, 8, 48
BASE, SHARDS = 256, 3
SYSTEM = "You edit images. Say what you change before you change it."

_SPECIAL = (
    "<|endoftext|>", "<|startoftext|>", "<boi>", "<eoi>", "<img>", "<pad>", "<cfg>", "<timestep>",
    "<timestep_r>", "<guidance>", "<joint_img_sep>", "<recaption>", "</recaption>", "<think>", "</think>",
    "<answer>", "</answer>",
)  # fmt: skip


def write_tiny(path: Path, overwrite: bool = False, seed: int = 0, distilled: bool = False) -> Path:
    """Write ``base/`` and ``generator/`` into a folder, which appears whole or not at all.

    distilled: a base that reads the guidance, as HunyuanImage-3.0-Instruct-Distil.
    Returns the folder.
    """
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with atomic_folder(path, overwrite) as new:
            _write_base(new / "base", distilled)
            _write_generator(new / "generator")
    finally:
        torch.random.set_rng_state(torch_state)
    return path


def _write_base(folder: Path, distilled: bool) -> None:
    folder.mkdir()
    ids = _write_tokenizer(folder)
    data = _config(ids, distilled)
    write_json(folder / "config.json", data)
    write_json(folder / "generation_config.json", _GENERATION)
    write_text(folder / FILE, f"unified_system_prompt_en = {SYSTEM!r}\n")
    config = HunyuanConfig.from_json(data)
    parts = {
        "": HunyuanImage3(config),
        "vae.": VAE(config.vae),
        "vision_aligner.": Aligner(config.vision.hidden_size, config.hidden_size),
        vision.PREFIX: vision.build_tower(config.vision),
    }
    tensors: dict[str, Tensor] = {}
    for prefix, module in parts.items():
        tensors |= _stored(module, prefix)
    names, index = sorted(tensors), {}
    for i in range(SHARDS):
        file = f"model-{i + 1:04d}-of-{SHARDS:04d}.safetensors"
        share = names[i::SHARDS]
        with atomic_path(folder / file) as part:
            save_file({n: tensors[n] for n in share}, part, metadata={"format": "pt"})
        index |= dict.fromkeys(share, file)
    size = sum(t.nbytes for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})


@torch.no_grad()
def _stored(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The module's tensors as they lie in a folder, in bfloat16."""
    parameters = dict(module.named_parameters())
    tensors = {}
    for name, stored in stored_tensors(module, prefix).items():
        value = torch.empty(stored.shape)
        for slot in stored.slots:
            parameter = parameters[slot.parameter]
            piece = parameter if slot.expert is None else parameter[slot.expert]
            (value if slot.rows is None else value[slot.rows]).copy_(piece)
        tensors[name] = value.bfloat16()
    return tensors


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer of bytes. The last ratios stand apart, as in the release. Returns the special ids."""
    library = need("tokenizers", "to write a tokenizer")
    letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    model = library.models.BPE({letter: i for i, letter in enumerate(letters)}, [])
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    count = len(buckets(BASE))
    ratios = [f"<img_ratio_{i}>" for i in range(count)]
    words = [*_SPECIAL, f"<img_size_{BASE}>", *ratios[:-4], "<pos_x_0>", "<pos_x_1>", *ratios[-4:]]
    tokenizer.add_special_tokens(words)
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    settings = {**marks, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", settings)
    return {word: tokenizer.token_to_id(word) for word in words}


_GENERATION = {
    "bot_task": "think_recaption",
    "use_system_prompt": "en_unified",
    "sequence_template": "instruct",
    "diff_infer_steps": 8,
    "diff_guidance_scale": 2.5,
    "flow_shift": 3.0,
    "drop_think": False,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": 1024,
    "max_length": 4096,
}


def _config(ids: dict[str, int], distilled: bool) -> dict[str, Any]:
    vocabulary = -(-(max(ids.values()) + 1) // 32) * 32
    return {
        "architectures": ["HunyuanImage3ForCausalMM"],
        "model_type": "hunyuan_image_3_moe",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_head_dim": HEAD,
        "intermediate_size": WIDTH,
        "moe_intermediate_size": [WIDTH] * LAYERS,
        "moe_topk": [2] * LAYERS,
        "num_experts": EXPERTS,
        "num_shared_expert": [1] * LAYERS,
        "moe_layer_num_skipped": 0,
        "use_mixed_mlp_moe": True,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_type": "2d",
        "max_position_embeddings": 4096,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "bos_token_id": ids["<|startoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<pad>"],
        "image_base_size": BASE,
        "vae_downsample_factor": [16, 16],
        "patch_size": 1,
        "patch_embed_hidden_dim": 32,
        "img_proj_type": "unet",
        "cond_image_type": "vae_vit",
        "cond_token_attn_type": "joint_full",
        "cfg_distilled": distilled,
        "use_meanflow": distilled,
        "vae": {
            "block_out_channels": [32] * 5,
            "layers_per_block": 1,
            "latent_channels": 8,
            "ffactor_spatial": 16,
            "ffactor_temporal": 4,
            "scaling_factor": 0.562679178327931,
        },
        "vit": {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_patches": 16,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "vit_processor": {
            "max_num_patches": 64,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 2,
        },
        "vit_aligner": {"projector_type": "mlp_gelu", "depth": 2},
    }


def _write_generator(folder: Path) -> None:
    """An official-form generator for the tiny base."""
    qkv = (4 + 2 * 2) * HEAD
    linear = {
        "self_attn.qkv_proj": (HIDDEN, qkv),
        "self_attn.o_proj": (4 * HEAD, HIDDEN),
        "mlp.shared_mlp.gate_and_up_proj": (HIDDEN, 2 * WIDTH),
        "mlp.shared_mlp.down_proj": (WIDTH, HIDDEN),
    }
    experts = {"w1": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN), "w3": (HIDDEN, WIDTH)}
    modules = (
        *(Module(name, *sizes) for name, sizes in linear.items()),
        *(Module(f"mlp.experts.{name}", *sizes, EXPERTS) for name, sizes in experts.items()),
    )
    stack = Stack(tuple(f"model.layers.{i}" for i in range(LAYERS)), modules)
    config = GeneratorConfig(
        layout=LoRALayout((stack,), rank=4, alpha=8.0),
        condition={OFFICIAL_PART: HIDDEN},
        token_dim=32,
        dim_accumulation=4,
        d_model=64,
        head_dim=16,
        num_blocks=1,
        encoder={"type": "hunyuan_image_3"},
    )
    generator = ParameterGenerator(config)
    # a fresh generator's LoRAs change nothing; these shall
    nn.init.normal_(generator.model.proj_out_B.weight, std=0.02)
    save_official(generator, folder, dtype=torch.bfloat16)
