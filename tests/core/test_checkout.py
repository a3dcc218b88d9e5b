"""What a user gets by cloning."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: All files of a checkout together, in bytes.
LIMIT = 48_000_000


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="asks git which files belong to the checkout",
)
def test_a_checkout_with_all_its_data_is_small():
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    sizes = {file.relative_to(ROOT).as_posix(): file.stat().st_size for file in files}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    assert len(sizes) > 100
    assert sum(sizes.values()) < LIMIT, f"{sum(sizes.values()):,} bytes; the largest: {largest}"
