"""A generator within a memory budget: the plan, offloaded blocks, threads, runs that repeat."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import nn

from bench.measure import peak_memory
from bench.pretended import CUDA, Ledger, pretended_cuda
from bench.sizes import make, official_config
from hywu_core import (
    Condition,
    GeneratorConfig,
    HYWUError,
    LoRALayout,
    ParameterGenerator,
    load_generator,
)
from hywu_core.generator.checkpoints import save_generator
from hywu_core.generator.speed import ahead, passes, staging
from hywu_core.generator.speed.memory import CHUNK_BYTES, SLOTS, Sizes, plan_memory
from hywu_core.generator.speed.offload import blocks_per_buffer
from hywu_core.layout import Module, Stack


def config(**changes) -> GeneratorConfig:
    """Two stacks, two condition parts, five blocks; blocks outweigh everything else."""
    stacks = (
        Stack(("double.0", "double.1"), (Module("qkv", 24, 72), Module("proj", 24, 24))),
        Stack(("single.0", "single.1", "single.2"), (Module("linear1", 24, 100),)),
    )
    values = {
        "layout": LoRALayout(stacks, 4, 8.0),
        "condition": {"vision": 12, "text": 20},
        "token_dim": 16,
        "dim_accumulation": 2,
        "d_model": 64,
        "head_dim": 16,
        "num_blocks": 5,
        **changes,
    }
    return GeneratorConfig(**values)


def condition(batch: int = 1, seed: int = 1) -> Condition:
    rng = torch.Generator().manual_seed(seed)
    widths = {"vision": 12, "text": 20}
    return Condition({n: torch.randn(batch, 7, w, generator=rng) for n, w in widths.items()})


def grids(generator, given: Condition) -> list[torch.Tensor]:
    with torch.no_grad():
        return generator.generate_grids(given)


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def with_resident(generator, count: int, batch: int = 1) -> int:
    """The budget under which `count` blocks stay resident."""
    generator.memory_budget = 1 << 40
    plan = generator.memory_plan(batch, 14)
    held = count + min(SLOTS, plan.num_blocks - count)
    kept = plan.working_bytes - (generator_prefix(generator) if plan.keep_prefix else 0)
    return plan.fixed_bytes + held * plan.block_bytes + kept


def generator_prefix(generator) -> int:
    size = generator.model.norm_input.weight.element_size()
    return generator.config.num_positions * generator.config.d_model * size


@pytest.mark.parametrize("resident", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_blocks_give_the_same_bits(resident, dtype):
    generator = make(config(), dtype=dtype)
    expected = {batch: grids(generator, condition(batch)) for batch in (1, 3)}
    for batch in (3, 1, 1):
        generator.memory_budget = with_resident(generator, resident, batch)
        plan = generator.memory_plan(batch, 14)
        assert (plan.resident_blocks, plan.offloads) == (resident, resident < 5)
        assert plan.total_bytes <= generator.memory_budget
        assert same(grids(generator, condition(batch)), expected[batch])
        assert generator.residency.offloaded == (resident < 5)
    generator.memory_budget = None
    assert same(grids(generator, condition()), expected[1])


def test_page_locked_buffers_waste_little_to_rounding():
    """torch rounds each up to a power of two, which a block's size is far from."""
    for block, num_blocks in ((604_110_848, 24), (671_000_000, 24), (50 << 20, 6), (7 << 30, 3)):
        group = blocks_per_buffer(block, num_blocks)
        assert 1 <= group <= num_blocks
        held = sum(
            1 << (min(group, num_blocks - first) * block - 1).bit_length()
            for first in range(0, num_blocks, group)
        )
        assert held <= 1.2 * num_blocks * block, (block, group)


def test_only_two_slots_hold_what_is_offloaded():
    generator = make(config())
    generator.memory_budget = with_resident(generator, 1)
    grids(generator, condition())
    streamer = generator.residency._offloaded
    assert len(streamer._slots) == SLOTS
    assert set(streamer._resident) == {0}
    seen = []
    for block in streamer.run(1):
        seen.append(block.feed_forward.fc1.weight.data_ptr())
    assert len(set(seen)) == 3
    assert len(set(seen[1:])) == 2
    hosts = [block.feed_forward.fc1.weight.data_ptr() for block in generator.model.blocks]
    assert not set(seen) & set(hosts)


def test_weights_changed_or_moved_between_calls_are_the_ones_used():
    generator = make(config())
    generator.memory_budget = with_resident(generator, 0)
    before = grids(generator, condition())
    generator.model.blocks[3].feed_forward.fc2.weight.mul_(2)
    changed = grids(generator, condition())
    assert not same(before, changed)
    generator.memory_budget = None
    generator.to(torch.float64).to(torch.float32)
    assert not generator.residency.offloaded
    assert same(grids(generator, condition()), changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "tokens", "chunk", "changes"),
    [
        (1, 40, 1 << 30, {}),
        (1, 40, 1 << 14, {}),
        (3, 500, 1 << 16, {}),
        (2, 9, 1 << 16, {"token_dim": 128}),
        (1, 9, 1 << 16, {"token_dim": 32}),
    ],
)
def test_the_estimated_memory_covers_the_measured_peak(dtype, batch, tokens, chunk, changes):
    stack = Stack(tuple(f"b.{i}" for i in range(6)), (Module("a", 512, 700), Module("b", 700, 512)))
    layout = LoRALayout((stack,), 8, 8.0)
    generator = make(
        config(
            layout=layout, condition={"hidden_states": 48}, num_blocks=2, head_dim=32, **changes
        ),
        dtype=dtype,
    )
    given = Condition.of(torch.randn(batch, tokens, 48, dtype=dtype))
    generator.chunk_bytes = chunk
    generator.prefix_cache_bytes = 0
    generator.memory_budget = 1 << 40
    estimated = generator.memory_plan(batch, tokens).working_bytes
    with torch.no_grad():
        generator.generate_grids(given)  # tables are made
        measured = peak_memory(lambda: generator.generate_grids(given))
    assert measured <= estimated <= 4 * measured


def test_a_stacks_turned_keys_live_no_longer_than_it_needs_them(monkeypatch):
    """Of many stacks and a long condition they would be most of what a call holds."""
    stacks = tuple(Stack((f"s{i}.0", f"s{i}.1"), (Module("fc", 24, 24),)) for i in range(4))
    generator = make(config(layout=LoRALayout(stacks, 4, 8.0)))
    parts = {"vision": torch.randn(1, 150, 12), "text": torch.randn(1, 151, 20)}
    keys, held, own = [], [], passes.Passes.rotate

    def rotate(self, x, axes):
        turned = own(self, x, axes)
        if x.shape[1] == 301:
            held.append(sum(key() is not None for key in keys))
            keys.append(weakref.ref(turned))
        return turned

    monkeypatch.setattr(passes.Passes, "rotate", rotate)
    with torch.no_grad():
        generator.generate_grids(Condition(parts))
    assert len(held) == 4 * 5
    assert max(held) <= 1


def test_tighter_budgets_stream_first_and_then_take_smaller_chunks():
    config = official_config()
    block, fixed, chunk = 671_000_000, 160_000_000, CHUNK_BYTES["cuda"]
    sizes = Sizes(config, fixed, block, 2, 1, 4000, chunk, 0)
    full = fixed + 24 * block + sizes.working_bytes(chunk)
    seen = [plan_memory(sizes, full - step * block) for step in (0, 1, 12, 22)]
    assert [plan.resident_blocks for plan in seen] == [24, 21, 10, 0]
    assert {plan.chunk_bytes for plan in seen} == {chunk}
    tight = plan_memory(sizes, full - 23 * block)
    assert tight.chunk_bytes < chunk
    assert tight.total_bytes <= full - 23 * block
    with pytest.raises(HYWUError, match="needs at least") as error:
        plan_memory(sizes, 2_000_000_000)
    least = int(str(error.value).split("needs at least ")[1].split(" ")[0].replace(",", ""))
    assert plan_memory(sizes, least).total_bytes <= least
    with pytest.raises(HYWUError):
        plan_memory(sizes, least - 1)


def test_the_official_size_is_estimated_to_keep_what_is_asked():
    """4 GB over the weights, and 12 GB in all with blocks offloaded."""
    with torch.device("meta"):
        generator = ParameterGenerator(official_config()).to(torch.bfloat16)
    generator.chunk_bytes = CHUNK_BYTES["cuda"]
    generator.memory_budget = 1 << 50
    plan = generator.memory_plan(1, 4000)
    assert not plan.offloads
    assert plan.working_bytes <= 4e9
    generator.memory_budget = 12_000_000_000
    plan = generator.memory_plan(1, 4000)
    assert plan.total_bytes <= 12e9
    assert plan.resident_blocks >= 8


def test_a_checkpoint_loads_within_a_budget(tmp_path):
    original = make(config())
    path = save_generator(original, tmp_path / "g.safetensors")
    expected = grids(original, condition())
    for resident in (5, 2, 0):
        budget = with_resident(make(config()), resident)
        loaded = load_generator(path, memory_budget=budget)
        assert same(grids(loaded, condition()), expected)
        again = save_generator(loaded, tmp_path / f"{resident}.safetensors")
        assert same(grids(load_generator(again), condition()), expected)


class Written:
    """A stream or event that writes down what it is told, in order."""

    log: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    def __init__(self, *_):
        Written.names.setdefault(id(self), "side")

    def record(self, stream):
        self.log.append((f"{self.names[id(stream)]} sets", self))

    def wait_event(self, event):
        self.log.append((f"{self.names[id(self)]} waits", event))


def test_copies_of_a_host_wait_for_what_they_overwrite_and_for_nothing_else(monkeypatch):
    """On a device that isn't there: sublayer g + 1 is copied while g computes, once g - 1 is done."""
    now = Written()
    Written.log, Written.names = [], {id(now): "compute"}
    with pretended_cuda(Ledger(host_copies=False)):
        layers = [[nn.Linear(16, 16) for _ in range(count)] for count in (2, 3, 1, 2)]
        monkeypatch.setattr(torch.cuda, "Stream", Written)
        monkeypatch.setattr(torch.cuda, "Event", Written)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: now)
        held = ahead.Ahead(layers)
        for group in layers:
            for layer in group:
                found = held.values(layer, CUDA)
                assert found["weight"].device == CUDA
                assert found["weight"].shape == layer.weight.shape
            Written.log.append(("computes", layers.index(group)))
        held.close()
    order = [what for what, _ in Written.log]
    # both slots' memory, then the first copy, then what is ahead of each
    assert order == [
        "compute sets", "compute sets",
        "side waits", "side sets", "compute waits", "side waits", "side sets", "computes",
        "compute sets", "compute waits", "side waits", "side sets", "computes",
        "compute sets", "compute waits", "side waits", "side sets", "computes",
        "compute sets", "compute waits", "computes",
    ]  # fmt: skip
    events = {what: [event for said, event in Written.log if said == what] for what in set(order)}
    assert events["compute waits"] == events["side sets"]
    # a copy waits for the slot that it overwrites, which the sublayer before the one that computes had
    assert events["side waits"] == events["compute sets"][:4]
    one, other = events["compute sets"][:2]
    assert events["side waits"] == [one, other, one, other]


# -- pageable memory -------------------------------------------------------------------------------


class Late(torch.Tensor):
    """A tensor whose copies happen only when an event after them is waited for, as on a device."""

    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy_(self, source, non_blocking=False):
        Late.waiting.append((self.as_subclass(torch.Tensor), source))
        return self


class LateEvent:
    last: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(self, stream):
        self.last = Late.waiting[-1:]

    def synchronize(self):
        while any(copy is self.last[0] for copy in Late.waiting if self.last):
            goal, source = Late.waiting.pop(0)
            goal.copy_(source)


def test_pageable_tensors_go_through_two_pieces_in_turn(monkeypatch):
    """Of many sizes, some larger than both pieces; none is filled anew before it was read."""
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    sizes = [(3,), (40, 5), (1,), (0,), (7, 2), (16,)]
    values = [torch.randn(size) for size in sizes] + [torch.randn(6, 4).half().t()]
    copies = [torch.zeros(v.shape, dtype=v.dtype).as_subclass(Late) for v in values]
    pieces = [staging._Piece(torch.zeros(100, dtype=torch.uint8)) for _ in range(2)]
    staging._through(values, copies, pieces)
    for piece in pieces:
        piece.sent(torch.device("cpu"))
        piece.reuse()
    for value, copy in zip(values, copies, strict=True):
        assert torch.equal(copy.as_subclass(torch.Tensor), value)


def test_without_cuda_nothing_is_staged(monkeypatch):
    monkeypatch.setattr(staging, "_page_locked", lambda size: 1 / 0)
    (copy,) = staging.staged([torch.ones(3)], torch.device("meta"))
    assert copy.device.type == "meta"


def test_offloading_is_for_inference():
    generator = make(config())
    generator.memory_budget = with_resident(generator, 0)
    grids(generator, condition())
    generator.requires_grad_(True)
    with pytest.raises(HYWUError, match="in inference only"):
        generator(condition())


@pytest.mark.parametrize("resident", [None, 1])
def test_an_interrupted_call_leaves_the_next_one_whole(resident):
    generator = make(config())
    expected = grids(generator, condition())
    if resident is not None:
        generator.memory_budget = with_resident(generator, resident)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    for _ in range(2):
        with torch.no_grad(), pytest.raises(KeyboardInterrupt) as kept:
            generator.generate_grids(condition(), stop)
        assert kept.tb is not None  # frames of the interrupted call live on, its turn doesn't
        assert same(grids(generator, condition()), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_mix(mode):
    generator = make(config())
    generator.memory_budget = with_resident(generator, 1)
    with mode():
        first = generator.generate_grids(condition())
    assert same(first, grids(generator, condition()))


@pytest.mark.parametrize("resident", [None, 1])
def test_threads_share_one_generator(resident):
    generator = make(config())
    given = [condition(batch, seed) for seed, batch in enumerate((1, 2, 1, 3))]
    expected = [grids(make(config()), one) for one in given]
    if resident is not None:
        generator.memory_budget = with_resident(generator, resident, 3)
    results: list[list] = [[] for _ in given]
    start = threading.Barrier(len(given))

    def work(i: int) -> None:
        start.wait()
        for _ in range(4):
            results[i].append(grids(generator, given[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for runs, right in zip(results, expected, strict=True):
        assert len(runs) == 4
        assert all(same(run, right) for run in runs)
