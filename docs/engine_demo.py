"""The engine alone: condition -> generator -> LoRA -> frozen model, on random weights.

`python -m docs.engine_demo` from the checkout. It shows the path and its times, not an edit.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from hywu_core import Condition, GeneratorConfig, LoRALayout, ParameterGenerator, inject
from hywu_core.console import say
