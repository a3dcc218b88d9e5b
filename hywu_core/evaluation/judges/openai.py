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
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ...errors import HYWUError, get_logger
from ...files import parse_json
from ...images import encode_image
from ..options import Kind, Option
from .base import MAX_TOKENS, Failure, JudgeRequest, Refusal, Reply
from .faults import Concern, Fault, fault_of, read_fault

log = get_logger(__name__)

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

#: An endpoint that asks to wait longer than this is treated as failing, in seconds.
LONGEST_WAIT = 120.0
#: Bytes of an answer that are read: one that is longer is none.
LONGEST_ANSWER = 1 << 24

#: Why an answer ended, in the words of several servers, where the limit of its length ended it,
CUT_OFF = frozenset({"length", "max_tokens", "model_length", "max_output_tokens"})
#: where the server broke off,
BROKEN_OFF = frozenset(
    {
        "error",
        "abort",
        "aborted",
        "cancelled",
        "timeout",
        "insufficient_system_resource",
        "incomplete",
    }
)
#: and where it declined.
DECLINED = frozenset(
    {"content_filter", "safety", "refusal", "recitation", "prohibited_content", "blocklist"}
)


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

    key_env: environment variable with the key; unset means no Authorization header (a local server).
    retries: further tries after the first.
    backoff: seconds before the first of them, doubled each time, with jitter, unless the server's Retry-After
        says longer.
    per_minute: rate limit, 0 for none.
    max_tokens: of an answer.
    timeout: seconds per request.
    temperature: of the sampling; None is 0, or the model's own where it can't be set.
    Raises HYWUError on a URL that is not http(s), a key that would travel unencrypted, or none at all.
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
    temperature: float | None = None
    version: str = field(default="chat-1", init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_url()
        if self.temperature:
            self.version += f"-t{self.temperature:g}"
        self._limit = RateLimit(self.per_minute)
        self._random = random.Random(self.model)
        self._opener = urllib.request.build_opener(_NoRedirect)
        # What newer models take under another name, or not at all: found out by asking
        self._settings = {"temperature": self.temperature or 0, "max_tokens": self.max_tokens}
        self._settings_lock = threading.Lock()

    def _check_url(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname)
            secret = bool(parts.username or parts.password or parts.query) or "@" in self.url
        except ValueError:
            known = secret = False
        if secret:
            raise HYWUError(
                "The judge's URL holds credentials; put the key in an environment variable."
            )
        if not known:
            raise HYWUError(f"The judge's URL '{self.url}' must begin with http:// or https://.")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise HYWUError(
                "The judge's key_env is no name of an environment variable; put the key into one, such as "
                "OPENAI_API_KEY, and give its name."
            )
        if not re.fullmatch(r"[!-~]*", self._key()):
            raise HYWUError(
                f"{self.key_env} holds blanks, line breaks or letters that no key has; set it anew."
            )
        if self._key() and parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise HYWUError(
                f"{self.url}: the key in {self.key_env} would be sent unencrypted; use https, or "
                f"unset {self.key_env} for a server that needs none."
            )

    @property
    def name(self) -> str:
        return self.model

    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip()

    def _hidden(self, text: str) -> str:
        """The text without the key, which a server may echo."""
        return text.replace(key, "***") if (key := self._key()) else text

    def close(self) -> None:
        """Wake every request that waits for its next try, so that an interrupted run ends."""
        self._stop.set()

    def score(self, request: JudgeRequest) -> Reply:
        """Ask, and ask again after passing faults. Raises Failure, Refusal or HYWUError."""
        content = self._content(request)
        attempt = 0
        while True:
            attempt += 1
            self._limit.wait(self._stop)
            if self._stop.is_set():
                raise Failure("interrupted")
            settings = dict(self._settings)
            answer, fault, wait = self._try(content, settings)
            if answer is not None:
                return self._reply(answer, attempt)
            if isinstance(fault, Fault) and fault.concern is not Concern.PASSING:
                self._settle(fault, settings)
                attempt -= 1  # adapted: that was no try of the question
                continue
            if attempt > self.retries:
                raise Failure(self._hidden(f"{fault} ({attempt} tries)"))
            pause = self.backoff * 2 ** (attempt - 1) * self._random.uniform(0.5, 1.5)
            self._stop.wait(min(max(pause, wait), LONGEST_WAIT))

    def _content(self, request: JudgeRequest) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "text", "text": request.question.prompt}]
        return content + [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in request.images
        ]

    def _try(
        self, content: list[dict[str, Any]], settings: dict[str, Any]
    ) -> tuple[dict[str, Any] | None, Fault | str, float]:
        """One request: the answer, else what went wrong and how long the server says to wait."""
        messages = [{"role": "user", "content": content}]
        body = json.dumps({"model": self.model, **settings, "messages": messages}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        target = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(target, body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                answer = parse_json(response.read(LONGEST_ANSWER), "the answer", dict, finite=False)
        except urllib.error.HTTPError as error:
            said = b""
            # An overloaded server may stall or hang up in the middle of its complaint
            with error, contextlib.suppress(OSError, http.client.HTTPException):
                said = error.read(8000)
            fault = read_fault(error.code, said, error.headers.get("Location"))
            return None, fault, _retry_after(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            return None, f"no answer: {reason}", 0
        except HYWUError:
            return None, "the endpoint's answer is not JSON, or no object", 0
        if "choices" not in answer and (fault := fault_of(answer, 200)):
            return None, fault, 0
        return answer, "", 0

    def _settle(self, fault: Fault, settings: dict[str, Any]) -> None:
        """Adapt the settings that a request was sent with, where that helps against the fault.

        Raises Refusal, Failure or HYWUError where it doesn't.
        """
        told = self._hidden(str(fault))
        if fault.concern is Concern.CONTENT:
            raise Refusal(told)
        if fault.status in (400, 422) and self._adapt(fault, settings):
            return
        if fault.concern is Concern.SETTINGS:
            raise HYWUError(
                f"{self.url}: {told.rstrip('.')}: check the URL, the model '{self.model}', the account and the key in "
                f"{self.key_env}; what was answered is kept, and the same command goes on."
            )
        raise Failure(told, of_item=fault.concern is Concern.ITEM)

    def _adapt(self, fault: Fault, sent: dict[str, Any]) -> bool:
        """Whether the settings are other ones now than those that were sent and complained about."""
        new = dict(sent)
        if "max_tokens" in sent and fault.names("max_tokens"):
            new["max_completion_tokens"] = new.pop("max_tokens")
            change = "max_tokens is sent as max_completion_tokens"
        elif "temperature" in sent and self.temperature is None and fault.names("temperature"):
            # the only value that some models take, where it may be sent at all
            if (
                new.pop("temperature") == 0
                and "parameter" not in f"{fault.words} {fault.sentence}".lower()
            ):
                new["temperature"] = 1
            change = (
                "the model's own temperature counts, which may answer the same question differently"
            )
        else:
            return False
        with self._settings_lock:
            if self._settings == sent:  # else another thread was told the same
                self._settings = new
                log.warning("%s: %s: %s", self.model, self._hidden(str(fault)), change)
        return True

    def _reply(self, answer: dict[str, Any], attempts: int) -> Reply:
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Failure("the endpoint's answer has no choices[0].message") from None
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(str(p.get("text") or "") for p in text if isinstance(p, dict))
        reason = choice.get("finish_reason")
        if isinstance(reason, dict):  # {"type": "length", "length": 512}
            reason = reason.get("type")
        reason = str(reason).lower()
        if refusal or reason in DECLINED:
            raise Refusal(self._hidden(str(refusal or reason))[:300])
        if reason in BROKEN_OFF or choice.get("error"):
            told = fault_of(choice, 200)
            said = told.sentence if told else ""
            raise Failure(
                self._hidden(f"the server broke off (finish_reason {reason}) {said}").strip()[:400]
            )
        if reason in CUT_OFF:
            raise Failure(
                f"the answer was cut off at {self.max_tokens} tokens (finish_reason {reason}); raise "
                "--max-tokens, more so for a model that reasons first"
            )
        if not text:
            raise Failure(f"an empty answer (finish_reason {reason})")
        usage = answer.get("usage") or {}
        return Reply(
            text=self._hidden(str(text)),
            model=self._hidden(str(answer.get("model") or "")),
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
        Option("timeout", "seconds per request (%(default)s)", 120, float),
        MAX_TOKENS,
        Option(
            "temperature",
            "of the sampling (default: 0, or the model's own where it can't be set)",
            type=float,
        ),
    ),
)
