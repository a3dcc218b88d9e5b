"""`hywu inspect | generate | convert`, called in process, and once as a program."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hywu_core
from hywu_core import HYWUError, load_generator, load_lora
from hywu_core.bases.hunyuan_image3.editing import Sampling
from hywu_core.bases.hunyuan_image3.thinking import Sampler
from hywu_core.cli import generate as generate_command
from hywu_core.cli import inspect as inspect_command
from hywu_core.cli import main
from hywu_core.errors import need
from hywu_core.evaluation.store import Judgement, JudgementStore, StoreName
from hywu_core.files import HEADER, read_header, write_json

ROOT = Path(__file__).parents[2]
DENSE = Path(__file__).parent / "golden" / "dense"


@pytest.fixture
def condition(tmp_path):
    path = tmp_path / "condition.safetensors"
    save_file({"condition": load_file(DENSE / "expected.safetensors")["condition"]}, path)
    return path


@pytest.fixture
def lora(tmp_path, condition):
    out = tmp_path / "lora.safetensors"
    args = ["--checkpoint", str(DENSE), "--condition", str(condition), "--out", str(out)]
    assert main(["generate", *args, "--rope-precision", "float32"]) == 0
    return out


def test_generate_writes_what_the_golden_case_expects(lora):
    expected = load_file(DENSE / "expected.safetensors")
    made = load_lora(lora)
    assert made.batch_size == 2
    for path, pair in made.items():
        for side, value in zip("AB", pair, strict=True):
            wanted = expected[f"fp32/{path}.lora_{side}"]
            assert (value - wanted).norm() / wanted.norm() < 1e-5


def test_generate_one_item_in_another_format_and_dtype(tmp_path, condition, capsys):
    out = tmp_path / "one.safetensors"
    args = ["--checkpoint", str(DENSE), "--condition", str(condition), "--out", str(out)]
    args += ["--format", "comfyui", "--dtype", "bfloat16", "--item", "1"]
    assert main(["generate", *args]) == 0
    assert load_lora(out).dtype == torch.bfloat16
    assert main(["generate", *args]) == 1
    assert "exists already" in capsys.readouterr().err


def test_generate_within_a_budget_and_in_8_bits(tmp_path, condition, lora, capsys):
    whole = load_lora(lora)
    arguments = ["generate", "--checkpoint", str(DENSE), "--condition", str(condition)]
    for name, options in {"budget": ["--memory-budget", "4MB"], "fp8": ["--dtype", "fp8"]}.items():
        out = tmp_path / f"{name}.safetensors"
        precise = ["--rope-precision", "float32", "--out", str(out)]
        assert main([*arguments, *precise, *options]) == 0
        said = "of 2 blocks stay on the device" in capsys.readouterr().out
        assert said == (name == "budget")
        made = load_lora(out)
        apart = [
            ((made.factors[k].float() - v.float()).norm() / v.float().norm()).item()
            for k, v in whole.factors.items()
        ]
        assert max(apart) == 0 if name == "budget" else 0.005 < max(apart) < 0.15
    tight = [*arguments, "--out", str(tmp_path / "x"), "--memory-budget", "1kb"]
    assert main(tight) == 1
    assert (
        "memory_budget is 1,000 bytes, but this generator needs at least" in capsys.readouterr().err
    )
    assert main([*tight, "--dtype", "fp8"]) == 1
    assert "give one of the two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*tight[:-1], "much"])
    assert "write one such as 12GB" in capsys.readouterr().err


def test_generate_refuses_a_condition_with_nan(tmp_path, capsys):
    path = tmp_path / "nan.safetensors"
    save_file({"condition": torch.full((1, 2, 3), float("nan"))}, path)
    out = tmp_path / "x.safetensors"
    args = ["--checkpoint", str(DENSE), "--condition", str(path), "--out", str(out)]
    assert main(["generate", *args]) == 1
    assert "not finite" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("tensor", "options", "words"),
    [
        (torch.ones(1, 3, 7), [], "(7 wide); this generator takes hidden_states (48 wide)"),
        (torch.ones(1, 0, 48), [], "no zero among them"),
        (torch.ones(2, 3, 48), ["--format", "peft"], "choose one with --item"),
        (torch.ones(2, 3, 48), ["--item", "2"], "Item 2 is out of range: the condition has 2"),
        (torch.ones(1, 3, 48), ["--device", "banana"], "torch knows no such device"),
    ],
)
def test_generate_finds_what_can_not_work_before_it_reads_weights(
    tmp_path, capsys, monkeypatch, tensor, options, words
):
    def read(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(generate_command, "load_generator", read)
    path = tmp_path / "c.safetensors"
    save_file({"condition": tensor}, path)
    args = ["--checkpoint", str(DENSE), "--condition", str(path), "--out", str(tmp_path / "x")]
    assert main(["generate", *args, *options]) == 1
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("hywu generate: ")
    assert err.count("\n") == 1


def test_generate_sees_a_file_whose_suffix_was_left_out(lora, condition, capsys):
    out = lora.with_suffix("")
    args = ["--checkpoint", str(DENSE), "--condition", str(condition), "--out", str(out)]
    assert main(["generate", *args]) == 1
    assert "lora.safetensors: exists already" in capsys.readouterr().err


def test_inspect_checkpoint_counts_every_parameter(capsys):
    assert main(["inspect", str(DENSE), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    tensors = load_file(DENSE / "model.safetensors")
    assert shown["parameters"] == sum(t.numel() for t in tensors.values())
    assert shown["layout"] == load_generator(DENSE).config.layout.to_json()
    assert main(["inspect", str(DENSE)]) == 0
    assert "out x in" in capsys.readouterr().out
    assert main(["inspect", str(DENSE), "--norms"]) == 1


def test_inspect_lora_norms(lora, capsys):
    assert main(["inspect", str(lora), "--norms", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    made = load_lora(lora)
    path = next(iter(made))
    pair = made[path]
    direct = torch.linalg.matrix_norm(made.scale * pair.B @ pair.A)
    torch.testing.assert_close(torch.tensor(shown["norms"][path]), direct)
    assert main(["inspect", str(lora)]) == 0
    assert "norm of each item" not in capsys.readouterr().out
    assert main(["inspect", str(lora), "--norms"]) == 0
    assert "norm of each item" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda header: header.pop("layout"), "the LoRA's header lacks 'layout'"),
        (lambda header: header["layout"].update(rank="abc"), "LoRA layout: the description is dam"),
    ],
)
def test_inspect_a_lora_whose_header_is_damaged(lora, capsys, damage, words):
    tensors, header = load_file(lora), read_header(lora)
    damage(header)
    broken = lora.with_name("broken.safetensors")
    save_file(tensors, broken, metadata={HEADER: json.dumps(header)})
    for options in ([], ["--norms"]):
        assert main(["inspect", str(broken), *options]) == 1
        assert capsys.readouterr().err.startswith(f"hywu inspect: {broken}: {words}")


def test_inspect_a_folder_of_neither_kind(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no PEFT folder" in capsys.readouterr().err


def test_convert_generators_and_loras(tmp_path, lora, capsys):
    own, back = tmp_path / "own.safetensors", tmp_path / "official"
    assert main(["convert", str(DENSE), str(own)]) == 0
    assert main(["convert", str(own), str(back), "--format", "official"]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (DENSE, back))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    adapter, comfy = tmp_path / "adapter", tmp_path / "comfy.safetensors"
    assert main(["convert", str(lora), str(adapter), "--format", "peft", "--item", "1"]) == 0
    assert main(["convert", str(adapter), str(comfy), "--format", "comfyui"]) == 0
    first, last = load_lora(lora).select(1), load_lora(comfy)
    assert all(torch.equal(last.factors[key], value) for key, value in first.factors.items())
    capsys.readouterr()
    for args, words in (
        ((DENSE, "x", "--format", "peft"), "is a generator"),
        ((lora, "x", "--format", "official"), "no generator"),
        ((lora, "x", "--format", "peft"), "select(i)"),
        ((tmp_path / "nothing.safetensors", "x"), "no such file"),
    ):
        assert main(["convert", *map(str, args)]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "condition", "generate", "convert"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"hywu {command} " in capsys.readouterr().out.partition("Example")[2]


def test_as_a_program_errors_have_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hywu_core.cli", "inspect", str(tmp_path / "no.safetensors")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("hywu inspect: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "x.bin"), 1, "Permission denied: x.bin"),
        (MemoryError(), 1, "not enough memory for this"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB."),
            1,
            "not enough memory for this",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_system_errors_and_ctrl_c_are_one_sentence(monkeypatch, capsys, error, code, words):
    def run(args):
        raise error

    monkeypatch.setattr(inspect_command, "run", run)
    assert main(["inspect", str(DENSE)]) == code
    assert capsys.readouterr().err == f"hywu inspect: {words}\n"


def test_a_missing_optional_package_is_asked_for_by_name():
    with pytest.raises(
        HYWUError, match=r"zzz is needed to test: install it with `pip install zzz`"
    ):
        need("zzz.part", "to test")


def test_other_errors_are_not_hidden(monkeypatch):
    def run(args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(inspect_command, "run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["inspect", str(DENSE)])


def test_bare_shows_its_help_and_version_its_number(capsys):
    assert main([]) == 0
    assert "hywu COMMAND --help" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"hywu {hywu_core.__version__}\n"


def test_texts_that_a_console_cannot_show_are_escaped(tmp_path):
    path = tmp_path / "图.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "hywu_core.cli", "inspect", str(path)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"hywu inspect: ")
    assert b"\\u56fe.safetensors: there is no such file" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_what_of_a_foreign_lora_cannot_be_read_is_left_out_only_when_asked(tmp_path, capsys):
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    matrices = {"a.0.q.lora_A.weight": torch.ones(2, 6), "a.0.q.lora_B.weight": torch.ones(5, 2)}
    save_file({**matrices, "a.0.q.dora_scale": torch.ones(5)}, path)
    assert main(["convert", str(path), str(out)]) == 1
    assert "1 of 2 entries can't be read: a.0.q.dora_scale" in capsys.readouterr().err
    assert not out.exists()
    assert main(["convert", str(path), str(out), "--skip-missing"]) == 0
    assert "left out: 1 entries: a.0.q.dora_scale\n" in capsys.readouterr().out
    assert load_lora(out).provenance["left_out"]["count"] == 1


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def files(tmp_path, lora):
    """Files of ours, one of each kind."""
    made = load_lora(lora)
    provenance = {f"field {i}": {"nested": list(range(50))} for i in range(30)}
    wide = hywu_core.GeneratedLoRA(
        made.layout, made.factors, {**provenance, "instruction": "x" * 900}
    )
    condition = hywu_core.Condition({"text": torch.ones(1, 3, 4)}, {}, "f", {"instruction": ["a"]})
    results = tmp_path / "results"
    results.mkdir()
    write_json(results / "hywu_run.json", {"format": "hywu-results-1", "benchmark": "folder"})
    (results / "00001.png").write_bytes(b"x" * 10)
    name = StoreName("gpt", "chat-1", "wu-eval", "ours-1")
    with JudgementStore(tmp_path, name, writable=True) as store:
        store.append(Judgement("t/en/1", "wu-eval", "p", "q", "answered", "{}"))
        store.append(Judgement("t/en/2", "wu-eval", "p", "q", "failed", "{}"))
    return {
        "generator": DENSE,
        "hywu-lora-1": wide.save(tmp_path / "wide"),
        "hywu-lora-peft-1": wide.select(0).save(tmp_path / "peft", "peft"),
        "hywu-condition-1": condition.save(tmp_path / "made condition"),
        "hywu-editor-1": next((ROOT / "hywu_core").rglob("weights/editor.safetensors")),
        "evaluation results": results,
        "hywu-judgements-1": store.path,
    }


KINDS = (
    "generator", "hywu-lora-1", "hywu-lora-peft-1", "hywu-condition-1", "hywu-editor-1",
    "evaluation results", "hywu-judgements-1",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_knows_our_files_and_fits_a_screen(files, kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["inspect", str(files[kind])]) == 0
    shown = lines_of(capsys)
    assert shown[0].replace("2", "1") == f"kind: {kind}"
    assert len(shown) <= 24
    assert max(map(len, shown)) <= 80
    assert main(["inspect", str(files[kind]), "--full"]) == 0
    full = lines_of(capsys)
    assert not [line for line in full if "--full" in line]
    if kind == "hywu-lora-1":
        assert any("--full" in line for line in shown)
        assert any("x" * 900 in line for line in full)
    assert main(["inspect", str(files[kind]), "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_inspect_tells_a_condition_and_judgements(files, capsys):
    assert main(["inspect", str(files["hywu-condition-1"])]) == 0
    assert any(line.startswith("parts.text [1, 3, 4]") for line in lines_of(capsys))
    assert main(["inspect", str(files["hywu-judgements-1"])]) == 0
    shown = lines_of(capsys)
    assert [line.split() for line in shown[-2:]] == [["answered", "1"], ["failed", "1"]]


def test_inspect_shows_nothing_that_steers_a_terminal(tmp_path, lora, capsys):
    made = load_lora(lora)
    marked = hywu_core.GeneratedLoRA(made.layout, made.factors, {"instruction": "a\x1b[2Jb\u202ec"})
    assert main(["inspect", str(marked.save(tmp_path / "marked"))]) == 0
    out = capsys.readouterr().out
    assert "a\\x1b[2Jb\\u202ec" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("format", ["comfyui", "peft"])
def test_inspect_does_not_believe_a_header(tmp_path, lora, capsys, format):
    path = load_lora(lora).select(0).save(tmp_path / "x", format)
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    with safe_open(str(weights), "pt") as file:
        metadata = file.metadata()
    tensors = load_file(weights)
    tensors.pop(next(key for key in tensors if not key.endswith("alpha")))
    save_file(tensors, weights, metadata=metadata)
    assert main(["inspect", str(path)]) == 1
    assert "another program changed it" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_that_are_none(value, capsys):
    for words in (
        ["hunyuan", "plan", "folder", f"--budget={value}"],
        ["eval", "score", "results", f"--price-in={value}"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert f"{value} is no finite number" in capsys.readouterr().err
    for make in (
        lambda: Sampling(4, float(value), 3.0),
        lambda: Sampling(4, 2.5, float(value)),
        lambda: Sampling(4, 2.5, 0.0),
        lambda: Sampler(float(value)),
        lambda: Sampler(1.0, 0, float(value)),
    ):
        with pytest.raises(HYWUError, match="finite number"):
            make()


@pytest.mark.skipif(os.name == "nt", reason="shells of POSIX systems close streams")
@pytest.mark.parametrize(
    ("stream", "code"),
    [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("> /dev/full", 1), (">/dev/full 2>&1", 1)],
)
def test_streams_that_are_closed_or_full_end_in_a_code_not_in_a_traceback(
    tmp_path, lora, stream, code
):
    if "full" in stream and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    command = f"{shlex.quote(sys.executable)} -m hywu_core.cli inspect {shlex.quote(str(lora))}"
    log = tmp_path / "log"
    more = "" if "2>" in stream else f" 2> {shlex.quote(str(log))}"
    found = subprocess.run(["sh", "-c", f"{command} {stream}{more}"], cwd=ROOT, timeout=120)
    assert found.returncode == code
    said = log.read_text() if log.exists() else ""
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    assert len(said.splitlines()) == (1 if "full" in stream and log.exists() else 0)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["edit", "{image}", "blur it", "--out=--"], 2, "'--' is no value"),
        (["edit", "{image}", "blur it", "--out", "o.png", "--steps=--"], 2, "'--' is no value"),
        (["edit", "{image}", "blur it", "--out", "o.png", "--max-side", "0"], 1, "side of 0 pix"),
        (["edit", "{image}", "blur it", "--out", "o.png", "--max-side=-8"], 1, "side of -8 pix"),
        (["generate", "--memory-budget", "9" * 400], 2, "is no size"),
        (["generate", "--memory-budget", "99999999999GB"], 2, "is no size"),
    ],
)
def test_values_that_no_option_takes(tmp_path, monkeypatch, capsys, words, code, said):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    try:
        found = main([word.format(image=tmp_path / "photo.png") for word in words])
    except SystemExit as error:
        found = error.code
    assert found == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o.png").exists()
