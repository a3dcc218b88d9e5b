"""What an official folder says of itself: ``config.json`` and ``generation_config.json``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ...errors import HYWUError
from ...files import read_json

MODEL_TYPE = "hunyuan_image_3_moe"
#: Most layers of a network that is read; the release has 32.
MOST = 4096


@dataclass(frozen=True)
class VAEConfig:
    """channels: width of each level.

    scaling_factor, shift_factor: what latents are sampled in.
    """

    channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    spatial_factor: int
    temporal_factor: int
    scaling_factor: float
    shift_factor: float

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> VAEConfig:
        return cls(
            tuple(map(int, data["block_out_channels"])),
            int(data["layers_per_block"]),
            int(data["latent_channels"]),
            int(data["ffactor_spatial"]),
            int(data["ffactor_temporal"]),
            float(data["scaling_factor"]),
            float(data.get("shift_factor") or 0.0),
        )


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP2 tower, its image processor and the aligner's width."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_patches: int
    patch_size: int
    activation: str
    eps: float
    max_patches: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int

    @classmethod
    def read(cls, vit: Mapping[str, Any], processor: Mapping[str, Any]) -> VisionConfig:
        return cls(
            int(vit["hidden_size"]),
            int(vit["intermediate_size"]),
            int(vit["num_hidden_layers"]),
            int(vit["num_attention_heads"]),
            int(vit["num_patches"]),
            int(vit["patch_size"]),
            str(vit["hidden_act"]),
            float(vit["layer_norm_eps"]),
            int(processor["max_num_patches"]),
            tuple(map(float, processor["image_mean"])),
            tuple(map(float, processor["image_std"])),
            int(processor["resample"]),
        )


@dataclass(frozen=True)
class GenerationSettings:
    """Defaults of the folder's ``generation_config.json``; max_length counts the whole sequence."""

    template: str
    system_prompt: str
    steps: int
    guidance: float
    flow_shift: float
    drop_think: bool
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    max_length: int

    @classmethod
    def read(cls, data: Mapping[str, Any], max_positions: int) -> GenerationSettings:
        return cls(
            str(data.get("sequence_template", "instruct")),
            str(data.get("use_system_prompt") or ""),
            int(data.get("diff_infer_steps", 50)),
            float(data.get("diff_guidance_scale", 2.5)),
            float(data.get("flow_shift", 3.0)),
            bool(data.get("drop_think", False)),
            bool(data.get("do_sample", True)),
            float(data.get("temperature", 1.0)),
            float(data.get("top_p", 1.0)),
            int(data.get("top_k", 0)),
            min(int(data.get("max_length", max_positions)), max_positions),
        )


@dataclass(frozen=True)
class HunyuanConfig:
    """Sizes of one checkpoint. Per layer: expert_widths, top_k and shared_experts."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    expert_widths: tuple[int, ...]
    top_k: tuple[int, ...]
    shared_experts: tuple[int, ...]
    normalize_top_k: bool
    eps: float
    rope_theta: float
    max_positions: int
    vocab_size: int
    image_base_size: int
    patch_hidden: int
    distilled: bool
    meanflow: bool
    vae: VAEConfig
    vision: VisionConfig

    @property
    def factor(self) -> int:
        """Pixels of one image token's side."""
        return self.vae.spatial_factor

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HunyuanConfig:
        """Read an official ``config.json``.

        Raises HYWUError on another model, a missing key, or a variant that this engine lacks.
        """
        if data.get("model_type") != MODEL_TYPE:
            raise HYWUError(
                f"model_type is {data.get('model_type')!r}, HunyuanImage-3 has {MODEL_TYPE!r}; choose "
                "the folder of HunyuanImage-3.0-Instruct."
            )
        with _values():
            layers = int(data["num_hidden_layers"])
            if not 0 < layers <= MOST:  # before lists of this length are made
                raise ValueError(f"num_hidden_layers {layers:.4g}")
            config = cls(
                int(data["hidden_size"]),
                layers,
                int(data["num_attention_heads"]),
                int(data["num_key_value_heads"]),
                int(data["attention_head_dim"]),
                _same(data["num_experts"], layers, "num_experts"),
                _per_layer(data["moe_intermediate_size"], layers, "moe_intermediate_size"),
                _per_layer(data["moe_topk"], layers, "moe_topk"),
                _per_layer(data["num_shared_expert"], layers, "num_shared_expert"),
                bool(data["norm_topk_prob"]),
                float(data["rms_norm_eps"]),
                float(data["rope_theta"]),
                int(data["max_position_embeddings"]),
                int(data["vocab_size"]),
                int(data["image_base_size"]),
                int(data["patch_embed_hidden_dim"]),
                bool(data.get("cfg_distilled", False)),
                bool(data.get("use_meanflow", False)),
                VAEConfig.read(data["vae"]),
                VisionConfig.read(data["vit"], data["vit_processor"]),
            )
        _check_variant(data)
        _check_range(config)
        _check_sizes(config)
        return config

    def counts(self) -> dict[str, tuple[str, int]]:
        """Pattern of names in the files -> (the key that says how many, how many)."""
        return {
            r"model\.layers\.(\d+)\.": ("num_hidden_layers", self.num_layers),
            r"model\.layers\.0\.mlp\.experts\.(\d+)\.": ("num_experts", self.num_experts),
            r"vision_model\.encoder\.layers\.(\d+)\.": (
                "vit's num_hidden_layers",
                self.vision.num_layers,
            ),
            r"vae\.encoder\.down\.(\d+)\.": ("vae's block_out_channels", len(self.vae.channels)),
            r"vae\.encoder\.down\.0\.block\.(\d+)\.": (
                "vae's layers_per_block",
                self.vae.layers_per_block,
            ),
        }


#: key -> the value this engine computes; another one is another network
_VARIANT = {
    "use_mixed_mlp_moe": True,
    "moe_layer_num_skipped": 0,
    "use_qk_norm": True,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_type": "2d",
    "patch_size": 1,
    "img_proj_type": "unet",
    "cond_image_type": "vae_vit",
    "cond_token_attn_type": "joint_full",
    "tie_word_embeddings": False,
    "use_cla": False,
}


def _check_variant(data: Mapping[str, Any]) -> None:
    for key, value in _VARIANT.items():
        if key in data and data[key] != value:
            raise HYWUError(
                f"{key} is {data[key]!r}, this engine computes {value!r}; only checkpoints of "
                "HunyuanImage-3.0's own structure run."
            )


def _check_range(config: Any) -> None:
    """HYWUError on a whole number that no network has: it would be allocated, or looped over."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            _check_range(value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not 0 <= number < 1 << 31:
                shown = f"{number}" if abs(number) < 10**20 else "a number of many digits"
                raise HYWUError(f"{field.name} is {shown}; download config.json again.")


def _check_sizes(config: HunyuanConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise HYWUError(
            f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads "
            f"{config.num_kv_heads}; download config.json again."
        )
    if max(config.top_k) > config.num_experts:
        raise HYWUError(
            f"moe_topk {max(config.top_k)} is more than num_experts {config.num_experts}; download "
            "config.json again."
        )


def _per_layer(value: Any, layers: int, key: str) -> tuple[int, ...]:
    """A number for all layers, or a list with one per layer."""
    if isinstance(value, list):
        if len(value) != layers:
            raise HYWUError(
                f"{key} lists {len(value)} values for num_hidden_layers {layers}; download config.json "
                "again."
            )
        return tuple(map(int, value))
    return (int(value),) * layers


def _same(value: Any, layers: int, key: str) -> int:
    """One number for all layers."""
    values = set(_per_layer(value, layers, key))
    if len(values) != 1:
        raise HYWUError(
            f"{key} differs between layers ({sorted(values)}); this engine needs one number."
        )
    return values.pop()


@contextlib.contextmanager
def _values() -> Iterator[None]:
    try:
        yield
    except HYWUError:
        raise
    except KeyError as error:
        raise HYWUError(f"the key {error} is missing; download it again.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise HYWUError(f"a value is not of its type ({error}); download it again.") from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the folder. Raises HYWUError naming it."""
    if not path.is_file():
        raise HYWUError(
            f"{path.parent}: no {path.name}; this is not a HunyuanImage-3 folder, or its download is "
            "not complete."
        )
    return read_json(path, dict, "download it again")
