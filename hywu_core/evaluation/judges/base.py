"""The interface of a judge, and what it is given and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from ...errors import HYWUError
from ..benchmarks.base import Question
from ..options import Option

MAX_TOKENS = Option("max_tokens", "of an answer (%(default)s)", 512, int)


@dataclass(frozen=True)
class JudgeRequest:
    """One question with its images (RGB). `target` is for judges that compute, where it is known."""

    question: Question
    source: Image.Image
    edited: Image.Image
    target: Image.Image | None = None

    @property
    def images(self) -> list[Image.Image]:
        """The images the question shows, in its order."""
        return [getattr(self, role) for role in self.question.roles]


@dataclass(frozen=True)
class Reply:
    """A judge's raw answer.

    model: what the endpoint says answered.
    tokens_in, tokens_out: as it counts them.
    """

    text: str
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    attempts: int = 1


class Refusal(Exception):
    """The judge declined to answer; asking again would not help."""


class Failure(Exception):
    """No answer came (after retries); asking again later may help.

    of_item: it lies in this item's images or text and says nothing about other questions.
    """

    def __init__(self, text: str, of_item: bool = False) -> None:
        super().__init__(text)
        self.of_item = of_item


class Judge(Protocol):
    """name and version say who judges: answers of different ones are never put in one report.

    parallel: how many requests it takes at once.
    """

    name: str
    version: str
    parallel: int

    def score(self, request: JudgeRequest) -> Reply:
        """The raw answer. Raises Refusal, Failure, or HYWUError when no request can succeed."""
        ...


def check_answerable(judge: Judge) -> None:
    """Raises HYWUError when the judge has no name or version to report."""
    if not judge.name or not judge.version:
        raise HYWUError("A judge needs a name and a version, since every report names them.")
