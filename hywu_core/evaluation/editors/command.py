"""Any program as an editor for benchmarks."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import HYWUError
from ...images import load_image, write_image
from ..items import Item
from ..options import Kind, Option
from .base import ITEM_TIMEOUT, WORKERS, EditFailed

_PLACEHOLDER = re.compile(r"\{(source|out|instruction|seed)\}")


@dataclass
class CommandEditor:
    """Runs a program for each item; no shell is involved.

    command: words as for a shell, in which ``{source}`` and ``{out}`` (PNG paths), ``{instruction}`` and
        ``{seed}`` are put in; the program writes ``{out}`` and exits with 0.
    timeout: seconds per item.
    Raises HYWUError when a needed placeholder is missing.
    """

    command: str
    parallel: int = 1
    timeout: float = 600.0
    _words: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            self._words = shlex.split(self.command)
        except ValueError as error:
            raise HYWUError(f"The editor's command can't be split into words ({error}).") from error
        present = set(_PLACEHOLDER.findall(self.command))
        if missing := {"source", "out", "instruction"} - present:
            names = ", ".join(f"{{{name}}}" for name in sorted(missing))
            raise HYWUError(f"The editor's command lacks {names}.")

    def describe(self) -> dict[str, Any]:
        return {"kind": "command", "command": self.command}

    def edit(self, source: Image.Image, item: Item, seed: int) -> Image.Image:
        with tempfile.TemporaryDirectory(prefix="hywu_edit_") as folder:
            given, out = Path(folder) / "source.png", Path(folder) / "out.png"
            write_image(source, given)
            values = {"source": given, "out": out, "instruction": item.instruction, "seed": seed}
            self._run([self._fill(word, values) for word in self._words])
            if not out.is_file():
                raise EditFailed("the command wrote no image")
            return load_image(out)

    @staticmethod
    def _fill(word: str, values: Mapping[str, object]) -> str:
        # One pass: an instruction that holds "{out}" stays as it is
        return _PLACEHOLDER.sub(lambda match: str(values[match[1]]), word)

    def _run(self, words: list[str]) -> None:
        try:
            done = subprocess.run(words, capture_output=True, timeout=self.timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise EditFailed(f"the command took longer than {self.timeout:g} s") from error
        except (OSError, ValueError) as error:
            raise EditFailed(f"the command can't be run ({error})") from error
        if done.returncode:
            text = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise EditFailed(
                f"the command ended with {done.returncode}: {text[-1] if text else ''}"
            )


KIND = Kind(
    "--editor",
    "command",
    "any program",
    lambda command, workers, item_timeout: CommandEditor(command, workers, item_timeout),
    (
        Option(
            "command",
            "with {source}, {out}, {instruction} and {seed}; no shell",
            needed="",
        ),
        WORKERS,
        ITEM_TIMEOUT,
    ),
)
