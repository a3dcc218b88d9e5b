"""Benchmarks inside a graph: the items of a benchmark, a judge, and the table of scores.

The Judge keeps images and answers where `hywu eval` keeps them, below the output folder: a graph's
results can be judged again, reported and compared from the command line, and the other way round.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..hywu_core.errors import HYWUError
from ..hywu_core.evaluation.benchmarks import (
    BENCHMARKS,
    QUESTIONNAIRES,
    load_questionnaire,
    read_items,
)
from ..hywu_core.evaluation.items import Item, ItemList
from ..hywu_core.evaluation.judges import IN_GRAPHS
from ..hywu_core.evaluation.judges.openai import ENDPOINT
from ..hywu_core.evaluation.report.markdown import markdown_table
from ..hywu_core.evaluation.results import MANIFEST, Results, open_results, write_manifest
from ..hywu_core.evaluation.run import judge as run_judge
from ..hywu_core.evaluation.run import store_name
from ..hywu_core.evaluation.scores import MethodScores, same_judge, score_results, write_scores
from ..hywu_core.evaluation.store import FAILED, StoreName
from ..hywu_core.evaluation.tables import comparison_table
from ..hywu_core.files import check_name, folder_lock
from ..hywu_core.images import to_pillow
from . import ui
from .host import benchmarks
from .host.charts import chart_image

CATEGORY = f"{ui.CATEGORY}/evaluation"
ITEM = "HYWU_ITEM"
SCORES = "HYWU_SCORES"


@dataclass(frozen=True)
class BenchmarkItem:
    """What HYWU_ITEM carries: the item, all of its benchmark's, where they lie, what was selected."""

    item: Item
    items: ItemList
    data: Path
    selection: dict[str, Any]


@dataclass(frozen=True)
class JudgedResults:
    """What HYWU_SCORES carries: a folder of results and whose answers about them count."""

    root: Path
    name: StoreName


class HYWUBenchmarkItems:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Gives the items of an image editing benchmark one after another: GEdit-Bench, ImgEdit-Bench "
        "(get them from their authors), or a folder of your own with an items.jsonl. Two items of our "
        "own come along as 'samples'. With count 0 one run edits all items; for a large benchmark set "
        "count 1, let index increment, and queue as many runs as there are items."
    )
    SEARCH_ALIASES = ["hywu", "hy-wu benchmark", "gedit", "imgedit", "evaluation", "dataset"]
    RETURN_TYPES = ("IMAGE", "STRING", ITEM, "STRING", "STRING", "STRING")
    RETURN_NAMES = ("image", "instruction", "item", "key", "task", "language")
    OUTPUT_IS_LIST = (True,) * 6
    OUTPUT_TOOLTIPS = (
        "The image to edit; GEdit-Bench's at its authors' size of about 512 x 512.",
        "What to do with it.",
        "The item, for HY-WU Judge.",
        "The item's key: the name of its result.",
        "The item's task or edit type.",
        "The language of its instruction.",
    )
    FUNCTION = "read"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls):
        required = {
            "benchmark": ui.choice(
                list(BENCHMARKS), "How the items are laid out in the folder.", "folder"
            ),
            "path": ui.text(
                benchmarks.SAMPLES,
                "The benchmark's folder inside ComfyUI's input or output folder (or inside a folder that the "
                "operator lists under 'hywu_benchmarks' in extra_model_paths.yaml). 'samples': the two items "
                "that come along.",
            ),
            "index": ui.whole(
                0, 0, 1_000_000, "The first item, counted from 0.", control_after_generate=True
            ),
            "count": ui.whole(
                1, 0, 100_000,
                "How many items this run gives, one after another; 0: all from index on. All of their images "
                "are in memory at once.",
            ),
        }  # fmt: skip
        optional = {
            "tasks": ui.text(
                "", "Only these tasks, separated by commas; empty: all of them.", advanced=True
            ),
            "languages": ui.text(
                "",
                "Only these languages, separated by commas (GEdit-Bench: en, cn); empty: all of them.",
                advanced=True,
            ),
        }
        return {"required": required, "optional": optional}

    @classmethod
    def VALIDATE_INPUTS(cls, path=None):
        return ui.checked(lambda: benchmarks.check_path(path))

    @classmethod
    def IS_CHANGED(cls, benchmark, path, **_):
        return benchmarks.data_stamp(benchmark, path)

    def read(self, benchmark, path, index, count, tasks="", languages=""):
        data = benchmarks.data_folder(benchmark, path)
        items = read_items(benchmark, data, benchmarks.results_folder("hywu_eval"))
        selection = {"tasks": _listed(tasks), "languages": _listed(languages)}
        selection = {name: value for name, value in selection.items() if value}
        chosen = items.select(**selection).items
        if index >= len(chosen):
            raise HYWUError(
                f"index is {index}, but {data} has {len(chosen)} items, 0 to {len(chosen) - 1}; all of "
                "them are done, or start again at 0."
            )
        given = chosen[index : index + count] if count else chosen[index:]
        layout = Results(data, BENCHMARKS[benchmark])
        images = [_tensor(layout.editor_source(item)) for item in given]
        carried = [BenchmarkItem(item, items, data, selection) for item in given]
        lines = [f"{i.key} ({i.task}, {i.language}): {i.instruction}" for i in given]
        lines += [f"not usable: {bad}" for bad in items.bad]
        columns = ([getattr(i, name) for i in given] for name in ("key", "task", "language"))
        instructions = [item.instruction for item in given]
        warnings = [f"Not usable: {bad}" for bad in items.bad]
        return ui.shown("\n".join(lines), (images, instructions, carried, *columns), warnings)


class HYWUJudge:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Keeps a benchmark item's result and asks a judge about it. 'reference' computes from pixels, "
        "for items with a known target; 'openai' asks a vision-language model at the operator's "
        "OpenAI-compatible endpoint. Nothing is asked twice: the same image keeps its answer. Images "
        "and scores lie where `hywu eval` keeps them, for its reports."
    )
    SEARCH_ALIASES = ["hywu", "hy-wu judge", "score edit", "evaluate", "vlm judge", "wu-eval"]
    RETURN_TYPES = (SCORES, "FLOAT", "STRING")
    RETURN_NAMES = ("scores", "overall", "answer")
    OUTPUT_TOOLTIPS = (
        "The method's results and scores, for HY-WU Score Table.",
        "The item's overall score: 1 to 5 (GEdit-Bench: 0 to 10); -1 where there is none.",
        "The outcome, the scores and the judge's words, as JSON.",
    )
    FUNCTION = "judge"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        required = {
            "image": ui.socket("IMAGE", "The edited image."),
            "item": ui.socket(ITEM, "What was asked: from HY-WU Benchmark Items."),
            "method": ui.text(
                "hywu",
                "What made the image: the name of the results' folder and of the table's row. An image of an "
                "earlier run under this name is replaced.",
            ),
            "judge": ui.choice(
                list(IN_GRAPHS),
                "reference: pixels against the known target, no network. openai: the endpoint in the server's "
                f"environment variable {ENDPOINT}, with the key in OPENAI_API_KEY.",
                "reference",
            ),
            "questionnaire": ui.choice(
                ["auto", *QUESTIONNAIRES],
                "What is asked. auto: the benchmark's own; wu-eval for a folder.",
                "auto",
            ),
        }
        optional = {
            "model": ui.text(
                "", "The model's name at the endpoint, for openai only.", advanced=True
            ),
            "folder": ui.text(
                "hywu_eval",
                "Folder of all methods' results, below ComfyUI's output folder.",
                advanced=True,
            ),
        }
        return {"required": required, "optional": optional}

    @classmethod
    def VALIDATE_INPUTS(cls, method=None, folder=None):
        return ui.checked(lambda: _check_names(method, folder))

    @classmethod
    def IS_CHANGED(cls, method=None, folder="hywu_eval", **_):
        # Results that were removed are made again
        try:
            return (benchmarks.results_folder(folder) / method / MANIFEST).is_file()
        except (HYWUError, TypeError):
            return False

    def judge(self, image, item, method, judge, questionnaire, model="", folder="hywu_eval"):
        judging = IN_GRAPHS[judge](model)
        usual = BENCHMARKS[item.items.benchmark].usual
        name = usual if questionnaire == "auto" else questionnaire
        asked = load_questionnaire(name)
        results = _keep(image, item, benchmarks.results_folder(folder), method)
        one = replace(item.items, items=(item.item,))
        run_judge(results, one, asked, judging, again=(FAILED,), progress=False)
        kept = store_name(judging, asked)
        score = score_results(results, one, asked, kept).scores[0]
        told = {
            "item": item.item.id,
            "outcome": score.outcome,
            "scores": dict(score.values),
            "answers": dict(score.answers),
            "judge": str(kept),
        }
        answer = json.dumps(told, ensure_ascii=False)
        judged = JudgedResults(results.root, kept)
        return ui.shown(answer, (judged, float(score.values.get("overall", -1.0)), answer))


class HYWUScoreTable:
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "The scores of all judged results of a method, in the benchmark authors' own form, as a table "
        "and a bar chart; several methods side by side, with the difference to the first. Items without "
        "a result or an answer are counted, never left out in silence. The scores are also written into "
        "the results' folder."
    )
    SEARCH_ALIASES = ["hywu", "hy-wu scores", "benchmark table", "bar chart", "evaluation"]
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("table", "chart")
    OUTPUT_TOOLTIPS = (
        "The tables as Markdown.",
        "Bars of the overall score by task, with 95 % intervals where there are enough items.",
    )
    FUNCTION = "tabulate"
    OUTPUT_NODE = True
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls):
        more = ui.socket(
            SCORES, "From HY-WU Judge: another method on the same items, by the same judge."
        )
        first = ui.socket(
            SCORES,
            "From HY-WU Judge; the first method is the one that others are compared with.",
        )
        return {"required": {"scores": first}, "optional": {"scores_2": more, "scores_3": more}}

    def tabulate(self, scores, scores_2=(), scores_3=()):
        judged = list(dict.fromkeys([*scores, *scores_2, *scores_3]))
        methods = [_load_scores(one) for one in judged]
        same_judge(methods)
        for method in methods:
            write_scores(method)
        tables = [comparison_table(methods)] if len(methods) > 1 else []
        tables += [method.questionnaire.table(method) for method in methods]
        lines = [f"Judge: {methods[0].name}."]
        lines += [f"{method.method}: {method.outcome_line()}." for method in methods]
        text = "\n\n".join([*lines, *("\n".join(markdown_table(t)) for t in tables)])
        asked = methods[0].questionnaire
        chart = chart_image(asked.bars(methods), asked.scale, f"Overall, {asked.name}")
        return ui.shown(text, (text, _tensor(chart)))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _tensor(image: Image.Image) -> Tensor:
    """``[1, H, W, 3]`` in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]


def _pillow(image: Tensor) -> Image.Image:
    """The one image of a batch. Raises HYWUError on more, and on what is no image."""
    if image.ndim != 4:
        raise HYWUError(
            f"HY-WU Judge got {tuple(image.shape)} for an image; an image is [batch, height, width, 3]."
        )
    if image.shape[0] != 1:
        raise HYWUError(
            f"HY-WU Judge got a batch of {image.shape[0]} images for one item; give it one image "
            "(ImageFromBatch takes one out)."
        )
    return to_pillow(image[0, ..., :3].permute(2, 0, 1))


def _method_name(method: str) -> str:
    try:
        return check_name(method.strip(), "name")
    except HYWUError as error:
        raise HYWUError(f"method can't be used: {error}.") from error


def _check_names(method: str | None, folder: str | None) -> None:
    """HYWUError on a method or a folder that can't be used; None is not known yet."""
    if method is not None:
        _method_name(method)
    if folder is not None:
        benchmarks.results_folder(folder)


def _keep(image: Tensor, item: BenchmarkItem, folder: Path, method: str) -> Results:
    """Write the image into the method's folder. Raises HYWUError when it is another program's."""
    method = _method_name(method)
    edited = _pillow(image)
    results = Results(folder / method, BENCHMARKS[item.items.benchmark])
    made_by = {"kind": "comfyui-graph"}
    with folder_lock(results.root):
        write_manifest(results, item.items, made_by, item.data, None, item.selection)
        results.save(item.item, edited)
    return results


def _load_scores(judged: JudgedResults) -> MethodScores:
    results, items = open_results(judged.root)
    return score_results(results, items, load_questionnaire(judged.name.questionnaire), judged.name)
