"""The courses of a first contact with a GPU, whole, on a CPU at tiny size; what they decide."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import (
    clocks,
    copies,
    decisions,
    first_contact,
    interleaved,
    isolated,
    on_device,
    one,
    probe,
    sizes,
    switches,
    tables,
)
from bench import device as device_clock
from hywu_core import HYWUError
from hywu_core.generator.speed.passes import Switches


def test_the_whole_first_contact_runs_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = ["--device", "cpu", "--tiny", "--json", str(path)]
    # each is a process that imports torch: those that a CPU has something to say to
    first_contact.main([*arguments, "--only", "official/eager", "official/ours", "flux/ours"])
    figures = json.loads(path.read_text())
    checks = figures["probe"]
    assert set(checks) == set(probe.CHECKS)
    assert {n: c["failed"] for n, c in checks.items() if "failed" in c} == {}
    assert checks["rates"]["sustained_tflops"] > 0
    assert checks["attention"]["masked_17/default"]["error"] < 0.02
    assert checks["strided_accumulate"]["error"] < 0.02
    assert all(v["within"] for v in checks["golden"].values() if isinstance(v, dict))
    measured = figures["measured"]
    assert set(measured) == {"official/eager", "official/ours", "flux/ours"}
    assert measured["official/ours"]["difference_from_eager"] < 1e-5
    assert measured["official/ours"]["peak_over_weights_bytes"] > 0
    answers = {d["question"]: d["answer"] for d in figures["decisions"]}
    assert answers["results agree with eager"] == "yes"
    assert answers["official vectors are met"] == "yes"
    assert figures["environment"]["torch"] == torch.__version__
    capsys.readouterr()
    first_contact.main(["--decide", "--device", "cpu", "--json", str(path)])
    assert "official vectors are met" in capsys.readouterr().out


def test_a_check_that_fails_costs_no_other_and_an_unusable_device_ends_the_process(monkeypatch):
    def breaks(_probe):
        raise ValueError("unexpected shape")

    def kills(_probe):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checks = {"one": breaks, "two": kills, "three": lambda _probe: {"value": 1}}
    monkeypatch.setattr(probe, "CHECKS", checks)
    found = probe.run(probe.Probe(torch.device("cpu"), tiny=True), list(checks))
    assert found["one"]["failed"] == "ValueError: unexpected shape"
    assert found["three"]["value"] == 1
    assert probe._sticky(RuntimeError("CUDA error: misaligned address"))
    assert not probe._sticky(ValueError("unexpected shape"))


def test_the_probe_goes_on_behind_a_check_that_ended_its_process(tmp_path, monkeypatch):
    calls = []

    def call(module, arguments, seconds, blocking=False):
        skipped = arguments[arguments.index("--skip") + 1 :]
        calls.append(skipped)
        if not skipped:
            return {"checks": {"rates": {"ok": 1}, "kernels": {"failed": "CUDA error"}}}
        if "attention" not in skipped:
            return {"failed": "failed: exit code -11: "}
        return {"checks": {"products": {"ok": 1}}}

    monkeypatch.setattr(isolated, "call", call)
    course = first_contact.Course(tmp_path / "f.json", 600)
    names = ["rates", "kernels", "attention", "products"]
    first_contact.probed(course, "cpu", False, names)
    assert calls == [[], ["rates", "kernels"], ["rates", "kernels", "attention"]]
    found = json.loads((tmp_path / "f.json").read_text())["probe"]
    assert found["attention"]["failed"].startswith("failed: exit code -11")
    assert found["products"] == {"ok": 1}


def test_what_does_not_fit_any_more_is_named(tmp_path):
    course = first_contact.Course(tmp_path / "f.json", 0)
    first_contact.measured(course, first_contact.OFFICIAL, [], lambda size: tmp_path / size)
    assert "were left" in course.figures["measured"]["official/eager"]["skipped"]


def test_a_process_that_fails_or_hangs_is_told_apart():
    failed = isolated.call("one", ["--size", "nonesuch"], 60)
    assert failed["failed"].startswith("failed: exit code 2")
    assert "nonesuch" in failed["trace"]
    hangs = isolated.call("one", ["--size", "flux", "--variant", "ours", "--device", "cpu"], 0.1)
    assert hangs["failed"] == "ended after 0 s"


def test_clocks_are_read_from_the_lines_of_nvidia_smi():
    text = (
        "2026/11/27 06:00:00.000, 1980, 2619, 95.1, 31, 0x0000000000000001\n"
        "2026/11/27 06:00:00.500, 1410, 2619, 699.8, 58, 0x0000000000000004\n"
        "2026/11/27 06:00:01.0"
    )
    figures = clocks.summary(text)
    assert figures["sm_mhz"] == {"median": 1695.0, "min": 1410.0, "max": 1980.0}
    assert figures["watts"]["max"] == 699.8
    assert len(figures["samples"]) == len(figures["reasons"]) == 2


def figures_of_a_device() -> dict:
    """As a device might give them."""
    return {
        "probe": {
            "rates": {"matmul_tflops": 798.0, "sustained_tflops": 680.0},
            "kernels": {
                "rotate": {"gbs": 1700.0, "error": 1e-3},
                "rotate_wide": {"gbs": 2700.0, "error": 1e-3},
                "across": {"ms": 0.25, "error": 2e-3},
                "quantize_rows": {"error": 0.026},
            },
            "attention": {
                "layers/default": {"ms": 0.5, "error": 1e-3, "first_s": 0.2},
                "masked_17/cudnn": {"failed": "No valid execution plans"},
                "masked_17/flash": {"failed": "masks"},
                "masked_17/efficient": {"ms": 0.02, "error": 1e-3, "first_s": 0.001},
                "masked_17/default": {"ms": 0.01, "error": 0.4, "first_s": 0.001},
            },
            "products": {
                "fp8_works": True,
                "16047x4096x4096": {"addmm_": 640.0, "fp8_bias": 1200.0},
                "16896x4096x4096": {"addmm_": 670.0, "fp8_bias": "not supported"},
            },
            "strided_accumulate": {"baddbmm_ms": 0.6, "linear_then_add_ms": 0.9, "error": 1e-3},
            "golden": {"moe/bf16": {"within": True}, "long/fp32": {"within": False}},
        },
        "waits": {"passed": False, "summary": "1 failed, 4 passed"},
        "measured": {
            "official/eager": {"median_s": 6.7, "tflops": 482.0},
            "official/ours": {
                "median_s": 5.0, "tflops": 646.0, "peak_over_weights_bytes": 3.7e9,
                "difference_from_eager": 0.02,
            },
            "official/fp8": {"median_s": 3.6, "tflops": 897.0, "difference_from_eager": 0.2},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("attention layers", "default"),
        ("attention masked_17", "efficient"),
        ("RoPE: wide or narrow", "wide"),
        ("attention across layers", "one kernel"),
        ("kernels compute what torch computes", "yes"),
        ("rows per chunk", "16896"),
        ("fp8 products with bias", "no"),
        ("across layers: add in the product", "in place"),
        ("official vectors are met", "no"),
        ("nothing waits for the device", "no"),
        ("official, bf16: 85 % of sustained", "yes"),
        ("official, ours: 1.15x eager", "yes"),
        ("official, fp8: 2.0x eager", "no"),
        ("official: 4 GB over weights", "yes"),
        ("results agree with eager", "no"),
    ],
)
def test_decisions_follow_from_the_figures(question, answer):
    made = {d["question"]: d["answer"] for d in decisions.decisions(figures_of_a_device())}
    assert made[question] == answer


def test_nothing_is_decided_from_nothing():
    made = decisions.decisions({"measured": {}})
    assert {d["answer"] for d in made} == {"not measured"}


# -- the second ten minutes, and the document's tables -----------------------------------------------


def test_switches_are_tried_one_by_one(tmp_path, capsys):
    path = tmp_path / "switches.json"
    arguments = ["--device", "cpu", "--tiny", "--variants", "ours", "--json", str(path)]
    switches.run(switches.parse([*arguments, "--parts", "across", "norm_rows"]))
    figures = json.loads(path.read_text())
    settings = figures["settings"]
    assert list(settings) == [
        "ours: everything", "ours: without across", "ours: with norm_rows", "ours: everything again",
    ]  # fmt: skip
    assert all(found["median_s"] > 0 for found in settings.values())
    assert [(v["part"], v["on"]) for v in figures["verdicts"]] == [
        ("across", True), ("norm_rows", False),
    ]  # fmt: skip
    assert "the whole with it switched" in capsys.readouterr().out


def test_a_part_is_switched_where_that_gains_more_than_the_noise():
    times = {"everything": 1, "everything again": 1.002, "without waves": 0.98}
    times |= {"with norm_rows": 0.99, "with fp8_loop": 0.997}
    times |= {"without across": 0.997, "without wide_rope": 1.03, "prefix kept": 0.76}
    spread = {"everything again": 0.004}
    settings = {
        f"ours: {n}": {"median_s": 0.4 * t, "times": t, "spread": spread.get(n, 0.001)}
        for n, t in times.items()
    } | {"fp8": {"failed": "no"}}
    found = {v["part"]: v for v in switches.verdicts(settings)}
    keeps = {part: v["keep"] for part, v in found.items()}
    assert keeps == {
        "waves": False, "norm_rows": False, "fp8_loop": True,
        "across": True, "wide_rope": True, "keep_prefix": True,
    }  # fmt: skip
    told = {part: switches.verdict(found[part]) for part in ("waves", "norm_rows", "fp8_loop")}
    assert told == {"waves": "switch off", "norm_rows": "switch on", "fp8_loop": "leave off"}
    # a quarter of two blocks is a fiftieth of 24
    assert found["keep_prefix"]["times"] == pytest.approx(1 / (1 - 0.24 * 2 / 24))


def test_settings_are_judged_against_everything_of_their_round():
    # the card slows down by half on the way: the ratios don't see it
    rounds = [{"everything": s, "without across": 1.05 * s} for s in (1.0, 1.2, 1.5)]
    found = interleaved.summary(rounds)
    assert found["without across"]["times"] == pytest.approx(1.05)
    assert found["without across"]["spread"] == pytest.approx(0, abs=1e-9)
    assert found["everything"]["median_s"] == 1.2


def test_settings_take_turns_and_one_that_fails_costs_no_other():
    device = torch.device("cpu")
    size = one.chosen("official", tiny=True, blocks=2)
    generator = sizes.make(size.config())
    condition = sizes.random_condition(generator.config, 10, device, torch.float32)
    tried = dict(interleaved.settings(["keep_prefix", "waves"], chunks=False))
    assert list(tried) == ["everything", "prefix kept", "without waves", "everything again"]
    seen = []

    def run():
        seen.append((generator.switches.waves, generator.prefix_cache_bytes))
        if not generator.switches.waves:
            raise ValueError("no")
        return generator.generate_grids(condition)

    found = interleaved.measure(generator, condition, run, tried, 0)
    assert found["without waves"] == {"failed": "ValueError: no"}
    assert found["prefix kept"]["rounds"] == 3
    assert seen.count((False, 0)) == 1  # it isn't tried again
    assert seen.count((True, None)) == 4  # to make the prefix, and in each round
    assert tried["prefix kept"].prefixes.found
    assert not tried["everything"].prefixes.found


def test_short_calls_are_timed_several_times_whatever_the_warm_up_took():
    device = torch.device("cpu")
    assert device_clock.timed(lambda: None, device, 0, 20)["calls"] == device_clock.LEAST_CALLS
    assert device_clock.timed(lambda: time.sleep(0.7), device, 0, 20)["calls"] == 3


def test_every_part_of_the_fast_path_is_tried():
    tried = {*switches.parts("ours"), *switches.parts("fp8")}
    assert tried == {field.name for field in dataclasses.fields(Switches)}
    with pytest.raises(HYWUError, match="'wide' is no part"):
        Switches().without("wide")


def test_copies_of_a_host_run_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "copies.json"
    copies.run(copies.parse(["--device", "cpu", "--tiny", "--json", str(path)]))
    figures = json.loads(path.read_text())
    assert all(gbs > 0 for gbs in figures["uploads"].values())
    assert figures["offloaded"]["equal"]
    assert figures["offloaded"]["ahead"]["rounds"] >= 3
    assert "the same bits: yes" in capsys.readouterr().out


def test_counts_are_read_from_what_nsight_compute_prints():
    text = """
    Section: Command line profiler metrics
    dram__bytes.sum                                             Gbyte         1.41
    gpu__time_duration.sum                                         us       532.10
    launch__registers_per_thread                      register/thread          238
    """
    assert switches.counted(text) == {
        "dram__bytes.sum": "1.41 Gbyte",
        "gpu__time_duration.sum": "532.10 us",
        "launch__registers_per_thread": "238 register/thread",
    }


def test_the_documents_tables_come_from_the_figures(tmp_path):
    device = figures_of_a_device()
    device["environment"] = {"name": "H100", "torch": "2.11.0", "triton": "3.6.0"}
    device["decisions"] = decisions.decisions(device)
    parts = [
        {"part": "across", "variant": "ours", "times": 1.04, "keep": True, "on": True},
        {"part": "fp8_loop", "variant": "fp8", "times": 0.98, "keep": False, "on": False},
    ]
    settings = {"ours: everything": {"median_s": 0.6}, "broken": {"failed": "no"}}
    files = {
        "first.json": device,
        "switches.json": {"verdicts": parts, "settings": settings},
    }
    document = tmp_path / "speed.md"
    places = "".join(
        f"<!-- {n} -->\nold\n<!-- /{n} -->\n" for n in ("sizes", "decisions", "switches")
    )
    document.write_text(f"# Speed\n{places}the end\n")
    for name, figures in files.items():
        (tmp_path / name).write_text(json.dumps(figures))
    tables.main([*(str(tmp_path / name) for name in files), "--docs", str(document)])
    text = document.read_text()
    assert "old" not in text
    assert text.endswith("the end\n")
    assert "| official/ours | 5000 ms | 1.34× | 95 % | 3.7 | 2.0e-02 |" in text
    assert "| across | ours | on | 1.040× | leave on |" in text
    assert "| fp8_loop | fp8 | off | 0.980× | switch on |" in text
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match="no figures that a table is made of"):
        tables.main([str(tmp_path / "other.json"), "--docs", str(document)])


def test_the_document_has_the_tables_of_the_kept_figures():
    text = tables.DOCS.read_text(encoding="utf-8")
    kept = sorted((tables.DOCS.parent.parent / "bench" / "figures").glob("*.json"))
    assert kept
    for path in kept:
        for name, table in tables.tables_of(path).items():
            assert tables.placed(text, name, table) == text, f"{name}: run bench.tables {path.name}"


def test_what_a_plan_for_a_new_shape_costs_counts():
    ways = {"default": (0.08, 0.745), "cudnn": (0.12, 0.0003), "efficient": (0.21, 0.0006)}
    found = {
        f"masked/{n}": {"ms": ms, "first_s": first, "error": 1e-3}
        for n, (ms, first) in ways.items()
    }
    made = decisions.decisions({"probe": {"attention": found}})
    assert {d["question"]: d["answer"] for d in made}["attention masked"] == "efficient"


def test_every_table_has_its_place_in_the_document():
    text = tables.DOCS.read_text()
    for name in ("sizes", "decisions", "switches", "training", "cpu", "estimate"):
        assert f"<!-- {name} -->" in tables.placed(text, name, "x")


# -- the third ten minutes ---------------------------------------------------------------------------


def test_training_on_a_device_tries_and_then_trains(tmp_path, capsys):
    pytest.importorskip("skimage", reason="the photographs come with scikit-image")
    path, out = tmp_path / "training.json", tmp_path / "out"
    arguments = ["--device", "cpu", "--tiny", "--json", str(path), "--out", str(out)]
    arguments += ["--batch-sizes", "8"]
    on_device.run(on_device.parse(arguments))
    figures = json.loads(path.read_text())
    for name in ("pretrain", "train"):
        trial, long = figures["trainings"][f"{name}, 8"], figures["long"][name]
        assert "failed" not in trial, trial
        assert trial["steps"] == 4
        assert trial["steps_per_s"] > 0
        assert not {"failed", "ended"} & long.keys(), long
        assert long["files"]
        assert all((out / file).stat().st_size <= 17 << 20 for file in long["files"])
    capsys.readouterr()


def test_weights_are_exported_in_files_of_a_size(tmp_path):
    tensors = {f"t{i}": torch.randn(100, 10) for i in range(5)} | {"big": torch.randn(5000)}
    save_file(tensors, str(tmp_path / "w.safetensors"), {"kind": "test"})
    names = on_device.exported(tmp_path / "w.safetensors", tmp_path / "out", largest=4100)
    assert len(names) == 4  # the big one by itself, then 2 + 2 + 1
    found = {}
    for name in names:
        found |= load_file(str(tmp_path / "out" / name))
    assert {n: t.half().tolist() for n, t in tensors.items()} == {
        n: t.tolist() for n, t in found.items()
    }
