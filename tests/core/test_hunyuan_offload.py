"""Experts offloaded by chunk: budgets to the byte, results bit by bit, what is copied and when."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hunyuan_golden import BASE, SYSTEM, generator, golden, pipeline, source

from hywu_core import HYWUError
from hywu_core.bases.hunyuan_image3 import Pipeline, Request, Sampler, layers
from hywu_core.bases.hunyuan_image3.offload import OffloadedBank, routed
from hywu_core.bases.hunyuan_image3.placement import CHUNK, SLOTS, Matrix, place

#: One expert's matrix in float32, a layer's 3 banks of 8 experts.
MATRIX = 64 * 48 * 4
LAYER = 3 * 8 * MATRIX


def fixed() -> int:
    p = pipeline()
    modules = (p.model, p.vae, p.encode_source.tower, p.encode_source.aligner)
    return sum(v.nbytes for m in modules for v in m.parameters()) - 3 * LAYER


def load(budget: int, rest: str = "file") -> Pipeline:
    return Pipeline.load(BASE, dtype=torch.float32, system=SYSTEM, budget=budget, rest=rest)


def on_device(p: Pipeline) -> int:
    """Bytes of weights that are there: parameters, and slots."""
    modules = (p.model, p.vae, p.encode_source.tower, p.encode_source.aligner)
    return sum(v.nbytes for m in modules for v in m.parameters()) + p.offloaded.nbytes


@pytest.fixture(scope="module")
def request_() -> Request:
    metadata = golden("edit").metadata
    return Request(metadata["prompt"], [source()], "", "128x128", 1)


@pytest.mark.parametrize("rest", ["file", "ram"])
@pytest.mark.parametrize(
    ("room", "resident", "chunk"),
    [
        (3 * LAYER, 3, 0),
        (3 * LAYER - 1, 2, 8),
        (LAYER + SLOTS * 8 * MATRIX, 1, 8),
        (SLOTS * 8 * MATRIX, 0, 8),
        (SLOTS * 8 * MATRIX - 1, 0, 4),
        (SLOTS * MATRIX, 0, 1),
    ],
)
def test_weights_on_the_device_keep_to_the_budget(rest, room, resident, chunk, request_):
    """To the byte; results are bit by bit those of the resident model."""
    budget = fixed() + room
    p = load(budget, rest)
    placement = p.offloaded.placement
    assert (len(placement.resident), placement.chunk) == (resident, chunk)
    assert on_device(p) == placement.total_bytes <= budget
    condition = p.condition([request_])
    wanted = pipeline().condition([request_])
    name = "hidden_states"
    assert torch.equal(condition.parts[name], wanted.parts[name])
    assert on_device(p) <= budget
    if chunk:
        assert p.offloaded.traffic.staged <= SLOTS


def test_a_budget_too_small_is_refused_with_both_numbers():
    least = fixed() + SLOTS * MATRIX
    with pytest.raises(HYWUError, match=f"{least - 1:,} bytes .* at least {least:,}"):
        load(least - 1)


def test_an_edit_with_a_lora_moves_the_weights_once_per_pass(request_):
    """Both branches share a pass: the prefix and each step copy every routed expert at most once."""
    p, steps = load(fixed() + SLOTS * 4 * MATRIX), 3
    lora = generator()(pipeline().condition([request_]))
    wanted = pipeline().sample([request_], lora, steps=steps)
    before = replace(p.offloaded.traffic)
    made = p.sample([request_], lora, steps=steps)
    assert torch.equal(made, wanted)
    moved = p.offloaded.traffic.nbytes - before.nbytes
    assert 0 < moved <= (steps + 1) * 3 * LAYER
    # at this size nearly every expert is routed to in every pass
    assert moved > 0.9 * (steps + 1) * 3 * LAYER


def test_a_word_copies_the_experts_it_is_routed_to():
    p = load(fixed() + SLOTS * CHUNK * MATRIX)
    request = Request("an other thing", [], size="256x256", seed=1)
    traffic, seen = p.offloaded.traffic, []
    made = p.think(
        request, sampler=Sampler(), most=8, on_token=lambda *_: seen.append(traffic.matrices)
    )
    assert made == pipeline().think(request, sampler=Sampler(), most=8)
    each = {later - former for former, later in itertools.pairwise(seen)}
    # 2 of 8 experts, 3 banks, 3 layers
    assert each == {2 * 3 * 3}


def test_several_loras_on_offloaded_experts(request_):
    p = load(fixed() + SLOTS * 2 * MATRIX, "ram")
    requests = [request_, replace(request_, instruction="something else entirely", seed=2)]
    loras = generator()(pipeline().condition(requests))
    assert torch.equal(
        p.sample(requests, loras, steps=1), pipeline().sample(requests, loras, steps=1)
    )


def test_slots_are_free_after_an_error(request_):
    p = load(fixed() + SLOTS * MATRIX)
    bank = p.model.model.layers[1].mlp.experts.w2
    assert isinstance(bank, OffloadedBank)
    hook = bank.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        p.condition([request_])
    hook.remove()
    assert not p.offloaded.traffic._in_use
    wanted = pipeline().condition([request_]).parts["hidden_states"]
    assert torch.equal(p.condition([request_]).parts["hidden_states"], wanted)


def test_placement_at_the_published_size():
    """By formula: bf16, 32 layers of 64 experts, 13.9 GB besides them."""
    size, layer = Matrix(3072 * 4096 * 2), 64 * 3 * 3072 * 4096 * 2
    found = place(13_900_000_000, [layer] * 32, 64, 24_000_000_000, size)
    assert (len(found.resident), found.chunk) == (2, 8)
    assert found.total_bytes <= 24_000_000_000
    assert found.chunk_bytes == 8 * 3072 * 4096 * 2
    assert place(13_900_000_000, [layer] * 32, 64, 15_000_000_000, size).chunk == 8
    assert place(13_900_000_000, [layer] * 32, 64, 180_000_000_000, size).chunk == 0


def test_many_rows_are_split_by_expert(monkeypatch):
    """Parts of a pass: the sums are the same, and only an expert on a border is used twice."""
    experts = pipeline().model.model.layers[0].mlp.experts
    torch.manual_seed(0)
    x, weights, items = torch.randn(60, 64), torch.rand(60, 2), torch.zeros(60, dtype=torch.int64)
    chosen = torch.rand(60, 8).topk(2).indices
    wanted = experts(x, weights, chosen, items)
    monkeypatch.setattr(layers, "EXPERT_ROWS", 25)
    seen = []
    hook = experts.w1.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    made = experts(x, weights, chosen, items)
    hook.remove()
    torch.testing.assert_close(made, wanted)
    assert [int(ends[-1]) for ends in seen] == [25, 25, 25, 25, 20]
    assert sum(len(routed(ends)[1]) for ends in seen) <= 8 + 4
