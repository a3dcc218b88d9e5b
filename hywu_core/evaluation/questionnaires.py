"""What a judge is asked about an item: prompts of our own, versioned, or the authors' from files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import HYWUError
from ..files import read_json
from ..fingerprint import digest, of_json
from . import gedit, imgedit, wu_eval
from .items import Item

PROMPTS = Path(__file__).with_name("prompts")

#: What stands in a prompt for the item's instruction, as the benchmarks' authors write it.
PLACEHOLDERS = ("<instruction>", "<edit_prompt>")

NAMES = ("wu-eval", "gedit", "imgedit")

#: The questionnaire that belongs to a benchmark, unless one is given.
USUAL = {"gedit": "gedit", "imgedit": "imgedit", "folder": "wu-eval"}


@dataclass(frozen=True)
class Question:
    """One question about one item: its name, its prompt, and the pictures shown, in order."""

    name: str
    prompt: str
    roles: tuple[str, ...]

    @property
    def digest(self) -> str:
        return digest([self.prompt], 16)


@dataclass(frozen=True)
class Questionnaire:
    """The questions of one evaluation.

    version: of our prompts ("ours-1"), or the hash of the file that holds the user's; prompts:
    question (ImgEdit: edit type) -> template.
    """

    name: str
    version: str
    prompts: Mapping[str, str]

    @property
    def title(self) -> str:
        origin = "our own prompt" if self.version.startswith("ours") else "prompt from a file"
        return f"{self.name}, {origin} ({self.version})"

    def questions(self, item: Item) -> list[Question]:
        """The questions about this item."""
        both = ("source", "edited")
        if self.name == "imgedit":
            return [Question("imgedit", _fill(self.prompts[item.task], item), both)]
        if self.name == "gedit":
            return [
                Question("semantics", _fill(self.prompts["semantics"], item), both),
                Question("quality", _fill(self.prompts["quality"], item), ("edited",)),
            ]
        return [Question("wu-eval", _fill(self.prompts["wu-eval"], item), both)]


def _fill(template: str, item: Item) -> str:
    for placeholder in PLACEHOLDERS:
        if placeholder in template:
            return template.replace(placeholder, item.instruction)
    return template


def load_questionnaire(name: str, path: str | Path | None = None) -> Questionnaire:
    """Our prompts for "wu-eval", "gedit" or "imgedit", or those of a JSON file.

    The file maps ``semantics`` and ``quality`` (gedit), each edit type (imgedit: the authors'
    prompts.json as it is) or ``wu-eval`` to a prompt in which ``<instruction>`` or
    ``<edit_prompt>`` stands for the instruction. Raises HYWUError naming what is missing.
    """
    keys = {
        "wu-eval": wu_eval.QUESTIONS,
        "gedit": gedit.QUESTIONS,
        "imgedit": imgedit.EDIT_TYPES,
    }.get(name)
    if keys is None:
        raise HYWUError(f"There is no questionnaire '{name}'; choose {', '.join(NAMES)}.")
    if path is None:
        return Questionnaire(name, "ours-1", _own_prompts(name))
    data = read_json(Path(path))
    if not isinstance(data, dict) or any(not isinstance(v, str) for v in data.values()):
        raise HYWUError(f"{path}: must map names to prompts.")
    if missing := [key for key in keys if key not in data]:
        raise HYWUError(f"{path}: has no prompt for {', '.join(missing)}, which {name} needs.")
    needing = [key for key in keys if key != "quality"]
    if without := [k for k in needing if not any(p in data[k] for p in PLACEHOLDERS)]:
        raise HYWUError(
            f"{path}: the prompt for {', '.join(without)} has no <instruction> or <edit_prompt>."
        )
    prompts = {key: data[key] for key in keys}
    return Questionnaire(
        name, f"file-{of_json(prompts, 8, sort_keys=True, ensure_ascii=False)}", prompts
    )


def _own_prompts(name: str) -> dict[str, str]:
    if name == "imgedit":
        return read_json(PROMPTS / "imgedit_v1.json")
    if name == "gedit":
        files = {q: f"gedit_{q}_v1.txt" for q in gedit.QUESTIONS}
    else:
        files = {"wu-eval": "wu_eval_v1.txt"}
    return {key: (PROMPTS / file).read_text(encoding="utf-8") for key, file in files.items()}
