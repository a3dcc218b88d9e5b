"""HunyuanImage-3 as ComfyUI's MODEL and VAE, with what makes prompts for it."""
