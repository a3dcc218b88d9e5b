"""The text pass: the model writes a chain of thought and a new caption, and may choose the ratio.

Stages are forced: ``</think>`` is followed by ``<recaption>``; after ``</recaption>``, with an automatic
size, by the tokens that ask for the ratio, of which the best is taken. Any ratio token ends the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import HYWUError
from .attention import KVCache, Rows, Segment
from .model import HunyuanImage3, Progress
from .passes import prefill
from .prompts import Prompts, Request
from .sequence import TAGS, TokenSequence
from .sources import Source
from .tokens import Tokens

#: Tokens for which room is made at a time.
ROOM = 256

#: What is written: name -> the tag it starts with.
TASKS = {"think_recaption": "think", "think": "think", "recaption": "recaption"}

#: Called after every token with (tokens, most tokens, text so far); what it raises ends the pass.
OnToken = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Sampler:
    """Chooses a token: the likeliest (temperature 0), or a draw from what top-k and top-p leave."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.temperature) or not 0 <= self.top_p <= 1:
            raise HYWUError(
                f"The temperature is {self.temperature} and top-p {self.top_p}; they must be a finite number, "
                "and one from 0 to 1."
            )

    def __call__(self, step: int, logits: Tensor, generator: torch.Generator) -> int:
        """logits float32 ``[vocabulary]``; step counts from 0. Draws on the CPU, so that a seed means
        the same everywhere.
        """
        if self.temperature <= 0:
            return int(logits.argmax())
        logits = logits.cpu() / self.temperature
        if 0 < self.top_k < logits.numel():
            least = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        values, order = logits.sort(descending=True)
        shares = values.softmax(dim=-1)
        # the first token whose predecessors reach top-p is the first that goes
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares > self.top_p, 0)
        shares[0].clamp_min_(torch.finfo(shares.dtype).tiny)
        return int(order[torch.multinomial(shares, 1, generator=generator)])


@dataclass(frozen=True)
class Thought:
    """cot: the chain of thought with its tags.

    ratio: index of the bucket chosen, or None.

    ids: all that was written.
    finished: whether it ended by itself, not at the limit.
    """

    cot: str
    ratio: int | None
    ids: tuple[int, ...]
    finished: bool


@torch.no_grad()
def think(
    model: HunyuanImage3,
    prompts: Prompts,
    request: Request,
    sources: Sequence[Source],
    *,
    task: str = "think_recaption",
    sampler: Sampler | None = None,
    most: int | None = None,
    on_token: OnToken | None = None,
    progress: Progress | None = None,
) -> Thought:
    """Write a chain of thought for a request without one; with an automatic size, choose the ratio.

    task: see TASKS.
    sampler: greedy without one.
    most: tokens to write at most, or all that the checkpoint reads.
    progress: called in every pass, token by token. The same for the request's seed.
    Raises HYWUError on an unknown task or a request too long.
    """
    if task not in TASKS:
        raise HYWUError(f"Task '{task}' is unknown; choose one of {', '.join(TASKS)}.")
    tokens, sequence = prompts.tokens, prompts.writing(request, TASKS[task])
    room = prompts.settings.max_length - len(sequence)
    most = room if most is None else min(most, room)
    sampler, generator = sampler or Sampler(), torch.Generator().manual_seed(request.seed)
    stages = _Stages(tokens, task, request.automatic)
    with_text = _Text(tokens, sequence, most, on_token)
    cache = KVCache(model.config, 1, len(sequence) + min(most, ROOM), model.kv_device)
    try:
        hidden = prefill(model, [sequence], [sources], None, cache, progress)[:, -1:]
        while with_text.count < most and not stages.done:
            token = stages.forced()
            if token is None:
                logits = model.logits(hidden)[0, -1]
                token = stages.best(logits) or sampler(with_text.count, logits, generator)
            stages.wrote(token)
            with_text.add(token)
            if not stages.done and with_text.count < most:
                index = len(sequence) + with_text.count - 1
                hidden = _one(model, token, index, cache, progress)
    finally:
        cache.close()
    ids = tuple(with_text.ids)
    return Thought(stages.cot(ids), stages.ratio, ids, stages.done)


def closed(text: str) -> str:
    """A text that was cut off as a chain of thought: with the closing tags that it lacks."""
    for name in TAGS:
        if f"<{name}>" in text and f"</{name}>" not in text:
            text += f"</{name}>"
    return text


def _one(
    model: HunyuanImage3, token: int, index: int, cache: KVCache, progress: Progress | None
) -> Tensor:
    """Hidden state ``[1, 1, hidden]`` of one more token, which sees all before it."""
    if index >= cache.capacity:
        cache.grow(cache.capacity + ROOM)
    x = model.model.wte(torch.tensor([[token]], device=model.device))
    yx = torch.full((1, 1, 2), index)
    return model.decode(x, yx, [Rows((Segment(index, index + 1, True),))], cache, progress)


class _Stages:
    """What has to come next, and when the text is done."""

    def __init__(self, tokens: Tokens, task: str, choose_ratio: bool) -> None:
        self.tokens, self.task, self.choose_ratio = tokens, task, choose_ratio
        self.done, self.ratio = False, None
        self._queue: list[int] = []
        self._ask = False

    def forced(self) -> int | None:
        return self._queue.pop(0) if self._queue else None

    def best(self, logits: Tensor) -> int | None:
        """The likeliest ratio, where one is asked for."""
        if not self._ask:
            return None
        ratios = torch.tensor(self.tokens.ratios)
        return int(ratios[logits.cpu()[ratios].argmax()])

    def wrote(self, token: int) -> None:
        tokens = self.tokens
        if token in tokens.ratios:
            self.ratio, self.done = tokens.ratios.index(token), True
        elif token == tokens.eos:
            self.done = True
        elif token == tokens.end_think and self.task == "think_recaption":
            self._queue = [tokens.recaption]
        elif token == tokens.end_recaption or token == tokens.end_think:
            self.done = not self.choose_ratio
            self._queue = [tokens.answer, tokens.boi, tokens.size] if self.choose_ratio else []
        elif token == tokens.size and not self._queue and self.choose_ratio:
            self._ask = True

    def cot(self, ids: Sequence[int]) -> str:
        """The text with its tags, up to the last closing one; one that is missing is added."""
        tokens, tag = self.tokens, TASKS[self.task]
        last = tokens.end_think if self.task == "think" else tokens.end_recaption
        ids = list(ids)
        if last in ids:
            return f"<{tag}>{tokens.decode(ids[: ids.index(last) + 1])}"
        ends = {tokens.eos, *tokens.ratios}
        return closed(f"<{tag}>{tokens.decode([i for i in ids if i not in ends])}")


class _Text:
    """The tokens written so far, told to whoever watches."""

    def __init__(
        self, tokens: Tokens, sequence: TokenSequence, most: int, on_token: OnToken | None
    ) -> None:
        self.tokens, self.most, self.on_token = tokens, most, on_token
        self.first = [int(sequence.ids[-1])]
        self.ids: list[int] = []

    @property
    def count(self) -> int:
        return len(self.ids)

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.on_token is not None:
            self.on_token(self.count, self.most, self.tokens.decode(self.first + self.ids))
