"""Quantized folders: what is written, resumed, refused; how they load, with LoRAs and offloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hunyuan_golden import BASE, SYSTEM, copy_folder, distance, generator, golden, pipeline, source
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.measure import peak_memory
from hywu_core import HYWUError
from hywu_core.bases.hunyuan_image3 import Pipeline, Request, open_folder
from hywu_core.bases.hunyuan_image3.banks import CodedBank, OffloadedBank
from hywu_core.bases.hunyuan_image3.checkpoint import read_heads
from hywu_core.bases.hunyuan_image3.codecs import NF4_LEVELS, codec_of, relative_error
from hywu_core.bases.hunyuan_image3.quantize import WORK, errors_of, quantize, quantized_bytes
from hywu_core.cli.main import main

METHODS = ["fp8", "int8", "nf4"]
#: Relative error of a normal matrix, and how far it may be off.
ERRORS = {"fp8": 0.025, "int8": 0.006, "nf4": 0.091}


@pytest.fixture(scope="module", params=METHODS)
def quantized(request, tmp_path_factory):
    return quantize(BASE, tmp_path_factory.mktemp("quantized") / request.param, request.param)


@pytest.fixture(scope="module")
def request_() -> Request:
    metadata = golden("edit").metadata
    return Request(metadata["prompt"], [source()], "", "128x128", 1)


def load(folder: Path, **how) -> Pipeline:
    return Pipeline.load(folder, dtype=torch.float32, system=SYSTEM, **how)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def decoded_folder(quantized: Path, target: Path) -> Path:
    """The same weights as an official folder in float32, by the written tensors alone."""
    shutil.copytree(quantized, target)
    folder = open_folder(quantized)
    index = {}
    for shard in sorted(set(folder.files.values())):
        names = [n for n in folder.shapes if folder.files[n] == shard]
        save_file({n: folder.read(n).contiguous() for n in names}, target / shard.name)
        index |= dict.fromkeys(names, shard.name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), "utf-8")
    return target


def condition(p: Pipeline, request: Request) -> torch.Tensor:
    return p.condition([request]).parts["hidden_states"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [64, 48, 33])
def test_codecs(method, width):
    matrix = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    codec = codec_of(method)
    coded = codec.encode(matrix)
    assert {n: (t.shape[1], t.dtype) for n, t in coded.items()} == codec.row(width)
    lost, size = relative_error(coded, codec, matrix)
    assert (lost / size) ** 0.5 == pytest.approx(ERRORS[method], rel=0.2)
    rows = {name: part[5:9] for name, part in coded.items()}
    whole = codec.decode(coded, torch.empty(40, width))
    assert torch.equal(codec.decode(rows, torch.empty(4, width)), whole[5:9])
    zeros = codec.encode(torch.zeros(2, width))
    assert not codec.decode(zeros, torch.ones(2, width)).any()


def test_only_experts_are_quantized(quantized):
    method = quantized.name
    before, after = open_folder(BASE), open_folder(quantized)
    assert all(".experts." in name for name in after.quantized)
    assert len(after.quantized) == 3 * 8 * 2
    assert after.shapes == before.shapes
    for name in set(before.shapes) - set(after.quantized):
        assert torch.equal(after.read(name), before.read(name))
    assert sum(h.stop - h.start for h in after.heads.values()) == quantized_bytes(before, method)
    for error in errors_of(quantized).values():
        assert error == pytest.approx(ERRORS[method], rel=0.25)


def test_it_loads_like_the_folder_with_a_lora(quantized, tmp_path, request_):
    """Equal bit by bit to the dequantized weights with the same LoRA, also offloaded."""
    plain = load(decoded_folder(quantized, tmp_path / "decoded"))
    resident = load(quantized)
    assert isinstance(resident.model.model.layers[0].mlp.experts.w2, CodedBank)
    whole = resident.offloaded.placement
    # what a decoded matrix takes, and a byte too little for all layers beside it
    one = whole.decode_bytes - 7 * 64 * 48 * 4
    fixed, layer = whole.fixed_bytes + one, whole.layer_bytes[0]
    small = load(quantized, budget=fixed + 3 * layer - 1, rest="ram")
    assert len(small.offloaded.placement.resident) < 2
    assert isinstance(small.model.model.layers[2].mlp.experts.w2, OffloadedBank)
    lora = generator()(pipeline().condition([request_]))
    wanted = plain.sample([request_], lora, steps=1)
    assert not torch.equal(wanted, plain.sample([request_], steps=1))
    for p in (resident, small, load(quantized, budget=fixed + layer // 2, rest="file")):
        assert torch.equal(p.sample([request_], lora, steps=1), wanted)
    placement = small.offloaded.placement
    assert placement.total_bytes < fixed + 3 * layer
    bank = resident.model.model.layers[0].mlp.experts.w1
    made = bank.workspace.decode(bank.source, list(bank.coded), torch.float32)
    assert made.data_ptr() == bank.workspace._flat.data_ptr()  # no memory of its own
    held = sum(v.nbytes for v in small.model.parameters()) + small.offloaded.nbytes
    others = (small.vae, small.encode_source.tower, small.encode_source.aligner)
    held += sum(v.nbytes for m in others for v in m.parameters())
    assert held == placement.total_bytes


@pytest.mark.parametrize("method", METHODS)
def test_decoding_holds_what_its_budget_says(method):
    codec, matrix = codec_of(method), torch.randn(300, 200)
    coded, out = codec.encode(matrix), torch.empty(300, 200, dtype=torch.bfloat16)
    held = peak_memory(lambda: codec.decode(coded, out))
    assert 0.98 * codec.scratch_bytes(300, 200) < held <= codec.scratch_bytes(300, 200)


def test_the_least_budget_of_a_quantized_folder(quantized):
    """One matrix stored twice and decoded once beside the fixed weights; of a byte less, dense parts are dropped."""
    codec, placement = codec_of(quantized.name), load(quantized).offloaded.placement
    largest = max(64 * codec.row_bytes(48), 48 * codec.row_bytes(64))
    least = placement.fixed_bytes + 2 * largest + placement.decode_bytes - 7 * 64 * 48 * 4
    kept = load(quantized, budget=least).offloaded.placement
    assert (kept.total_bytes, kept.dropped) == (least, 0)
    assert load(quantized, budget=least - 1).offloaded.placement.dropped > 0
    with pytest.raises(HYWUError, match="one that is decoded") as caught:
        load(quantized, budget=1)
    smallest = int(str(caught.value).split("at least ")[1].split()[0].replace(",", ""))
    assert load(quantized, budget=smallest).offloaded.placement.total_bytes == smallest < least
    with pytest.raises(HYWUError, match=f"at least {smallest:,} "):
        load(quantized, budget=smallest - 1)


def test_finished_shards_are_kept(tmp_path, monkeypatch):
    from hywu_core.bases.hunyuan_image3 import quantize as module

    write, calls = module._write_shard, []

    def stop(folder, shard, target, *more):
        calls.append(shard.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(folder, shard, target, *more)

    monkeypatch.setattr(module, "_write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(BASE, tmp_path / "out", "int8")
    with pytest.raises(HYWUError, match=r"was begun as int8 .* fp8 is asked for"):
        quantize(BASE, tmp_path / "out", "fp8")
    quantize(BASE, tmp_path / "out", "int8")
    assert calls == [calls[0], calls[1], calls[1], calls[-1]]


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    from hywu_core.bases.hunyuan_image3 import quantize as module

    out = tmp_path / "out"
    command = ["hunyuan", "quantize", str(BASE), str(out), "--experts", "nf4"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert main(command) == 1
    assert "the disk has 1,000; free" in capsys.readouterr().err
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_put", full)
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert said.count("\n") == 1
    assert not out.exists()
    kept = sorted(file.name for file in (tmp_path / f"out{WORK}").glob("*.safetensors"))
    assert len(kept) == 2
    for name in kept:
        read_heads(tmp_path / f"out{WORK}" / name)
    monkeypatch.undo()
    assert main(command) == 0


def test_the_command_and_what_it_refuses(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["hunyuan", "quantize", str(BASE), str(out), "--experts", "int8"]) == 0
    said = capsys.readouterr().out
    assert [f"layer {i}: relative error of the experts 0.00" in said for i in range(3)] == [
        True
    ] * 3
    assert main(["hunyuan", "inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"] == "int8"
    assert main(["hunyuan", "quantize", str(BASE), str(out), "--experts", "int8"]) == 1
    assert "exists; choose another name" in capsys.readouterr().err
    again = ["hunyuan", "quantize", str(out), str(tmp_path / "again"), "--experts", "nf4"]
    assert main(again) == 1
    assert "holds int8 weights already" in capsys.readouterr().err


# -- folders of other programs -----------------------------------------------------------------------


def edit_experts(folder: Path, change) -> Path:
    """A copy whose matrices of experts are what `change(stem, matrix)` gives."""
    for shard in folder.glob("*.safetensors"):
        made: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(shard).items():
            if ".experts." in name:
                made |= change(name.removesuffix(".weight"), tensor.float())
            else:
                made[name] = tensor
        save_file({n: t.contiguous() for n, t in made.items()}, shard)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def as_bytes(data: dict) -> torch.Tensor:
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


def bitsandbytes(nested: bool, block: int):
    """Packed as bitsandbytes packs: flat blocks, the first number of two in the high half."""

    def change(stem: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        levels = torch.tensor(NF4_LEVELS)
        blocks = matrix.reshape(-1, block)
        absmax = blocks.abs().amax(dim=1)
        codes = ((blocks / absmax[:, None])[..., None] - levels).abs().argmin(dim=-1).flatten()
        packed = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None]
        state = {
            "quant_type": "nf4",
            "blocksize": block,
            "dtype": "bfloat16",
            "shape": list(matrix.shape),
        }
        made = {".weight": packed, ".weight.quant_map": levels, ".weight.absmax": absmax}
        if nested:
            table, offset = torch.linspace(-1, 1, 256), absmax.mean()
            rest = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
            outer = rest.abs().amax(dim=1)
            near = ((rest / outer[:, None])[..., None] - table).abs().argmin(dim=-1)
            made[".weight.absmax"] = near.flatten()[: len(absmax)].to(torch.uint8)
            made |= {".weight.nested_absmax": outer, ".weight.nested_quant_map": table}
            state |= {
                "nested_blocksize": 256,
                "nested_dtype": "float32",
                "nested_offset": float(offset),
            }
        made[".weight.quant_state.bitsandbytes__nf4"] = as_bytes(state)
        return {stem + name: value for name, value in made.items()}

    return change


def comfy(kind: str, per_row: bool, **more):
    def change(stem: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        largest = 127.0 if kind == "int8_tensorwise" else 448.0
        scale = matrix.abs().amax(dim=1) if per_row else matrix.abs().amax()
        scale = scale / largest
        codes = matrix / (scale[:, None] if per_row else scale)
        dtype = torch.int8 if kind == "int8_tensorwise" else torch.float8_e4m3fn
        codes = codes.round() if dtype is torch.int8 else codes
        marker = as_bytes({"format": kind, **more})
        return {
            f"{stem}.weight": codes.to(dtype),
            f"{stem}.weight_scale": scale,
            f"{stem}.comfy_quant": marker,
        }

    return change


def bitsandbytes8(stem: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    largest = matrix.abs().amax(dim=1)
    codes = (matrix / largest[:, None] * 127).round().to(torch.int8)
    return {f"{stem}.weight": codes, f"{stem}.SCB": largest}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (bitsandbytes(False, 16), 0.1),
        (bitsandbytes(True, 16), 0.1),
        (bitsandbytes(True, 64), 0.12),
        (bitsandbytes8, 0.01),
        (comfy("float8_e4m3fn", False), 0.04),
        (comfy("int8_tensorwise", True), 0.01),
        (comfy("int8_tensorwise", False), 0.02),
    ],
)
def test_other_programs_folders_are_read(change, error, tmp_path):
    folder = edit_experts(copy_folder(tmp_path / "folder"), change)
    before, after = open_folder(BASE), open_folder(folder)
    assert len(after.quantized) == 3 * 8 * 2
    for name in after.quantized:
        assert distance(after.read(name), before.read(name)) < error


@pytest.mark.parametrize("change", [bitsandbytes(True, 16), bitsandbytes(True, 64)])
def test_other_programs_folders_run(change, tmp_path, request_):
    """Blocks that end where rows do stay as they are stored; others are decoded when they are read."""
    folder = edit_experts(copy_folder(tmp_path / "folder"), change)
    found = condition(load(folder), request_)
    assert torch.equal(
        found, condition(load(decoded_folder(folder, tmp_path / "decoded")), request_)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (comfy("int8_tensorwise", True, convrot=True), "with rotation"),
        (comfy("asym_w4a8_int8", True), "asym_w4a8_int8"),
        (lambda stem, m: {f"{stem}.weight": m.to(torch.float8_e4m3fn)}, "no marker beside"),
    ],
)
def test_what_cant_be_decoded_is_an_error_with_a_way_out(change, said, tmp_path):
    folder = edit_experts(copy_folder(tmp_path / "folder"), change)
    with pytest.raises(HYWUError, match=f"{said}.*hywu hunyuan quantize FOLDER OUT"):
        open_folder(folder)


def test_headers_say_everything(quantized):
    for shard in quantized.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            said = json.loads(file.metadata()["hywu"])
            assert said["quantized"]["experts"] in METHODS
            names = file.keys()
            experts = {n for n in names if ".experts." in n and n.endswith(".weight")}
            assert set(said["errors"]) == experts
