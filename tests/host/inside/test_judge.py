"""HY-WU Judge on what is no image: one sentence before anything is kept."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
import torch
from hywu_nodes.hywu_core.errors import HYWUError

BAD = {
    "not finite": torch.full((1, 8, 8, 3), float("nan")),
    "infinite in one value": torch.zeros(1, 8, 8, 3).index_fill(1, torch.tensor([3]), float("inf")),
    "an image is [batch, height, width, 3]": torch.zeros(1, 1, 8, 8, 3),
    "an image is [batch, height, width, 3] ": torch.zeros(8, 8, 3),
    "a batch of 2 images": torch.zeros(2, 8, 8, 3),
    "a batch of 0 images": torch.zeros(0, 8, 8, 3),
    "must be [3, height, width]": torch.zeros(1, 8, 8, 1),
    "must be [3, height, width] ": torch.zeros(1, 0, 8, 3),
}
SAID = {"infinite in one value": "not finite"}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_is_neither_kept_nor_judged(nodes, case):
    items = nodes["HYWUBenchmarkItems"]().read("folder", "samples", 0, 1)["result"][2]
    with pytest.raises(HYWUError) as caught:
        nodes["HYWUJudge"]().judge(
            BAD[case], items[0], "broken", "reference", "auto", folder="judge_bad"
        )
    assert SAID.get(case, case).strip() in str(caught.value)
    assert not list(Path(folder_paths.get_output_directory()).glob("judge_bad/broken/**/*.png"))
