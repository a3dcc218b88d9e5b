"""The GSB voting page inside ComfyUI, at /hywu/gsb/: sessions lie in user/hywu/gsb/NAME."""

from __future__ import annotations

from pathlib import Path

from ...hywu_core.errors import HYWUError, get_logger
from .page import server

log = get_logger(__name__)


def register() -> None:
    """Add the routes to ComfyUI's server, where there is one. Never keeps the nodes from loading."""
    instance = server()
    if instance is None:
        return
    try:
        _register(instance)
    except (ImportError, HYWUError) as error:
        log.warning("HY-WU: the voting page is off: %s", error)


def _register(server: object) -> None:
    import folder_paths

    from ...hywu_core.evaluation.gsb.server import LOOPBACK, routes
    from ...hywu_core.evaluation.gsb.store import Store

    root = Path(folder_paths.get_user_directory()) / "hywu" / "gsb"
    opened: dict[str, Store] = {}

    def find(name: str) -> Store | None:
        if name in opened:
            if opened[name].is_current():
                return opened[name]
            del opened[name]
        listed = {p.name for p in root.iterdir() if p.is_dir()} if root.is_dir() else set()
        if name not in listed or name.startswith("."):
            return None
        try:
            opened[name] = Store(root / name)
        except HYWUError as error:
            log.warning("HY-WU: %s", error)
        return opened.get(name)

    # On loopback a foreign host name means a rebound address; whoever listens on other addresses
    # chose the names himself.
    hosts = LOOPBACK if _listens_on_loopback() else None
    for method, path, handler in routes(find, "/hywu/gsb", hosts):
        server.routes.route(method, path)(handler)


def _listens_on_loopback() -> bool:
    import ipaddress

    from comfy.cli_args import args

    try:
        return all(ipaddress.ip_address(a.strip()).is_loopback for a in args.listen.split(","))
    except ValueError:
        return args.listen == "localhost"
