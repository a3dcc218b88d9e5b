"""The experiment's weights under the names by which the bundled editor finds them."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...errors import HYWUError
from ...files import atomic_path
from .plan import ConflictPlan

#: Largest file and largest folder that a checkout should carry, in bytes.
FILE_LIMIT, FOLDER_LIMIT = 15_000_000, 24_000_000


def bundle(experiment: Path, editor: Path, plan: ConflictPlan, folder: Path) -> list[Path]:
    """Copy editor, generator, Shared and Single LoRAs of the main rank and figures.json to `folder`.

    Returns the files. Raises HYWUError when one is missing or they are larger than a checkout should
    carry; then nothing is written.
    """
    sources = _sources(experiment, editor, plan)
    if missing := [str(path) for path in sources.values() if not path.is_file()]:
        raise HYWUError(
            f"{experiment}: {', '.join(missing)} must be made first: run the same command without "
            "--bundle."
        )
    sizes = {name: path.stat().st_size for name, path in sources.items()}
    odd = [f"{name} has {size:,} bytes" for name, size in sizes.items() if size > FILE_LIMIT]
    if odd or sum(sizes.values()) > FOLDER_LIMIT:
        raise HYWUError(
            f"{', '.join(odd) or 'together they have'} {sum(sizes.values()):,} bytes in all; at most "
            f"{FILE_LIMIT:,} a file and {FOLDER_LIMIT:,} in all may be bundled."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        with atomic_path(folder / name, overwrite=True) as part:
            shutil.copyfile(source, part)
    return [folder / name for name in sources]


def _sources(experiment: Path, editor: Path, plan: ConflictPlan) -> dict[str, Path]:
    rank, weights = plan.main_rank, experiment / "weights"
    return {
        "editor.safetensors": editor,
        "generator.safetensors": weights / f"hywu_r{rank}.safetensors",
        "shared.safetensors": weights / f"shared_r{rank}.safetensors",
        **{
            f"single_{task}.safetensors": weights / f"single_{task}_r{rank}.safetensors"
            for task in plan.tasks
        },
        "figures.json": experiment / "figures.json",
    }
