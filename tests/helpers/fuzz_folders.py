"""Kinds of files for `fuzz` that lie in folders of work: base models, training data and states, votes, experiments."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hunyuan_golden import BASE
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from vote_server import make as make_session

from hywu_core import Condition, ParameterGenerator, save_generator
from hywu_core.bases.bundled.checkpoint import bundled, editor_identity, load_editor
from hywu_core.bases.hunyuan_image3 import Prompts, open_folder
from hywu_core.bases.hunyuan_image3.codecs import NF4_LEVELS
from hywu_core.bases.hunyuan_image3.pipeline import build
from hywu_core.bases.hunyuan_image3.quantize import errors_of, quantize
from hywu_core.bases.hunyuan_image3.system_prompt import system_prompt
from hywu_core.cli.main import main
from hywu_core.evaluation.benchmarks import find_benchmark, read_items
from hywu_core.evaluation.benchmarks.gedit.scoring import COLUMNS, read_csv
from hywu_core.evaluation.benchmarks.gedit.unpack import FIELDS, packed_files, unpack
from hywu_core.evaluation.benchmarks.imgedit import their_table
from hywu_core.evaluation.editors.bundled import load_fine_tuned
from hywu_core.evaluation.gsb.store import Store
from hywu_core.evaluation.items import ItemList
from hywu_core.evaluation.results import read_failures
from hywu_core.experiments.own import experiment_plan
from hywu_core.files import as_json, save_tensors
from hywu_core.training.logs import FIELDS as LOG
from hywu_core.training.logs import read_log
from hywu_core.training.pairs import pairs_identity, read_pairs
from hywu_core.training.schedule import Average
from hywu_core.training.state import load_state, recorded_precision, save_state


def succeeds_or_says(*words: str | Path) -> None:
    """A command: it must end with 0 or 1, and say one line where it is 1."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    said = err.getvalue().strip().split("\n")
    assert code == 0 or (code == 1 and said[-1].startswith("hywu ")), said


# -- HunyuanImage-3 ------------------------------------------------------------------------------------


def hunyuan(folder: Path) -> Path:
    shutil.copytree(BASE, folder / "base")
    return prompt_file(folder / "base").parent


def read_hunyuan(path: Path) -> None:
    found = Prompts.open(path).folder
    build(found)
    succeeds_or_says("hunyuan", "plan", path)


def quantized(method: str) -> Callable[[Path], Path]:
    return lambda folder: quantize(BASE, folder / method, method)


def read_quantized(path: Path) -> None:
    """All that loading one reads: every matrix decoded, what it says of itself."""
    folder = open_folder(path)
    build(folder)
    for name in folder.quantized:
        folder.read(name)
    errors_of(path)


def by_another(change: Callable[[Tensor], Mapping[str, Tensor]]) -> Callable[[Path], Path]:
    """The folder with experts as another program stores them: matrix -> the tensors by the ends of their names."""

    def made(folder: Path) -> Path:
        target = hunyuan(folder)
        for shard in target.glob("*.safetensors"):
            tensors: dict[str, Tensor] = {}
            for name, tensor in load_file(shard).items():
                stem = name.removesuffix(".weight")
                parts = change(tensor.float()) if ".experts." in name else {".weight": tensor}
                whole = parts if stem != name else {"": tensor}
                tensors |= {stem + end: value.contiguous() for end, value in whole.items()}
            save_file(tensors, shard)
        (target / "model.safetensors.index.json").unlink()
        return target

    return made


def as_bytes(data: object) -> Tensor:
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def bitsandbytes(matrix: Tensor) -> dict[str, Tensor]:
    """NF4 with doubly quantized scales."""
    blocks = matrix.numel() // 16
    state = {
        "quant_type": "nf4", "blocksize": 16, "dtype": "bfloat16", "shape": list(matrix.shape),
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5,
    }  # fmt: skip
    return {
        ".weight": torch.full((matrix.numel() // 2, 1), 0x5A, dtype=torch.uint8),
        ".weight.quant_map": torch.tensor(NF4_LEVELS),
        ".weight.absmax": torch.full((blocks,), 7, dtype=torch.uint8),
        ".weight.nested_absmax": torch.ones(-(-blocks // 256)),
        ".weight.nested_quant_map": torch.linspace(-1, 1, 256),
        ".weight.quant_state.bitsandbytes__nf4": as_bytes(state),
    }


def bitsandbytes8(matrix: Tensor) -> dict[str, Tensor]:
    return {".weight": matrix.sign().to(torch.int8), ".SCB": torch.ones(len(matrix))}


def comfy_quant(matrix: Tensor) -> dict[str, Tensor]:
    return {
        ".weight": matrix.to(torch.float8_e4m3fn),
        ".weight_scale": torch.ones(()),
        ".comfy_quant": as_bytes({"format": "float8_e4m3fn", "params": {"convrot": False}}),
    }


def prompt_file(folder: Path) -> Path:
    text = 't2i = "say it"\nen_unified = """Edit.\nThe image."""\nmore = "a" "b"\n'
    (folder / "system_prompt.py").write_text(text)
    return folder / "system_prompt.py"


# -- conditions ----------------------------------------------------------------------------------------


def plain_condition(folder: Path) -> Path:
    save_file({"states": torch.ones(1, 3, 8)}, folder / "plain.safetensors")
    return folder / "plain.safetensors"


def asked(generator: Callable[[], ParameterGenerator]) -> Callable[[Path], Path]:
    """A generator beside a condition of `hywu condition`'s form: parts, a mask, an origin."""

    def make(folder: Path) -> Path:
        made = generator()
        (folder / "asked").mkdir()
        save_generator(made, folder / "asked" / "generator")
        parts = {name: torch.ones(2, 3, width) for name, width in made.config.condition.items()}
        masks = {name: torch.tensor([[True] * 3, [True, True, False]]) for name in parts}
        origin = {"instruction": ["a", "b"], "encoder": "toy", "images": 2}
        Condition(parts, masks, "f", origin).save(folder / "asked" / "condition")
        return folder / "asked"

    return make


def generate(path: Path) -> None:
    files = [path / f"{name}.safetensors" for name in ("generator", "condition")]
    with tempfile.TemporaryDirectory() as out:
        succeeds_or_says(
            "generate", "--checkpoint", files[0], "--condition", files[1], "--out", Path(out) / "lora"
        )  # fmt: skip


# -- training ------------------------------------------------------------------------------------------

ROWS = [("a", "a hat"), ("b", "no hat")]


def _pixels(color: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (color, 90, 9)).save(stream, "PNG")
    return stream.getvalue()


def pairs_rows(folder: Path) -> Path:
    target = folder / "rows"
    target.mkdir()
    lines = []
    for name, text in ROWS:
        (target / f"{name}.png").write_bytes(_pixels(len(name)))
        row = {"source": f"{name}.png", "target": f"{name}.png", "instruction": text, "task": "hat"}
        lines.append(json.dumps({**row, "references": [f"{name}.png"]}))
    (target / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return target


def _samples() -> dict[str, bytes]:
    files = {}
    for name, text in ROWS:
        files |= {f"{name}.source.png": _pixels(1), f"{name}.target.png": _pixels(2)}
        files[f"{name}.json"] = json.dumps({"instruction": text, "task": "hat"}).encode()
    files["b.txt"] = b"no hat"
    return files


def pairs_files(folder: Path) -> Path:
    (folder / "side").mkdir()
    for name, data in _samples().items():
        (folder / "side" / name).write_bytes(data)
    return folder / "side"


def pairs_tar(folder: Path) -> Path:
    with tarfile.open(folder / "pairs.tar", "w") as archive:
        for name, data in _samples().items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder / "pairs.tar"


def pairs_parquet(folder: Path) -> Path:
    rows = [
        {"source": {"bytes": _pixels(1), "path": "a"}, "target": _pixels(2), "instruction": text, "task": "hat"}
        for _, text in ROWS
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def read_training_pairs(path: Path) -> None:
    pairs_identity(read_pairs(path)[0])


def _trained() -> tuple[dict[str, torch.nn.Parameter], Average, torch.optim.AdamW]:
    parameters = {"a": torch.nn.Parameter(torch.ones(3, 4)), "b": torch.nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    return parameters, Average(parameters, 0.99), optimizer


def training_state(folder: Path) -> Path:
    parameters, average, optimizer = _trained()
    sum(p.sum() for p in parameters.values()).backward()
    optimizer.step()
    header = {
        "config": {"precision": "float32", "steps": 9},
        "identity": {"rank": 4},
        "seconds": 1.5,
    }
    save_state(folder / "state.safetensors", 3, parameters, average, optimizer, header)
    return folder / "state.safetensors"


def read_training_state(path: Path) -> None:
    recorded_precision(path)
    load_state(path, *_trained())


def training_log(folder: Path) -> Path:
    lines = [",".join(LOG)] + [",".join(str(i + k / 8) for k in range(len(LOG))) for i in range(4)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder / "log.csv"


def fine_tuned(folder: Path) -> Path:
    return save_tensors(folder / "sft", _editor().state_dict(), {"strategy": "sft", "task": "blur"})


@cache
def _editor() -> torch.nn.Module:
    return load_editor(bundled("editor"))


# -- evaluation ----------------------------------------------------------------------------------------


def session(folder: Path) -> Path:
    target = make_session(folder)
    store = Store(target)
    pair = next(iter(store.pairs))
    store.add_vote("ann", pair, "good", True)
    store.close()
    return target


def read_session(path: Path) -> None:
    store = Store(path)
    store.votes()
    store.voted("ann")
    store.close()
    succeeds_or_says("eval", "gsb", "report", path)


def packed_gedit(folder: Path) -> Path:
    (folder / "packed").mkdir()
    images = ("input_image", "input_image_raw")
    row = {**dict.fromkeys(FIELDS, "x"), **{name: {"bytes": _pixels(3)} for name in images}}
    row |= {"key": "k1", "task_type": "color_alter", "instruction_language": "en"}
    pq.write_table(pa.Table.from_pylist([row, row]), folder / "packed" / "train.parquet")
    return folder / "packed"


def unpack_gedit(path: Path) -> None:
    with tempfile.TemporaryDirectory() as out:
        read_items("gedit", unpack(packed_files(path), Path(out)))


def their_csv(folder: Path) -> Path:
    row = dict.fromkeys(COLUMNS, "x") | {"sementics_score": "7.5", "quality_score": "6"}
    lines = [",".join(row), *[",".join(row.values())] * 3]
    (folder / "style_change_en_vie_score.csv").write_text("\n".join(lines) + "\n")
    return folder / "style_change_en_vie_score.csv"


def their_result(folder: Path) -> Path:
    answers = dict.fromkeys(("1082", "278"), "Brief: fine.\nScore: 4\n4\n5\n")
    (folder / "result.json").write_text(json.dumps(answers))
    return folder / "result.json"


def failures(folder: Path) -> Path:
    (folder / "run").mkdir()
    lines = [json.dumps({"item": f"i{i}", "error": "no"}) for i in range(3)]
    (folder / "run" / "failures.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "run"


# -- experiments ---------------------------------------------------------------------------------------


def experiment(folder: Path) -> Path:
    from hywu_core.experiments.conflict.plan import ConflictPlan
    from hywu_core.experiments.tasks import VERSION

    (folder / "conflict").mkdir()
    told = {
        "plan": as_json(ConflictPlan().to_json()),
        "editor": {"editor": editor_identity(load_editor())},
        "tasks": VERSION,
    }
    (folder / "conflict" / "plan.json").write_text(json.dumps(told))
    return folder / "conflict"


def read_experiment(path: Path) -> None:
    experiment_plan(path)
    succeeds_or_says("inspect", path)


def folder_kinds(generator: Callable[[], ParameterGenerator]) -> tuple:
    """Rows as of `fuzz_kinds.KINDS`. generator: makes a small one."""
    return (
        ("HunyuanImage-3 folder", hunyuan, read_hunyuan),
        *((f"quantized to {m}", quantized(m), read_quantized) for m in ("fp8", "int8", "nf4")),
        ("comfy_quant folder", by_another(comfy_quant), read_quantized),
        ("bitsandbytes folder", by_another(bitsandbytes), read_quantized),
        ("bitsandbytes 8 bits folder", by_another(bitsandbytes8), read_quantized),
        ("system prompt", prompt_file, lambda path: system_prompt(path.parent, "en_unified", path)),
        ("plain condition", plain_condition, Condition.load),
        ("condition and generator", asked(generator), generate),
        ("pairs in rows", pairs_rows, read_training_pairs),
        ("pairs side by side", pairs_files, read_training_pairs),
        ("pairs in a tar", pairs_tar, read_training_pairs),
        ("pairs in parquet", pairs_parquet, read_training_pairs),
        ("training state", training_state, read_training_state),
        ("training log", training_log, read_log),
        ("fine-tuned editor", fine_tuned, lambda path: load_fine_tuned(_editor(), path)),
        ("voting session", session, read_session),
        ("packed gedit", packed_gedit, unpack_gedit),
        ("gedit's CSV", their_csv, lambda path: read_csv(path, "style_change")),
        ("imgedit's answers", their_result, lambda path: their_table(path, _imgedit())),
        ("failures", failures, read_failures),
        ("experiment", experiment, read_experiment),
    )


@cache
def _imgedit() -> ItemList:
    return read_items("imgedit", find_benchmark("imgedit").sample)
