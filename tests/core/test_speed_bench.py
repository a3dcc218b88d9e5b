"""bench/cuda.py: its whole course on a CPU at tiny sizes, its sizes, its helpers."""

from __future__ import annotations

import json

import pytest
import torch

from bench import cuda, device, one, sizes
from bench.sizes import SIZES, make
from bench.targets import verdicts
from bench.variants import VARIANTS, reference, relative_difference

CPU = torch.device("cpu")


def test_the_whole_course_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.json"
    monkeypatch.setattr(one, "CALLS", 2)
    names = [name for name in VARIANTS if name != "compiled"]  # slow; test_speed_fast.py runs it
    arguments = ["cuda", "--device", "cpu", "--tiny", "--json", str(path), "--variants", *names]
    monkeypatch.setattr("sys.argv", arguments)
    cuda.main()
    figures = json.loads(path.read_text())
    assert figures["rates"]["matmul_tflops"] > 0
    errors = figures["relative_error_at_reduced_size"]
    assert set(errors) == {"float32 eager", *names}
    for name in ("float32 eager", "eager", "ours", "offloaded"):
        assert errors[name] < 1e-5
    assert 0.005 < errors["fp8"] < 0.08
    assert set(figures["sizes"]) == set(SIZES)
    printed = capsys.readouterr().out
    for name, size in figures["sizes"].items():
        assert f"{name}: " in printed
        assert set(size["variants"]) == set(names)
        assert size["variants"]["graph"]["skipped"] == "graphs are for small generators on CUDA"
        for variant, result in size["variants"].items():
            if "skipped" in result:
                assert variant in ("graph", "offloaded"), (name, variant, result)
                continue
            assert 0 < result["min_s"] <= result["median_s"] <= result["max_s"]
            assert result["peak_over_weights_bytes"] > 0
            weights = result["peak_bytes"] - result["peak_over_weights_bytes"]
            assert weights == result["weights_bytes"] > 0
            if variant != "eager":
                limit = 0.1 if variant == "fp8" else 1e-5
                assert result["difference_from_eager"] < limit, (name, variant)
        for variant in ("eager", "ours", "fp8"):
            assert size["variants"][variant]["profile"]["seconds_by_kind"]["matmul"] > 0
    assert len(figures["targets"]) == 11


def test_a_variant_that_fails_costs_no_other_its_figures(tmp_path, monkeypatch, capsys):
    def broken(generator, condition):
        def run():
            raise RuntimeError("no kernel image\nis available")

        return run

    monkeypatch.setitem(VARIANTS, "fp8", broken)
    monkeypatch.setattr(one, "CALLS", 1)
    path = tmp_path / "figures.json"
    arguments = "cuda --device cpu --tiny --sizes flux --variants eager fp8 ours --json"
    monkeypatch.setattr("sys.argv", [*arguments.split(), str(path)])
    with pytest.raises(SystemExit) as ended:
        cuda.main()
    assert "fp8 of flux: failed: RuntimeError: no kernel image" in str(ended.value)
    variants = json.loads(path.read_text())["sizes"]["flux"]["variants"]
    assert variants["fp8"] == {"failed": "failed: RuntimeError: no kernel image"}
    assert variants["ours"]["difference_from_eager"] < 1e-5
    assert "is available" in capsys.readouterr().err


def test_errors_that_rounding_does_not_explain_are_failures():
    def found(**errors):
        return cuda.failures({"relative_error_at_reduced_size": errors, "sizes": {}})

    assert not found(eager=0.017, ours=0.016, fp8=0.041, graph="graphs are for small generators")
    assert len(found(eager=0.017, ours=0.03, fp8=0.09)) == 2
    assert not found(eager=1e-7, ours=2e-7, fp8=0.04)
    assert len(found(eager=1e-7, ours=1e-4, fp8=0.09)) == 2
    assert not found(ours=0.016, fp8=0.041)
    assert len(found(eager=0.017, ours=float("nan"))) == 1
    figures = {"relative_error_at_reduced_size": {}, "sizes": {"flux": {"variants": {}}}}
    for difference, count in ((0.02, 0), (0.3, 1), (float("nan"), 1)):
        figures["sizes"]["flux"]["variants"]["ours"] = {"difference_from_eager": difference}
        assert len(cuda.failures(figures)) == count


def test_figures_are_compared_with_the_targets():
    def variants(**times):
        return {"variants": {n: {"median_s": s} for n, s in times.items()}}

    figures = {
        "rates": {"sustained_tflops": 700.0},
        "relative_error_at_reduced_size": {"ours": 0.017, "fp8": 0.041},
        "sizes": {
            "official": variants(eager=5.2, ours=4.5, fp8=2.7),
            "flux": variants(ours=0.03, graph=0.02),
            "bundled": variants(ours=0.004, graph=0.0031),
        },
    }
    ours = figures["sizes"]["official"]["variants"]["ours"]
    ours |= {"tflops": 600.0, "peak_over_weights_bytes": 3_500_000_000}
    met = [verdict.met for verdict in verdicts(figures)]
    none = "not measured"
    assert met == ["yes", "yes", "no", "yes", "yes", "yes", none, none, none, "yes", "no"]


def test_the_sizes_are_those_they_claim():
    official, dense = SIZES["official"].config(), SIZES["official_dense"].config()
    assert official.num_positions == 176_512
    assert official.flops(4000) == pytest.approx(3.229e15, rel=2e-3)
    assert dense.num_positions == 4_480
    assert dense.flops(4000) == pytest.approx(0.079e15, rel=0.05)
    flux = SIZES["flux"].config()
    assert flux.num_positions == pytest.approx(13_700, rel=0.02)
    assert flux.flops(1000) == pytest.approx(7.5e12, rel=0.05)
    assert [len(stack.layers) for stack in flux.layout.stacks] == [19, 38]


def test_nothing_starts_when_the_time_is_over(monkeypatch, tmp_path):
    path = tmp_path / "figures.json"
    arguments = "cuda --device cpu --tiny --seconds 0 --sizes flux --variants ours fp8 --json"
    monkeypatch.setattr("sys.argv", [*arguments.split(), str(path)])
    cuda.main()
    variants = json.loads(path.read_text())["sizes"]["flux"]["variants"]
    assert all("were left" in variants[name]["skipped"] for name in ("ours", "fp8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about a machine without CUDA")
def test_a_machine_without_cuda_is_told_what_to_do(capsys):
    for arguments, words in (
        ([], "--device cpu"),
        (["--device", "cpu", "--sizes", "official"], "--tiny"),
    ):
        with pytest.raises(SystemExit):
            cuda.parse(arguments)
        assert words in capsys.readouterr().err
    args = cuda.parse(["--device", "cpu"])
    assert (args.sizes, args.variants) == (["bundled", "engine"], ["eager", "ours"])


def test_the_comparison_sees_a_wrong_layer():
    config = sizes.reduced().with_(num_blocks=1)
    condition = sizes.random_condition(config, 5, CPU, torch.float32)
    with torch.no_grad():
        grids = reference(make(config), condition)()
        other = [grid.clone() for grid in grids]
        assert relative_difference(other, grids) == 0
        other[0][:, 2] *= 1.1
        assert 0.03 < relative_difference(other, grids) < 0.08  # 0.1 / sqrt(4 layers)


def test_timing_keeps_to_its_budget(monkeypatch):
    calls = []
    figures = device.timed(lambda: calls.append(1), CPU, 10, 4)
    assert (figures["calls"], len(calls)) == (4, 5)
    # a few short calls are always worth their time
    assert device.timed(lambda: calls.append(1), CPU, 0, 4)["calls"] == 4
    assert device.timed(lambda: calls.append(1), CPU, 0, 40)["calls"] == device.LEAST_CALLS
    monkeypatch.setattr(device, "LEAST_S", 0)
    assert device.timed(lambda: calls.append(1), CPU, 0, 4)["calls"] == 1


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matmul"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("aten::addmm", "matmul"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert device.kind_of(kernel) == kind
