"""The SigLIP2 tower of transformers, its image processor, and the names under which its weights lie."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ...errors import HYWUError, need, one_line
from .config import VisionConfig

#: In the checkpoint the tower stands without this part of transformers' names.
PREFIX = "vision_model."
#: The checkpoint's pooling head: read by nothing.
UNUSED = "vision_model.head."


class Patches(NamedTuple):
    """patches float32 ``[N, patch²·3]`` padded to N; mask int ``[N]``; the grid's height and width."""

    patches: Tensor
    mask: Tensor
    height: int
    width: int


def build_tower(config: VisionConfig) -> nn.Module:
    """An empty tower: ``tower(pixel_values, pixel_attention_mask, spatial_shapes)``."""
    transformers = need("transformers", "for HunyuanImage-3's vision tower")
    try:
        siglip = transformers.Siglip2VisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_patches=config.num_patches,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            layer_norm_eps=config.eps,
            vision_use_head=False,
        )
        siglip._attn_implementation = "sdpa"
        tower = transformers.Siglip2VisionModel(siglip)
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        raise HYWUError(
            f"config.json's vit describes no vision tower ({one_line(error)[:200]}); download it again."
        ) from error
    # releases before 5 keep the tower in an attribute of its own and build the head always
    tower = getattr(tower, "vision_model", tower)
    if hasattr(tower, "head"):
        tower.use_head = False
        del tower.head
    return tower.eval()


def image_processor(config: VisionConfig) -> Any:
    transformers = need("transformers", "to cut images into patches for HunyuanImage-3")
    return transformers.Siglip2ImageProcessor(
        patch_size=config.patch_size,
        max_num_patches=config.max_patches,
        image_mean=list(config.mean),
        image_std=list(config.std),
        resample=config.resample,
    )


def grid_of(height: int, width: int, config: VisionConfig) -> tuple[int, int]:
    """Patches of an image of a size: (rows, columns), as the image processor chooses them."""
    module = need(
        "transformers.models.siglip2.image_processing_siglip2",
        "to cut images into patches for HunyuanImage-3",
    )
    size = module.get_image_size_for_max_num_patches(
        height, width, config.patch_size, config.max_patches
    )
    rows, columns = (side // config.patch_size for side in size)
    return rows, columns


def patches_of(image: Image.Image, processor: Any) -> Patches:
    """An RGB image, its aspect kept, as patches."""
    made = processor(images=[image], return_tensors="pt")
    height, width = map(int, np.asarray(made["spatial_shapes"][0]))
    return Patches(made["pixel_values"][0].float(), made["pixel_attention_mask"][0], height, width)


def see(tower: nn.Module, images: list[Patches]) -> Tensor:
    """Tokens of the last layer after its norm ``[n, N, width]``; padding gets tokens too."""
    weight = next(tower.parameters())
    shapes = torch.tensor([[p.height, p.width] for p in images])
    made = tower(
        pixel_values=torch.stack([p.patches for p in images]).to(weight.device, weight.dtype),
        pixel_attention_mask=torch.stack([p.mask for p in images]).to(weight.device),
        spatial_shapes=shapes,
    )
    return made.last_hidden_state
