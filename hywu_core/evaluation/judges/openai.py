"""A judge at an OpenAI-compatible endpoint (`/chat/completions`), with the standard library alone.

The key is read from an environment variable, sent to that endpoint only, and appears in no file, log
or error.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ...errors import HYWUError
from ...files import parse_json
from ...images import encode_image
from ..options import Kind, Option
from .base import MAX_TOKENS, Failure, JudgeRequest, Refusal, Reply

#: Worth another try: timeouts, conflicts, too many requests, and whatever is the server's fault.
RETRIED = frozenset({408, 409, 425, 429})
#: No request can succeed: a wrong key, no right to the model, or a wrong URL or model name.
FATAL = frozenset({401, 403, 404, 405})

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

#: An endpoint that asks to wait longer than this is treated as failing, in seconds.
LONGEST_WAIT = 120.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class RateLimit:
    """At most `per_minute` starts a minute, evenly spaced, shared by threads; 0 is no limit."""

    def __init__(self, per_minute: float) -> None:
        self._gap = 60.0 / per_minute if per_minute > 0 else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Block until a start is due, or until `stop`."""
        if not self._gap:
            return
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + self._gap
        stop.wait(max(0.0, start - time.monotonic()))


@dataclass
class OpenAIJudge:
    """Asks `model` at `url` (the base, usually ending in /v1).

    key_env: environment variable with the key; unset means no Authorization header (a local
    server). retries: further tries after the first; backoff: seconds before the first of them,
    doubled each time, with jitter, unless the server's Retry-After says longer; per_minute: rate
    limit, 0 for none; max_tokens: of an answer; timeout: seconds a request.
    Raises HYWUError on a URL that is not http(s), or a key that would travel unencrypted.
    """

    model: str
    url: str
    key_env: str = "OPENAI_API_KEY"
    parallel: int = 4
    retries: int = 6
    backoff: float = 1.0
    per_minute: float = 0.0
    timeout: float = 120.0
    max_tokens: int = 512
    version: str = field(default="chat-1", init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HYWUError(f"The judge's URL '{self.url}' must begin with http:// or https://.")
        if parts.username or parts.password or parts.query:
            raise HYWUError(
                "The judge's URL holds credentials; put the key in an environment variable."
            )
        if self._key() and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise HYWUError(
                f"{self.url}: the key in {self.key_env} would be sent unencrypted; use https, or "
                f"unset {self.key_env} for a server that needs none."
            )
        self._limit = RateLimit(self.per_minute)
        self._random = random.Random(self.model)
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def name(self) -> str:
        return self.model

    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip()

    def close(self) -> None:
        """Wake every request that waits for its next try, so that an interrupted run ends."""
        self._stop.set()

    def score(self, request: JudgeRequest) -> Reply:
        """Ask, and ask again after passing faults. Raises Failure, Refusal or HYWUError."""
        body = json.dumps(self._body(request)).encode()
        for attempt in range(1, self.retries + 2):
            self._limit.wait(self._stop)
            if self._stop.is_set():
                raise Failure("interrupted")
            fault, wait = self._try(body)
            if isinstance(fault, dict):
                return self._reply(fault, attempt)
            if attempt <= self.retries:
                pause = self.backoff * 2 ** (attempt - 1) * self._random.uniform(0.5, 1.5)
                self._stop.wait(min(max(pause, wait), LONGEST_WAIT))
        raise Failure(f"{fault} ({self.retries + 1} tries)")

    def _body(self, request: JudgeRequest) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.question.prompt}]
        content += [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in request.images
        ]
        return {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }

    def _try(self, body: bytes) -> tuple[dict[str, Any] | str, float]:
        """One request: the answer, or what went wrong and how long the server says to wait."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        target = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(target, body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                answer = parse_json(response.read(), "the endpoint's answer", finite=False)
        except urllib.error.HTTPError as error:
            return self._refused(error), _retry_after(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:
            return (
                f"no answer: {getattr(error, 'reason', None) or error or type(error).__name__}",
                0,
            )
        except HYWUError:
            return "the endpoint's answer is not JSON", 0
        return (answer, 0) if isinstance(answer, dict) else ("the answer is not an object", 0)

    def _refused(self, error: urllib.error.HTTPError) -> str:
        """The text of a passing fault. Raises HYWUError or Refusal for one that stays."""
        detail = ""
        # An overloaded server may stall or hang up in the middle of its complaint
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            detail = error.read(2000).decode("utf-8", "replace").strip()
        if key := self._key():
            detail = detail.replace(key, "***")
        text = f"HTTP {error.code} {detail}".strip()[:300]
        if error.code in FATAL:
            raise HYWUError(
                f"{self.url}: {text}: check the URL, the model '{self.model}' and the key in "
                f"{self.key_env}."
            )
        if error.code in RETRIED or error.code >= 500:
            return text
        raise Refusal(text)

    def _reply(self, answer: dict[str, Any], attempts: int) -> Reply:
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Failure("the endpoint's answer has no choices[0].message") from None
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(str(p.get("text") or "") for p in text if isinstance(p, dict))
        if refusal or choice.get("finish_reason") == "content_filter" or not text:
            raise Refusal(str(refusal or choice.get("finish_reason") or "an empty answer")[:300])
        usage = answer.get("usage") or {}
        return Reply(
            text=str(text),
            model=str(answer.get("model") or ""),
            tokens_in=_count(usage, "prompt_tokens"),
            tokens_out=_count(usage, "completion_tokens"),
            attempts=attempts,
        )


def data_url(image: Image.Image) -> str:
    """The image as PNG in a data URL: pixels exactly as judged."""
    return "data:image/png;base64," + base64.b64encode(encode_image(image)).decode()


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 when there is none."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


#: Environment variable with the endpoint for judges inside a graph. Not a widget: a workflow from
#: elsewhere would choose where the operator's key is sent.
ENDPOINT = "HYWU_JUDGE_URL"
OPENAI = "https://api.openai.com/v1"


def in_graph(model: str) -> OpenAIJudge:
    """The judge inside a ComfyUI graph: the operator's endpoint, one request at a time."""
    if not model.strip():
        raise HYWUError("judge 'openai' needs model, the model's name at the endpoint.")
    url = os.environ.get(ENDPOINT) or OPENAI
    return OpenAIJudge(model.strip(), url, parallel=1, retries=3, timeout=60)


KIND = Kind(
    "--judge",
    "openai",
    "any OpenAI-compatible endpoint",
    OpenAIJudge,
    (
        Option("url", "base URL (%(default)s)", OPENAI),
        Option(
            "model",
            "the model's name there, for instance gpt-4.1",
            needed="the model's name at the endpoint",
        ),
        Option(
            "key_env",
            "environment variable with the key (%(default)s); it is written nowhere",
            "OPENAI_API_KEY",
        ),
        Option("parallel", "requests at once (%(default)s)", 4, int),
        Option("per_minute", "rate limit; 0 for none", 0, float),
        Option("retries", "further tries (%(default)s)", 6, int),
        Option("timeout", "seconds a request (%(default)s)", 120, float),
        MAX_TOKENS,
    ),
)
