"""The GSB voting page inside ComfyUI, at /hywu/gsb/: sessions lie in user/hywu/gsb/NAME."""

from __future__ import annotations

import logging
from pathlib import Path

from ...hywu_core.errors import HYWUError
from ...hywu_core.evaluation.gsb.server import routes
from ...hywu_core.evaluation.gsb.store import Store

log = logging.getLogger(__name__)
_open: dict[str, Store] = {}


def register() -> None:
    """Add the routes to ComfyUI's server. Called once, when ComfyUI loads the extension."""
    import folder_paths
    from server import PromptServer

    root = Path(folder_paths.get_user_directory()) / "hywu" / "gsb"

    def find(name: str) -> Store | None:
        if name not in _open:
            listed = {p.name for p in root.iterdir() if p.is_dir()} if root.is_dir() else set()
            if name not in listed or name.startswith("."):
                return None
            try:
                _open[name] = Store(root / name)
            except HYWUError as error:
                log.warning("HY-WU: %s", error)
                return None
        return _open[name]

    # Which host names ComfyUI answers to is its user's choice (--listen); Origin is still checked.
    for method, path, handler in routes(find, "/hywu/gsb", None):
        PromptServer.instance.routes.route(method, path)(handler)
