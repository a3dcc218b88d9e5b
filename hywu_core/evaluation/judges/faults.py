"""What an OpenAI-compatible endpoint says against a request, and whom it concerns.

Statuses alone don't tell: 400 is an unknown model, an empty account, an image of something forbidden or
one that is too large, whichever program answers. So its words count as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from ...errors import HYWUError
from ...files import parse_json

#: Worth another try: timeouts, conflicts, too many requests; and whatever is the server's fault.
_PASSING = frozenset({408, 409, 425, 429})
#: No request can succeed: another address, a wrong key, no credit, no right to the model, a wrong URL.
_SETTINGS = frozenset({*range(300, 400), 401, 402, 403, 404, 405, 410})

_CONTENT_WORDS = re.compile(
    r"content.?(filter|policy|management|moderation)|moderation|safety system|flagged|responsible.?ai"
)
_CREDIT_WORDS = re.compile(
    r"insufficient.?(quota|credit|balance|fund)|credit balance|payment required"
)
_ITEM_WORDS = re.compile(
    r"context.?length|too (large|long|many tokens)|above.?max.?length|invalid.?image|image.?parse"
)
_SETTINGS_WORDS = re.compile(
    r"model.?not.?found|does not exist|no such model|unsupported|unknown.?parameter|unrecognized|"
    r"not permitted|api.?key|billing"
)


class Concern(Enum):
    """Whom a fault concerns, which says what follows."""

    CONTENT = "the server declines this content: final"
    ITEM = "this request is too large or unreadable: a failure, not worth another try now"
    SETTINGS = "no request can succeed: the run stops"
    PASSING = "worth another try"
    UNKNOWN = "a failure; several in a row without any answer are settings"


@dataclass(frozen=True)
class Fault:
    """status: of HTTP.

    sentence: the server's.
    words: code and type, in lower case.
    parameter: the one that the server names, or "".
    """

    status: int
    sentence: str
    words: str = ""
    parameter: str = ""

    def __str__(self) -> str:
        return f"HTTP {self.status} {self.sentence}".strip()[:400]

    @property
    def concern(self) -> Concern:
        """Whom it concerns, by its words first."""
        said = f"{self.words} {self.sentence}".lower()
        if 400 <= self.status < 500 and _CONTENT_WORDS.search(said):
            return Concern.CONTENT
        if _CREDIT_WORDS.search(said):
            return Concern.SETTINGS
        if self.status in _PASSING or self.status >= 500:
            return Concern.PASSING
        if self.status in _SETTINGS:
            return Concern.SETTINGS
        if self.status == 413 or _ITEM_WORDS.search(said):
            return Concern.ITEM
        return Concern.SETTINGS if _SETTINGS_WORDS.search(said) else Concern.UNKNOWN

    def names(self, parameter: str) -> bool:
        """Whether the server complains about this parameter of the request."""
        return parameter in (self.parameter, *re.findall(r"\w+", self.sentence))


def read_fault(status: int, body: bytes, location: str | None = None) -> Fault:
    """The fault in an answer.

    location: where a redirect leads, without what may be secret in it.
    """
    text = " ".join(body.decode("utf-8", "replace").split())
    if location:
        parts = urlsplit(location)
        text = f"to {parts.scheme}://{parts.hostname}:{parts.port or ''}".rstrip(":") + parts.path
    try:
        data = parse_json(body, "the answer", dict, finite=False)
    except HYWUError:
        return Fault(status, text)
    return fault_of(data, status) or Fault(status, text)


def fault_of(data: dict[str, Any], status: int) -> Fault | None:
    """The fault that a JSON answer holds; None without one.

    status: unless it says another itself.
    """
    error = data.get("error", data.get("detail"))
    if isinstance(error, str):
        return Fault(status, error)
    if not isinstance(error, dict):
        return None
    code, kind = error.get("code"), error.get("type")
    if isinstance(code, int) and 400 <= code < 600:
        status = code
    sentence = error.get("message")
    parameter = error.get("param")
    return Fault(
        status,
        sentence if isinstance(sentence, str) else "",
        " ".join(word for word in (code, kind) if isinstance(word, str)).lower(),
        parameter if isinstance(parameter, str) else "",
    )
