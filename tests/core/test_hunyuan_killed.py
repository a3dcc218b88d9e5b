"""`hywu hunyuan quantize` killed outright, whenever it may be, and run again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hunyuan_golden import BASE

from hywu_core.atomic import PART
from hywu_core.bases.hunyuan_image3.checkpoint import INDEX
from hywu_core.bases.hunyuan_image3.quantize import WORK, quantize

#: Forks a process per moment, so that torch is imported once; kills it, looks, and runs it again.
KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    from hywu_core import HYWUError
    from hywu_core.bases.hunyuan_image3 import open_folder
    from hywu_core.bases.hunyuan_image3.quantize import quantize

    torch.set_num_threads(1)
    base, folder, moments = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

    def begun(out):
        process = os.fork()
        if not process:
            quantize(base, out, "nf4")
            os._exit(0)
        return process

    quantize(base, folder / "first", "nf4")  # what it imports
    start = time.monotonic()
    assert os.waitpid(begun(folder / "wanted"), 0)[1] == 0
    whole, cut_off = time.monotonic() - start, 0
    random.seed(0)
    for i in range(moments):
        out = folder / f"out{i}"
        process = begun(out)
        time.sleep(random.uniform(0, whole))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if out.exists():
            continue
        cut_off += 1
        try:
            open_folder(out)
        except HYWUError:
            pass
        else:
            raise AssertionError(f"{out} looks whole")
        assert os.waitpid(begun(out), 0)[1] == 0
    print(cut_off)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_killed_at_20_random_moments_and_run_again(tmp_path):
    """Whenever the command is killed, running it again gives the same files byte for byte."""
    moments = 20
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(BASE), str(tmp_path), str(moments)],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > moments // 4, "most were whole before they were killed"

    def contents(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    wanted = contents(tmp_path / "wanted")
    for i in range(moments):
        assert contents(tmp_path / f"out{i}") == wanted
        assert not (tmp_path / f"out{i}{WORK}").exists()


def test_what_a_killed_run_left_beside_its_last_file_goes(tmp_path):
    """Killed when the index was in its place and its temporary folder still there: nothing is written after it."""
    quantize(BASE, tmp_path / "wanted", "nf4")
    work = tmp_path / f"out{WORK}"
    shutil.copytree(tmp_path / "wanted", work)
    (work / f".{INDEX}.abc{PART}").mkdir()
    quantize(BASE, tmp_path / "out", "nf4")
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("out", "wanted")]
    assert names[0] == names[1]
