"""Generator checkpoints: both forms, their round trip, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hywu_core import (
    GeneratorConfig,
    HYWUError,
    LoRALayout,
    ParameterGenerator,
    load_generator,
    save_generator,
)
from hywu_core.cli import main
from hywu_core.files import HEADER, read_header
from hywu_core.generator import official
from hywu_core.generator.checkpoints import open_checkpoint
from hywu_core.generator.official import INDEX, save_official
from hywu_core.generator.tensors import file_tensors
from hywu_core.layout import Module, Stack

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path):
    """A copy of an official folder, to break."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "official").mkdir(exist_ok=True)
        shutil.copy(GOLDEN / "ragged" / name, tmp_path / "official" / name)
    return tmp_path / "official"


@pytest.fixture
def condition():
    return load_file(GOLDEN / "ragged" / "expected.safetensors")["condition"]


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps(data))


def edit_weights(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    path.unlink()
    edit(tensors)
    save_file(tensors, path)


def assert_same(one: ParameterGenerator, two: ParameterGenerator) -> None:
    for (name, value), (other, expected) in zip(file_tensors(one), file_tensors(two), strict=True):
        assert name == other
        assert torch.equal(value, expected)


def test_round_trip_through_every_form(folder, condition, tmp_path):
    first = load_generator(folder)
    own = load_generator(save_generator(first, tmp_path / "own"))
    sharded = load_generator(save_official(own, tmp_path / "shards", shard_bytes=500_000))
    single = load_generator(save_official(sharded, tmp_path / "single"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    with torch.no_grad():
        expected = first(condition)
        for other in (own, sharded, single):
            assert_same(other, first)
            assert other.config.layout == first.config.layout
            assert other.config.rope_precision == "bfloat16"
            lora = other(condition)
            assert all(torch.equal(lora.factors[k], v) for k, v in expected.factors.items())
    names = load_file(tmp_path / "single" / "model.safetensors").keys()
    assert names == load_file(folder / "model.safetensors").keys()


def test_shards_load_without_an_index(folder, tmp_path):
    save_official(load_generator(folder), tmp_path / "shards", shard_bytes=500_000)
    (tmp_path / "shards" / INDEX).unlink()
    assert_same(load_generator(tmp_path / "shards"), load_generator(folder))


def test_rewriting_leaves_no_shard_or_index_of_the_former(folder, tmp_path):
    generator, out = load_generator(folder), tmp_path / "out"
    save_official(generator, out, shard_bytes=500_000)
    (out / "README.md").write_text("mine")
    (out / "model_card.md").write_text("mine")
    others = {"config.json", "README.md", "model_card.md"}
    for options, weights in (
        ({}, {"model.safetensors"}),
        ({"shard_bytes": 2_000_000}, {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}),
    ):
        save_official(generator, out, overwrite=True, **options)
        index = {INDEX} if len(weights) > 1 else set()
        assert {file.name for file in out.iterdir()} == others | weights | index
        assert_same(load_generator(out), generator)


def test_rewriting_that_fails_leaves_the_former_whole(folder, tmp_path, monkeypatch):
    generator, out = load_generator(folder), tmp_path / "out"
    save_official(generator, out, shard_bytes=500_000)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    calls, whole = [], official.save_file

    def fails_at_the_second(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        whole(*args, **options)

    monkeypatch.setattr(official, "save_file", fails_at_the_second)
    generator.config = generator.config.with_(base="other")
    with pytest.raises(KeyboardInterrupt):
        save_official(generator, out, overwrite=True, shard_bytes=2_000_000)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from hywu_core import atomic, load_generator
from hywu_core.generator.official import save_official
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
former, zeros = load_generator(folder), load_generator(folder)
for parameter in zeros.parameters():
    parameter.detach().zero_()

def save_until(call):
    calls = []
    def at(name):
        whole = getattr(os, name)
        def killed(*args, **options):
            calls.append(name)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **options)
        setattr(os, name, killed)
    at("replace"), at("link"), at("unlink")
    save_official(zeros, out, overwrite=True, shard_bytes=500_000)

for call in range(1, 40):
    save_official(former, out, shard_bytes=500_000)
    child = os.fork()
    if child == 0:
        save_until(call)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    atomic.sweep(out.parent)
    sums = [float(p.abs().sum()) for p in load_generator(out).parameters()]
    left = [p.name for p in out.parent.glob(".*")]
    print(json.dumps([os.WIFSIGNALED(status) and os.WTERMSIG(status), sums, left]))
    shutil.rmtree(out)
    if status == 0:
        break
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_kill_at_any_rename_leaves_the_former_or_the_new(folder, tmp_path):
    """The former weights are no zeros, the new ones are; a child per call that it may be killed at."""
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out")]
    # a child of a process with threads might wait for them
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    for call, (_, sums, left) in enumerate(ends, 1):
        assert all(sums) or not any(sums), f"half and half after call {call}"
        assert left == []
    *killed, whole = ends
    assert [end[0] for end in killed] == [signal.SIGKILL] * len(killed)
    assert len(killed) >= 3
    assert whole[0] is False
    assert not any(whole[1])
    assert {all(end[1]) for end in killed} == {
        True,
        False,
    }  # before the rename that counts, and after it


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_pg_layers", 1_000_000, "num_blocks"),
        ("num_base_model_layers", 1_000_000_000, "more than 200,000 are no model's"),
        ("d_model", 1_000_000_000, "d_model 1,000,000,000"),
        ("input_dim", 1_000_000_000, "width of condition part"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_sizes_that_lie_are_found_before_anything_is_built(
    folder, capsys, key, value, words, command
):
    import resource

    edit_config(folder, **{key: value})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    target = [str(folder / "out.safetensors")] if command == "convert" else []
    started = time.perf_counter()
    assert main([command, str(folder), *target]) == 1
    assert time.perf_counter() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_the_official_form_takes_only_what_it_can_give_back(tmp_path):
    def generator(*modules):
        layout = LoRALayout((Stack(("l.0", "l.1"), modules),), 2, 2.0)
        made = ParameterGenerator(GeneratorConfig(layout, {"text": 3}, 8, 1, 8, 4, 1))
        made.reset_parameters()
        return made

    def expert(name):
        return Module(name, 8, 8, 3)

    kept = generator(expert("experts.w1"), expert("experts.w2"), Module("fc", 8, 8))
    loaded = load_generator(save_official(kept, tmp_path / "kept"))
    assert loaded.config.layout == kept.config.layout
    assert dict(loaded.config.condition) == {"text": 3}
    for modules in (
        (expert("experts.w1"), Module("fc", 8, 8), expert("experts.w2")),  # would change the order
        (expert("w1"),),
        (Module("experts", 8, 8), expert("experts.w1")),
        (expert("experts.w1"), Module("experts.w2", 8, 8, 4)),
    ):
        with pytest.raises(HYWUError, match="each list of experts in one piece"):
            save_official(generator(*modules), tmp_path / "not")
    assert not (tmp_path / "not").exists()


def test_places_that_can_not_be_written_to(folder, tmp_path):
    generator, file = load_generator(folder), tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(HYWUError, match=r"file: can't be written"):
        save_generator(generator, file / "own")
    with pytest.raises(HYWUError, match=r"file: is a file and a folder goes there"):
        save_official(generator, file)
    with pytest.raises(HYWUError, match=r"can't be written"):
        save_official(generator, file / "out")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("stored", "dtype", "words"),
    [
        (torch.int8, None, r"model.safetensors: .* holds torch.int8 values"),
        (torch.int8, torch.float32, r"holds torch.int8 values"),
        (torch.float8_e4m3fn, None, r"torch.float8_e4m3fn .*load it in another dtype"),
    ],
)
def test_weights_that_can_not_be_computed_with(folder, stored, dtype, words):
    def cast(tensors):
        tensors.update({name: value.to(stored) for name, value in tensors.items()})

    edit_weights(folder, cast)
    with pytest.raises(HYWUError, match=words):
        load_generator(folder, dtype=dtype)
    if stored.is_floating_point:
        assert load_generator(folder, dtype=torch.bfloat16).config.layout.rank == 4


def test_dtype_and_device_of_the_request(folder):
    generator = load_generator(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in generator.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.is_meta for p in generator.parameters())
    assert not generator.training


def test_several_stacks_round_trip_and_have_no_official_form(tmp_path):
    layout = LoRALayout(
        (
            Stack(("a.0", "a.1"), (Module("fc", 8, 8),)),
            Stack(("b.0",), (Module("conv", 8, 4, conv=True),)),
        ),
        2,
        2.0,
    )
    config = GeneratorConfig(
        layout,
        {"x": 3, "y": 5},
        8,
        1,
        8,
        4,
        1,
        "float32",
        1.0,
        0.25,
        {"type": "test"},
        "toy",
        {"seed": 1},
    )
    generator = ParameterGenerator(config)
    generator.reset_parameters()
    torch.nn.init.normal_(generator.model.proj_out_B.weight)
    path = save_generator(generator, tmp_path / "own.safetensors", dtype=torch.float16)
    loaded = load_generator(path, dtype=torch.float32)
    without = {k: v for k, v in loaded.config.provenance.items() if k != "checkpoint"}
    assert loaded.config.with_(provenance=without) == config
    assert loaded.config.provenance["checkpoint"]["name"] == "own.safetensors"
    with pytest.raises(HYWUError, match="2 stacks and 2 condition parts"):
        save_official(generator, tmp_path / "official")
    assert not (tmp_path / "official").exists()


def test_b_scale_is_folded_into_the_official_form(folder, condition, tmp_path):
    generator = load_generator(folder)
    generator.config = generator.config.with_(lora_a_scale=0.25, lora_b_scale=0.5)
    again = load_generator(save_official(generator, tmp_path / "out"))
    assert again.config.lora_b_scale == 1.0
    assert again.config.lora_a_scale == 1.0
    with torch.no_grad():
        expected, lora = generator(condition), again(condition)
    for key, value in expected.factors.items():
        torch.testing.assert_close(lora.factors[key], value)


def test_nothing_is_overwritten_unless_told(folder, tmp_path):
    generator = load_generator(folder)
    path = save_generator(generator, tmp_path / "own")
    before = path.read_bytes()
    with pytest.raises(HYWUError, match="exists already"):
        save_generator(generator, path)
    with pytest.raises(HYWUError, match="exists already"):
        save_official(generator, folder)
    assert path.read_bytes() == before
    save_generator(generator, path, overwrite=True)
    assert not list(tmp_path.glob("*.part"))


def test_header_says_everything_without_reading_weights(folder, tmp_path):
    path = save_generator(load_generator(folder), tmp_path / "own")
    header = read_header(path)
    assert header["generator"]["layout"]["rank"] == 4
    assert "checkpoint" not in header["generator"]["provenance"]
    assert open_checkpoint(path).config.base == "tencent/HunyuanImage-3.0-Instruct"


# -- wrong files ----------------------------------------------------------------------------------


def test_missing_extra_and_misshaped_tensors_are_named(folder):
    edit_weights(folder, lambda t: t.pop("model.norm_final.weight"))
    with pytest.raises(HYWUError, match=r"official: lacks 1 tensors.*model.norm_final.weight"):
        load_generator(folder)

    def extra_and_wrong(tensors):
        tensors["model.norm_final.weight"] = torch.ones(64)
        tensors["model.surplus"] = torch.ones(2)

    edit_weights(folder, extra_and_wrong)
    with pytest.raises(HYWUError, match=r"model.surplus.*norm_final.weight is \(64,\)") as error:
        load_generator(folder)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(folder, value):
    edit_weights(folder, lambda t: t["model.blocks.1.self_attn_hw.W_k.weight"].fill_(value))
    with pytest.raises(HYWUError, match=r"not finite in model.blocks.1.self_attn_hw.W_k.weight"):
        load_generator(folder)


def test_finite_values_whose_sum_overflows_are_fine(folder):
    edit_weights(folder, lambda t: t["model.blocks.1.feed_forward.fc1.weight"].fill_(3e38))
    load_generator(folder)


def test_truncated_and_foreign_files(folder, tmp_path):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:-1000], whole[:40], b"PK not safetensors", b""):
        weights.write_bytes(content)
        with pytest.raises(HYWUError, match=r"model.safetensors: not a whole safetensors file"):
            load_generator(folder)
    weights.write_bytes(whole)
    pickle = tmp_path / "weights.pt"
    pickle.write_bytes(b"\x80\x02")
    with pytest.raises(HYWUError, match="not a .safetensors file"):
        load_generator(pickle)
    with pytest.raises(HYWUError, match="no such file or folder"):
        load_generator(tmp_path / "nothing.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.ones(1)}, foreign)
    with pytest.raises(HYWUError, match="not a HY-WU generator file"):
        load_generator(foreign)
    damaged = tmp_path / "damaged.safetensors"
    save_file({"x": torch.ones(1)}, damaged, metadata={HEADER: "{"})
    with pytest.raises(HYWUError, match="not JSON"):
        load_generator(damaged)


def test_missing_shard_and_missing_files(folder, tmp_path):
    save_official(load_generator(folder), tmp_path / "shards", shard_bytes=500_000)
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(HYWUError, match=rf"shards that are missing: {shard.name}"):
        load_generator(tmp_path / "shards")
    (tmp_path / "shards" / INDEX).unlink()
    with pytest.raises(HYWUError, match="a shard may be missing"):
        load_generator(tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HYWUError, match=r"no config.json"):
        load_generator(tmp_path / "empty")
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(HYWUError, match=r"holds no .safetensors"):
        load_generator(tmp_path / "empty")
    for text in ("[]", "{", '{"weight_map": []}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "shards" / INDEX).write_text(text)
        with pytest.raises(HYWUError, match=r"index.json: not an index of shards"):
            load_generator(tmp_path / "shards")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"output_dim": 32}, "output_dim 32 differs from token_dim 64"),
        ({"rank": 3}, "rank 3 must be divisible by dim_accumulation 2"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"pg_mapping": {"ff": {"lora_A_dim": 3}}}, "'lora_B_dim'"),
        ({"pg_mapping": None}, "a value is not of its type"),
        ({"rank": "abc"}, "a value is not of its type .*'abc'"),
        ({"alpha": "x"}, "a value is not of its type"),
        ({"d_model": [1]}, "a value is not of its type"),
        ({"token_dim": None, "output_dim": None}, "a value is not of its type"),
        ({"pg_mapping": {"ff": {"lora_A_dim": -3, "lora_B_dim": 4}}}, "'ff' has in_features -3"),
        ({"num_base_model_layers": 0}, "nothing to adapt"),
        ({"layout_digest": "0123"}, "pg_mapping was reordered"),
    ],
)
def test_wrong_config(folder, changes, words):
    edit_config(folder, **changes)
    with pytest.raises(HYWUError, match=words) as error:
        load_generator(folder)
    assert "config.json" in str(error.value)


def test_config_that_lacks_a_key_or_is_not_json(folder):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    del data["d_model"]
    path.write_text(json.dumps(data))
    with pytest.raises(HYWUError, match="config.json: the key 'd_model' is missing"):
        load_generator(folder)
    for content in (b"{", b'{"model_type": "\xff"}'):
        path.write_bytes(content)
        with pytest.raises(HYWUError, match="config.json: not JSON"):
            load_generator(folder)
    path.write_text("[]")
    with pytest.raises(HYWUError, match="config.json: not a JSON object"):
        load_generator(folder)


def test_a_mapping_sorted_by_another_tool_is_detected(folder, tmp_path):
    ours = save_official(load_generator(folder), tmp_path / "ours")
    path = ours / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    with pytest.raises(HYWUError, match="pg_mapping was reordered"):
        load_generator(ours)


def test_a_damaged_description_names_the_file(folder, tmp_path):
    path = save_generator(load_generator(folder), tmp_path / "own")
    tensors, header = load_file(path), read_header(path)
    header["generator"]["layout"]["stacks"][0]["modules"].reverse()
    broken = tmp_path / "reordered.safetensors"
    save_file(tensors, broken, metadata={HEADER: json.dumps(header)})
    with pytest.raises(
        HYWUError, match=r"reordered.safetensors: the layout's modules are in another"
    ):
        load_generator(broken)

    def layout_is_text(header):
        header["generator"]["layout"]["rank"] = "abc"

    for name, damage in {
        "token_dim": lambda header: header["generator"].pop("token_dim"),
        "layout": lambda header: header["generator"].pop("layout"),
        "generator": lambda header: header.pop("generator"),
        "text": layout_is_text,
    }.items():
        header = read_header(path)
        damage(header)
        broken = tmp_path / f"{name}.safetensors"
        save_file(tensors, broken, metadata={HEADER: json.dumps(header)})
        with pytest.raises(HYWUError, match=rf"{name}.safetensors.*damaged"):
            load_generator(broken)


def test_an_index_cannot_lead_out_of_its_folder(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / "model.safetensors", outside)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    with pytest.raises(HYWUError, match=r"missing: outside.safetensors"):
        load_generator(folder)
