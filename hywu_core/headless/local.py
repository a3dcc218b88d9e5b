"""A ComfyUI server on this machine's loopback: started, waited for, always stopped.

Standard library only: dev.py uses it before anything is installed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import HYWUError

WINDOWS = os.name == "nt"
#: The folders under a base directory that ComfyUI reads and writes.
BASE_FOLDERS = ("models", "custom_nodes", "input", "output", "temp", "user")


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get_json(url: str, timeout: float = 5.0) -> Any:
    """GET a JSON document from loopback, whatever proxy the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=timeout) as answer:
        return json.load(answer)


def _end_with_parent() -> None:
    """Linux: the server gets SIGTERM even when the process that started it is killed outright."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


class LocalServer:
    """A ComfyUI server process; `with LocalServer(python, tree, base) as server: server.url`.

    `python` runs `tree`/main.py on the CPU. `base` is its base directory: models, custom nodes, inputs,
    outputs, user data and the database lie there, and nothing is written to `tree`. Its output goes to
    `base`/server.log. Entering waits until the server answers; leaving always stops it. `arguments`
    replace `--cpu`. Raises HYWUError with the end of the log when it doesn't start.
    """

    def __init__(
        self,
        python: str | Path,
        tree: str | Path,
        base: str | Path,
        *,
        port: int | None = None,
        arguments: Sequence[str] = ("--cpu",),
    ) -> None:
        self.python, self.tree, self.base = Path(python), Path(tree), Path(base)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.base / "server.log"
        self.arguments = list(arguments)
        self.seconds_to_start = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The command line that starts the server."""
        database = (self.base / "user" / "comfyui.db").as_posix()
        return [
            *(str(self.python), str(self.tree / "main.py")),
            *("--listen", "127.0.0.1", "--port", str(self.port)),
            *("--base-directory", str(self.base), "--database-url", f"sqlite:///{database}"),
            # Without the nodes of paid services the frontend also asks nothing of the internet.
            *("--disable-auto-launch", "--disable-api-nodes"),
            *self.arguments,
        ]

    def start(self, timeout: float = 240.0) -> LocalServer:
        """Start the process and wait, up to `timeout` seconds, until it answers."""
        for name in BASE_FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        self._spawn()
        try:
            while time.monotonic() - started < timeout and self.process.poll() is None:
                if self._answers():
                    self.seconds_to_start = time.monotonic() - started
                    return self
                time.sleep(0.1)
            code = self.process.poll()
        except BaseException:
            self.stop()
            raise
        self.stop()
        why = f"was silent for {timeout:.0f} s" if code is None else f"ended with code {code}"
        raise HYWUError(f"ComfyUI in {self.tree} {why}; the end of {self.log}:\n{self.log_tail()}")

    def _spawn(self) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        environment.pop("PYTHONPATH", None)  # custom nodes must find their own packages without it
        options: dict[str, Any] = {}
        if not WINDOWS:
            options["start_new_session"] = True  # a Ctrl-C is ours: stop() ends it in order
        if sys.platform == "linux":
            options["preexec_fn"] = _end_with_parent
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=self.base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **options,
            )

    def _answers(self) -> bool:
        try:
            get_json(f"{self.url}/system_stats")
        except (OSError, ValueError):  # not listening yet, or another program's port
            return False
        return True

    def stop(self) -> None:
        """Ask the server to end; after ten seconds, end it."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)

    def log_tail(self, lines: int = 40) -> str:
        """The last lines the server wrote."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def __enter__(self) -> LocalServer:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
