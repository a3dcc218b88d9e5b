"""Run with ComfyUI's Python: a tiny SD3 that reads texts of a width, and a tiny VAE, for a server's folders.

tiny_sd3.py COMFYUI_TREE MODELS_FOLDER WIDTH
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(tree: str, models: str, width: str) -> None:
    sys.path.insert(0, tree)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import architectures
    import comfy.taesd.taesd
    import torch
    from safetensors.torch import save_file

    sd3 = architectures.ARCHITECTURES["SD3"]
    sd3.options["context_embedder_config"]["params"]["in_features"] = int(width)
    weights = architectures.random_weights(architectures.build("SD3"), torch.float32)
    named = {f"model.diffusion_model.{key}": value for key, value in weights.items()}
    vae = comfy.taesd.taesd.TAESD(latent_channels=16)
    files = {
        "diffusion_models/tiny_sd3": named,
        "vae/tiny": architectures.random_weights(vae, torch.float32),
    }
    for name, tensors in files.items():
        file = Path(models) / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
