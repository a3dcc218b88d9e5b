"""HunyuanImage-3.0-Instruct, the base model of the published HY-WU, as own code."""

from .checkpoint import Folder, open_folder
from .pipeline import Pipeline
from .prompts import Prompts, Request
from .thinking import Sampler

__all__ = ["Folder", "Pipeline", "Prompts", "Request", "Sampler", "open_folder"]
