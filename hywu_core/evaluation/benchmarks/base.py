"""What a benchmark is: items to edit, questions about the edits, and what the answers mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from ... import fingerprint
from ...errors import HYWUError
from ...files import read_json
from ..items import Item, ItemList
from ..statistics import Estimate, bootstrap_mean, bootstrap_mean_of_means
from ..tables import Bar, Table

if TYPE_CHECKING:
    from ..scores import ItemScore, MethodScores

#: What stands in a prompt for the item's instruction, as the benchmarks' authors write it.
PLACEHOLDERS = ("<instruction>", "<edit_prompt>")

#: ``--data`` of the two items that come along with every benchmark.
SAMPLES = "samples"

#: Under the figures that a benchmark's `published` table prints.
THEIRS = "Published by the authors of HY-WU, with their judge and data; not measured here."


class Benchmark(ABC):
    """Where items come from and where an editor's results go, as the benchmark's authors lay them out.

    name: of ``--benchmark``.
    usual: name of the questionnaire that is asked unless another is given.
    sample: folder of two items of our own in the benchmark's layout.
    """

    name: ClassVar[str]
    usual: ClassVar[str]
    sample: ClassVar[Path]

    @abstractmethod
    def read(self, path: Path, beside: Path | None = None) -> ItemList:
        """The items.

        beside: a folder that packed data may be unpacked into.
        Raises HYWUError.
        """

    def locate(self, data: str | Path) -> Path:
        """The path of ``--data``; "samples" stands for our own."""
        return self.sample if data == SAMPLES else Path(data)

    def index_files(self, path: Path) -> list[Path]:
        """The files that list the items, from which a change of the list can be told."""
        return sorted(path.glob("*.json*")) if path.is_dir() else [path]

    # -- data that is published packed -------------------------------------------------------------

    def packed_files(self, folder: Path) -> list[Path]:
        """Files in which items and images are packed together; none where the authors publish images."""
        return []

    def unpack(self, files: Sequence[Path], out: Path) -> Path:
        """Write packed items as a folder that `read` takes; returns the folder."""
        raise HYWUError(f"{self.name}: nothing of it is published packed.")

    # -- results -----------------------------------------------------------------------------------

    def result_path(self, root: Path, item: Item) -> Path:
        """Where a method's result lies below its folder `root`."""
        return root / f"{item.key}.png"

    def source_path(self, root: Path, item: Item) -> Path | None:
        """Where the authors keep the source beside the result; None where they don't."""
        return None

    def editor_source(self, source: Image.Image) -> Image.Image:
        """The image as an editor is given it."""
        return source

    def judged(self, edited: Image.Image, source: Image.Image) -> Image.Image:
        """The edited image as a judge is shown it."""
        return edited


def no_form(shares: Mapping[str, float], reason: str) -> str:
    raise HYWUError("This question has no form that a computing judge could answer in.")


@dataclass(frozen=True)
class Question:
    """One question about one item.

    roles: the images shown, in order: "source", "edited".
    answer: a computing judge's shares (WU-Eval dimension -> 0..1, how much of the way from source to target
        was gone) and its reason, as text in the form that the prompt asks for.
    """

    name: str
    prompt: str
    roles: tuple[str, ...]
    answer: Callable[[Mapping[str, float], str], str] = field(
        default=no_form, compare=False, repr=False
    )

    @property
    def digest(self) -> str:
        return fingerprint.digest([self.prompt], 16)


@dataclass(frozen=True)
class Questionnaire(ABC):
    """What is asked about an edit, and what the answers count.

    version: of our prompts ("ours-1"), or the hash of the file that holds the user's.
    prompts: key (question, or ImgEdit's edit type) -> template.

    A subclass says its name, title, the keys of its prompts (instructed: those that must hold the
    instruction), the numbers of one item's score ("overall" last), their scale, and a published table.
    """

    version: str
    prompts: Mapping[str, str]

    name: ClassVar[str]
    heading: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    instructed: ClassVar[tuple[str, ...]]
    dimensions: ClassVar[tuple[str, ...]]
    scale: ClassVar[tuple[float, float]]
    published: ClassVar[Table]

    @property
    def title(self) -> str:
        origin = "our own prompt" if self.version.startswith("ours") else "prompt from a file"
        return f"{self.name}, {origin} ({self.version})"

    # -- asking ------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def own_prompts(cls) -> dict[str, str]:
        """Our prompts, by key."""

    @classmethod
    def load(cls, path: str | Path | None = None) -> Questionnaire:
        """With our prompts, or with those of a JSON file: key -> prompt, others are passed over.

        ``<instruction>`` or ``<edit_prompt>`` stands for the instruction. Raises HYWUError naming what
        is missing.
        """
        if path is None:
            return cls("ours-1", cls.own_prompts())
        data = read_json(path)
        if not isinstance(data, dict) or any(not isinstance(v, str) for v in data.values()):
            raise HYWUError(f"{path}: must map names to prompts.")
        if missing := [key for key in cls.keys if key not in data]:
            raise HYWUError(
                f"{path}: has no prompt for {', '.join(missing)}, which {cls.name} needs."
            )
        if without := [k for k in cls.instructed if not any(p in data[k] for p in PLACEHOLDERS)]:
            raise HYWUError(
                f"{path}: the prompt for {', '.join(without)} has no <instruction> or <edit_prompt>."
            )
        prompts = {key: data[key] for key in cls.keys}
        digest = fingerprint.of_json(prompts, 8, sort_keys=True, ensure_ascii=False)
        return cls(f"file-{digest}", prompts)

    @abstractmethod
    def questions(self, item: Item) -> list[Question]:
        """The questions about this item."""

    def prompt(self, key: str, item: Item) -> str:
        """The template of a key with the item's instruction in it."""
        template = self.prompts[key]
        for placeholder in PLACEHOLDERS:
            if placeholder in template:
                return template.replace(placeholder, item.instruction)
        return template

    # -- counting ----------------------------------------------------------------------------------

    @abstractmethod
    def parse(self, answers: Mapping[str, str]) -> dict[str, float] | None:
        """The numbers of an item's answers (question -> text); None when one can't be parsed."""

    @abstractmethod
    def table(self, scores: MethodScores) -> Table:
        """One method's table, in the authors' form where there is one."""

    def overall(self, scores: MethodScores) -> Estimate:
        """Overall over all scored items: the mean of the tasks' means, as GEdit and ImgEdit have it.

        The interval redraws items within tasks.
        """
        pairs = [columns(group) for group in scores.by_task().values()]
        return bootstrap_mean_of_means([p[0] for p in pairs], [p[1] for p in pairs])

    def charts(self, methods: Sequence[MethodScores]) -> list[tuple[str, tuple[Bar, ...]]]:
        """The report's charts: (title, bars)."""
        return [("Overall by task", tuple(self.bars(methods)))]

    def bars(self, methods: Sequence[MethodScores]) -> list[Bar]:
        """Overall over all and by task, for every method, with intervals."""
        found = []
        for scores in methods:
            found.append(Bar("all", scores.method, self.overall(scores)))
            for task, group in scores.by_task().items():
                found.append(Bar(task, scores.method, bootstrap_mean(*columns(group))))
        return found

    # -- the authors' files ------------------------------------------------------------------------

    def write_files(self, folder: Path, scores: MethodScores) -> None:
        """Write the files that the authors' scripts write, where they have some."""
        return

    @classmethod
    def their_tables(cls, path: Path, data: str | None) -> list[Table]:
        """Tables of files that other programs scored; empty where the path is none of them.

        data: the user's ``--data``, for what the files don't say.
        Raises HYWUError naming the file.
        """
        return []


def columns(scores: Sequence[ItemScore]) -> tuple[list[float], list[str]]:
    """Overall of each score, and the cluster it counts under."""
    return [s.values["overall"] for s in scores], [s.item.cluster for s in scores]
