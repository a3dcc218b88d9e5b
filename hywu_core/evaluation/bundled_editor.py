"""The bundled engine as an editor for benchmarks: one frozen base model, four ways to adapt it."""

from __future__ import annotations

STRATEGIES = ("hywu", "shared", "single", "none")
