"""A node's place on the page before it ends: the text that it is writing, and what is kept of one cut off.

Event ``hywu_text``: ``{"node": id, "output": {"text": [str], "hywu_warnings": [str]}}``, to whoever queued the
prompt; the web extension draws it as it draws results (see nodes/ui.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from ...hywu_core.errors import HYWUError, get_logger
from ...hywu_core.files import write_text
from . import paths

log = get_logger(__name__)

#: Seconds between two looks at a growing text.
PAUSE = 0.25
#: Folder and start of the name of texts that were cut off, below the output folder.
KEPT = "thoughts/thought"


def server() -> Any:
    """ComfyUI's server; None where nodes run without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


class Page:
    """Of one node.

    node: its id in the prompt; None where nobody looks on.
    """

    def __init__(self, node: str | None) -> None:
        self.node, self._next = node, 0.0

    def grows(self, text: str) -> None:
        """Draw a text that is being written, now and then."""
        if time.monotonic() >= self._next:
            self._send(text)
            self._next = time.monotonic() + PAUSE

    def cut_off(self, text: str, tokens: int) -> None:
        """Keep a text that ends early: in a file of the output folder, in the log and on the node."""
        if not text:
            return
        try:
            name = paths.save_new(KEPT, ".txt", lambda path: write_text(path, text, False))
            where = (
                f"is kept in {name} of the output folder; it can be pasted into cot of Edit Prompt"
            )
        except (OSError, HYWUError) as error:
            where = f"is in ComfyUI's log only ({error})"
        said = f"Ended early after {tokens:,} tokens; what was written {where}."
        log.warning("HY-WU: %s\n%s", said, text)
        self._send(text, [said])

    def _send(self, text: str, warnings: Sequence[str] = ()) -> None:
        found = server()
        if found is not None and self.node is not None:
            output = {"text": [text], "hywu_warnings": list(warnings)}
            found.send_sync("hywu_text", {"node": self.node, "output": output}, found.client_id)
