"""The photographs of the example workflows, in ComfyUI's input folder, where LoadImage looks for them."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import folder_paths

from ...hywu_core.errors import get_logger

log = get_logger(__name__)

SHIPPED = Path(__file__).parents[2] / "workflows" / "inputs"


def offer_inputs() -> None:
    """Copy the photographs that the input folder lacks. A file that is there already is left alone.

    A folder that can't be written is no reason to do without the nodes: it is said in the log.
    """
    folder = Path(folder_paths.get_input_directory())
    for source in sorted(SHIPPED.glob("hywu_*.png")):
        target = folder / source.name
        part = folder / f".{source.name}.{os.getpid()}.part"
        try:
            if target.exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, part)
            os.replace(part, target)
        except OSError as error:
            log.warning("HY-WU: the example photograph %s was not copied: %s", target, error)
            with contextlib.suppress(OSError):
                part.unlink()
