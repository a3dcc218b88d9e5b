"""Base models of our own: what a generated LoRA is applied to without ComfyUI."""
