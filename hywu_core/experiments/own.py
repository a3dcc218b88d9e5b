"""The project's own result: WU-Eval of the bundled weights on the conflict experiment's held-out images.

The same crops, tasks and phrasings as `hywu conflict` measures in dB, here as an ordinary folder
benchmark: ``items/seen.jsonl`` and ``items/held_out.jsonl``, the second with the same sources and
instructions in phrasings that no training had. It is the experiment's last step: given its folder, the very
edits that were measured there are judged here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..bases.bundled.checkpoint import bundled, editor_identity, load_editor
from ..errors import HYWUError, get_logger
from ..evaluation.benchmarks.wu_eval import dimension_bars
from ..evaluation.editors.base import Editor
from ..evaluation.editors.bundled import EngineEditor
from ..evaluation.items import Item
from ..evaluation.results import read_manifest
from ..evaluation.scores import MethodScores
from ..evaluation.statistics import Estimate, bootstrap_mean
from ..evaluation.tables import Table, comparison_table
from ..files import atomic_path, check_fields, read_json, read_json_lines, slug, write_json
from ..fingerprint import of_files
from ..images import write_image
from .conflict.evaluate import EvaluationSet, evaluation_set
from .conflict.experiment import edits_path
from .conflict.kept import read_edits
from .conflict.plan import ConflictPlan
from .images import photographs
from .tasks import VERSION

log = get_logger(__name__)

PHRASINGS = ("seen", "held_out")

#: Methods in the order of the table: the first is the one that the others are compared with.
LABELS = {
    "hywu": "HY-WU",
    "shared": "Shared LoRA",
    "single": "Single LoRA (one per task)",
    "sft": "SFT",
    "base": "editor alone",
}


@dataclass(frozen=True)
class OwnSet:
    """Where the items lie (phrasing -> JSONL file), and which of their images are photographs."""

    files: Mapping[str, Path]
    photographs: frozenset[str]
    about: Mapping[str, Any]


# -- items ---------------------------------------------------------------------------------------


def experiment_plan(folder: Path | None) -> ConflictPlan:
    """The plan whose held-out crops are evaluated: of an experiment's folder, else the default.

    Raises HYWUError when the folder holds none, or its editor is not the bundled one.
    """
    if folder is None:
        return ConflictPlan()
    found = read_json(folder / "plan.json", dict)
    try:
        plan, made_for = found["plan"], found["editor"]["editor"]
        names = ("crops", "max_images", "sampling_steps", "seed", "main_rank", "evaluation_size")
        chosen = {name: int(plan[name]) for name in names}
        ranks = tuple(plan["ranks"])
        result = replace(ConflictPlan(), tasks=tuple(plan["tasks"]), ranks=ranks, **chosen)
    except (KeyError, TypeError, ValueError) as error:
        raise HYWUError(
            f"{folder / 'plan.json'}: not the plan of `hywu conflict` ({error})."
        ) from (error)
    if found.get("tasks", 1) != VERSION:
        raise HYWUError(
            f"{folder / 'plan.json'}: its tasks are of version {found.get('tasks', 1)}, this program's of "
            f"{VERSION}: they make other images; name an experiment on these."
        )
    mine = editor_identity(load_editor())
    if made_for != mine:
        raise HYWUError(
            f"{folder}: the experiment was made with the editor {made_for}, {bundled('editor')} is "
            f"{mine}; name the experiment that this editor's weights come from."
        )
    return result


def write_items(out: Path, plan: ConflictPlan, progress: bool = True) -> OwnSet:
    """Write the evaluation set of a plan as a folder benchmark, once; later calls take what is there.

    Images come first, the lists next, ``set.json`` last, so that a
    run stopped before the end starts the set anew. Raises HYWUError when `out` holds another set.
    """
    root = out / "items"
    asked = {
        "seed": plan.seed,
        "crops": plan.crops,
        "tasks": list(plan.tasks),
        "max_images": plan.max_images,
        "size": plan.evaluation_size,
    }
    files = {phrasing: _items_file(out, phrasing) for phrasing in PHRASINGS}
    path = root / "set.json"
    if not path.is_file():
        data = evaluation_set(plan)
        photos = [name for name in photographs() if name in data.image]
        _write_set(root, data, files, progress)
        about = {"images": len(set(data.image)), "items": len(data)}
        write_json(path, {"asked": asked, "photographs": photos, **about})
    about = read_json(path, dict, "remove the folder to make it anew")
    fields = {"asked": dict, "photographs": list}
    check_fields(about, fields, str(path), null=False)
    if missing := fields.keys() - about.keys():
        raise HYWUError(f"{path}: lacks {min(missing)}; remove the folder to make it anew.")
    if about["asked"] != asked:
        raise HYWUError(
            f"{path}: this folder holds another set of items ({_difference(about['asked'], asked)}); "
            "choose another --out."
        )
    return OwnSet(files, frozenset(about["photographs"]), about)


def _items_file(out: Path, phrasing: str) -> Path:
    return out / "items" / f"{phrasing}.jsonl"


def _write_set(root: Path, data: EvaluationSet, files: Mapping[str, Path], progress: bool) -> None:
    for kind in ("sources", "targets"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(data.image))}
    rows: dict[str, list[str]] = {phrasing: [] for phrasing in files}
    bar = tqdm(range(len(data)), desc="writing items", disable=not progress)
    for i in bar:
        image, task = data.image[i], data.seen.task[i]
        stem = slug(Path(image).stem)[:60]
        key = f"{numbers[image]:03d}_{stem}_{data.crop[i]}_{task}"
        pair = {"source": f"sources/{key}.png", "target": f"targets/{key}.png"}
        write_image(data.seen.source[i], root / pair["source"])
        write_image(data.seen.target[i], root / pair["target"])
        common = {"key": key, "task": task, **pair, "photograph": image}
        for phrasing, batch in zip(PHRASINGS, (data.seen, data.held_out), strict=True):
            row = {**common, "instruction": batch.instruction[i]}
            rows[phrasing].append(json.dumps(row, ensure_ascii=False))
    for phrasing, file in files.items():
        with atomic_path(file, overwrite=True) as part:
            part.write_text("\n".join(rows[phrasing]) + "\n", encoding="utf-8")


def _difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    different = [name for name in two if one.get(name) != two[name]]
    return ", ".join(f"{name} {one.get(name)} and not {two[name]}" for name in different)


# -- methods -------------------------------------------------------------------------------------


class KeptEdits:
    """The edits that an experiment was measured with, as an editor: what it reports in dB is judged here.

    runs: task -> name of the run whose edits are taken; "" for any task.
    out: where `write_items` writes the items, before the first edit.
    Raises HYWUError when an edit isn't kept.
    """

    parallel = 1

    def __init__(self, experiment: Path, runs: Mapping[str, str], out: Path) -> None:
        self.runs, self.out = dict(runs), out
        files = {(r, p): edits_path(experiment, r, p) for r in runs.values() for p in PHRASINGS}
        self.kept = {key: read_edits(file) for key, file in files.items()}
        self.digest = of_files(files.values(), 16)

    @staticmethod
    def has(experiment: Path, runs: Mapping[str, str]) -> bool:
        """Whether all of them are kept; experiments of before keep those of seen phrasings alone."""
        return all(edits_path(experiment, r, p).is_file() for r in runs.values() for p in PHRASINGS)

    @cached_property
    def rows(self) -> dict[tuple[str, str], tuple[str, int]]:
        """(key, instruction) of an item -> its phrasing, and where its edit stands."""
        found = {}
        for phrasing in PHRASINGS:
            rows = read_json_lines(_items_file(self.out, phrasing))
            for (run, kept), edits in self.kept.items():
                if kept == phrasing and len(edits) != len(rows):
                    raise HYWUError(
                        f"{self.out}: there are {len(rows)} items and {run} has {len(edits)} edits of its "
                        f"{phrasing} phrasings; measure it anew with `hywu conflict`."
                    )
            for number, (_, row) in enumerate(rows):
                found[row["key"], row["instruction"]] = phrasing, number
        return found

    def describe(self) -> dict[str, Any]:
        return {"kind": "conflict", "runs": self.runs, "edits": self.digest}

    def edit(self, source: Image.Image, item: Item, seed: int) -> Image.Image:
        phrasing, number = self.rows[item.key, item.instruction]
        run = self.runs.get(item.task) or self.runs[""]
        return Image.fromarray(self.kept[run, phrasing][number].permute(1, 2, 0).numpy())


def own_editors(
    methods: Sequence[str], plan: ConflictPlan, out: Path, device: str = "cpu",
    experiment: Path | None = None, same_items: bool = True,
) -> dict[str, Editor]:  # fmt: skip
    """Method -> editor, in the order of `LABELS`; all of them load before the first edit.

    methods: keys of `LABELS`. With `experiment`, a folder of `hywu conflict`, and on the same items, they are
    the edits that it kept; else, or where `out` holds results of the weights already, the bundled weights
    edit. SFT needs `experiment`. Raises HYWUError naming the weights that are missing or don't fit.
    """
    editors: dict[str, Editor] = {}
    for method in LABELS:
        if method not in methods:
            continue
        if method == "sft" and experiment is None:
            raise HYWUError(
                "SFT's weights are not bundled; name their experiment with --experiment."
            )
        runs = _runs(method, plan)
        begun = read_manifest(out / PHRASINGS[0] / method).get("editor", {}).get("kind")
        kept = experiment is not None and bool(runs) and KeptEdits.has(experiment, runs)
        if kept and same_items and begun != "bundled":
            editors[method] = KeptEdits(experiment, runs, out)
            continue
        sft = experiment / "weights" / "sft.safetensors" if method == "sft" else None
        lora = {"hywu": None, "sft": None, "single": "single_{task}", "base": "none"}.get(
            method, method
        )
        editors[method] = EngineEditor(lora, plan.sampling_steps, device=device, fine_tuned=sft)
    return editors


def _runs(method: str, plan: ConflictPlan) -> dict[str, str]:
    """Task -> run of an experiment that is this method; none for the editor alone."""
    rank = plan.main_rank
    if method == "single":
        return {task: f"single_{task}_r{rank}" for task in plan.tasks}
    return {"sft": {"": "sft"}, "base": {}}.get(method, {"": f"{method}_r{rank}"})


# -- the table -----------------------------------------------------------------------------------


def own_table(
    seen: Sequence[MethodScores],
    held_out: Sequence[MethodScores],
    items: OwnSet,
    parameters: int,
    questionnaire: str,
) -> Table:
    """The small table for the README: every method's WU-Eval, with what it does not show.

    seen, held_out: the same methods in the same order, the first being compared with.
    parameters: of the editor.
    questionnaire: its title.
    """
    names = [LABELS.get(scores.method, scores.method) for scores in seen]
    whole = comparison_table(seen).rows
    photos = comparison_table([_only(scores, items.photographs) for scores in seen]).rows
    bars = dimension_bars(seen)
    dimensions = [b.group for b in bars if b.method == seen[0].method and b.group != "overall"]
    by_key = {(bar.method, bar.group): bar.estimate for bar in bars}
    rows = []
    for number, scores in enumerate(seen):
        change = phrasing_change(scores, held_out[number])
        rows.append(
            (
                names[number],
                *whole[number][1:3],
                *(_mean(by_key[scores.method, name]) for name in dimensions),
                photos[number][1],
                f"{change.mean:+.2f}{change.interval('+')}" if change.count else "–",
            )
        )
    header = ("method", "overall", f"difference to {names[0]}", *dimensions)
    header += ("overall, photographs only", "change with held-out phrasings")
    return Table(
        "WU-Eval of the bundled weights, by the reference judge",
        header,
        tuple(rows),
        _note(seen, held_out, items, parameters, questionnaire),
    )


def phrasing_change(seen: MethodScores, held_out: MethodScores) -> Estimate:
    """Overall with held-out phrasings minus with seen ones: the same sources, paired."""
    before = {score.item.id: score.values["overall"] for score in seen.scored()}
    both = [score for score in held_out.scored() if score.item.id in before]
    return bootstrap_mean(
        [score.values["overall"] - before[score.item.id] for score in both],
        [score.item.cluster for score in both],
    )


def _only(scores: MethodScores, photos: frozenset[str]) -> MethodScores:
    return replace(scores, scores=tuple(s for s in scores.scores if s.item.photograph in photos))


def _mean(value: Estimate) -> str:
    return f"{value.mean:.2f}" if value.count else "–"


def _note(
    seen: Sequence[MethodScores],
    held_out: Sequence[MethodScores],
    items: OwnSet,
    parameters: int,
    questionnaire: str,
) -> str:
    asked, name = items.about["asked"], seen[0].name
    lacking = sum(len(s.scores) - len(s.scored()) for s in (*seen, *held_out))
    parts = [
        f"Judge: {name.judge}, version {name.judge_version} ({questionnaire}); 1 is the unchanged "
        "source or worse, 5 the target itself.",
        f"{len(seen[0].scores)} edits per method: {items.about['images']} held-out images, of which "
        f"{len(items.photographs)} photographs, {asked['crops']} crops each, {len(asked['tasks'])} "
        "tasks, instructions given as text.",
        "Intervals: 95 %, bootstrap over images; differences are paired.",
        "Limits: this judge computes from pixels with known targets and sees nothing; the tasks are "
        f"synthetic; the crops are {asked['size']}x{asked['size']} pixels; the editor has "
        f"{parameters / 1e6:.1f} million parameters. The figures compare these methods with each "
        "other and with nothing published.",
    ]
    if "sft" not in {scores.method for scores in seen}:
        parts.append("SFT is left out: its weights are not bundled.")
    if lacking:
        parts.append(f"{lacking} edits have no score.")
    return " ".join(parts)
