"""The frontends that browser tests run in."""

from __future__ import annotations

import pytest

#: name -> (the newest frontend on PyPI instead of ComfyUI's own, Nodes 2.0 instead of the canvas).
FRONTENDS = {
    "own": (False, False),
    "newest": (True, False),
    "newest, Nodes 2.0": (True, True),
}
#: For tests of what every user sees.
everywhere = pytest.mark.parametrize("frontend", FRONTENDS)
newest = pytest.mark.parametrize("frontend", [name for name in FRONTENDS if name != "own"])
