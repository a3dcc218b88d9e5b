"""Experts offloaded by chunk: budgets to the byte, results bit by bit, what is copied and when."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from hunyuan_golden import BASE, SYSTEM, generator, golden, pipeline, source

from hywu_core import HYWUError
from hywu_core.bases.hunyuan_image3 import (
    Pipeline,
    Request,
    Sampler,
    dispatch,
    layers,
    open_folder,
    staging,
)
from hywu_core.bases.hunyuan_image3.attention import KVCache
from hywu_core.bases.hunyuan_image3.banks import CodedBank, OffloadedBank
from hywu_core.bases.hunyuan_image3.chunks import multiply, routed
from hywu_core.bases.hunyuan_image3.matrices import in_memory
from hywu_core.bases.hunyuan_image3.model import HunyuanImage3
from hywu_core.bases.hunyuan_image3.offload import coded_banks
from hywu_core.bases.hunyuan_image3.placement import CHUNK, SLOTS, Matrix, place
from hywu_core.bases.hunyuan_image3.quantize import quantize
from hywu_core.bases.hunyuan_image3.resting import dense_bytes, held_bytes

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
    return sum(map(held_bytes, modules)) + p.offloaded.nbytes


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
    assert not placement.dropped
    condition = p.condition([request_])
    wanted = pipeline().condition([request_])
    name = "hidden_states"
    assert torch.equal(condition.parts[name], wanted.parts[name])
    assert on_device(p) <= budget
    if chunk:
        assert p.offloaded.traffic.staged <= SLOTS


@pytest.mark.parametrize("rest", ["file", "ram"])
def test_dense_parts_are_there_only_while_they_are_used(rest):
    """The least budget, a byte less is refused: bit by bit the same, also after the weights were away."""
    p, request = pipeline(), Request("make it red", [], "", "128x128", 1)
    wanted, image = p.condition([request]).parts["hidden_states"], p.decode(LATENT)
    sizes = dense_bytes(p._parts, torch.float32, torch.float32)
    # the VAE's decoder is the largest
    least = fixed() - sum(sizes) + sizes[0] + SLOTS * MATRIX
    with pytest.raises(HYWUError, match=f"{least - 1:,} bytes .* at least {least:,}"):
        load(least - 1)
    small = load(least, rest)
    assert small.offloaded.placement.total_bytes == least
    held, most = on_device(small), []
    assert held == least - sizes[0]
    for module in small._parts.vae.decoder, small.model.model.layers[1].self_attn:
        module.register_forward_hook(lambda *_: most.append(on_device(small)), prepend=True)
    for _ in range(2):
        assert torch.equal(small.condition([request]).parts["hidden_states"], wanted)
        assert torch.equal(small.decode(LATENT), image)
        assert on_device(small) == held
        with small.evicted():
            assert on_device(small) == 0
    assert max(most) == least
    # per condition: attention and shared MLP of 3 layers, and the head; the decoder per image
    assert small.offloaded.traffic.dense == 2 * (sum(sizes[4:]) + sizes[0])


LATENT = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_weights_away_and_back(kind, tmp_path):
    """Experts that stay on the device, as they are or quantized, are read again."""
    folder = BASE if kind == "plain" else quantize(BASE, tmp_path / kind, kind)
    p = Pipeline.load(folder, dtype=torch.float32, system=SYSTEM, budget=1 << 30)
    request = Request("make it red", [], "", "128x128", 1)
    wanted, held = p.condition([request]).parts["hidden_states"], on_device(p)
    with pytest.raises(RuntimeError, match="stop"), p.evicted():
        assert on_device(p) == 0
        raise RuntimeError("stop")
    assert on_device(p) == held
    assert torch.equal(p.condition([request]).parts["hidden_states"], wanted)


def test_keys_and_values_rest_elsewhere():
    """What is copied to the device is a layer's; results are bit by bit the same, text and image."""
    p = Pipeline.load(BASE, dtype=torch.float32, system=SYSTEM, kv="ram")
    request, kept = Request("an other thing", [], size="128x128", seed=1), []
    put = KVCache.put

    def seen(cache, layer, k, v, plan):
        made, pair = put(cache, layer, k, v, plan), cache._layers[layer]
        kept.append([a.data_ptr() != b.data_ptr() for a, b in zip(made, pair, strict=True)])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "put", seen)
        thought = p.think(request, sampler=Sampler(), most=3)
        made = p.sample([request], steps=2)
    assert kept
    assert all(map(all, kept))
    assert thought == pipeline().think(request, sampler=Sampler(), most=3)
    assert torch.equal(made, pipeline().sample([request], steps=2))


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


def test_several_loras_on_offloaded_experts_and_dropped_parts(request_):
    sizes = dense_bytes(pipeline()._parts, torch.float32, torch.float32)
    p = load(fixed() - sum(sizes) + sizes[0] + SLOTS * 2 * MATRIX, "ram")
    assert p.offloaded.placement.dropped == len(sizes)
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


class Recorded:
    """A stream or an event that writes down what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record(self, stream: Recorded) -> None:
        self.log.append(f"{self.name} recorded on {stream.name}")

    def wait_event(self, event: Recorded) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, stream: Recorded) -> None:
        self.log.append(f"{self.name} waits for {stream.name}")


def test_a_chunk_is_copied_on_a_stream_of_its_own_while_another_computes(monkeypatch):
    """What is queued where, in order: the next copy comes before the wait for the former product's end."""
    log: list[str] = []
    main, side = Recorded("main", log), Recorded("side", log)
    now = [main]

    @contextlib.contextmanager
    def on(stream):
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: now[-1])
    bank = load(fixed() + SLOTS * 2 * MATRIX).model.model.layers[0].mlp.experts.w2
    slots, read = bank.slots, bank.source.read
    slots._side = side
    slots._copied = [Recorded(f"copied {i}", log) for i in range(SLOTS)]
    slots._freed = [Recorded(f"freed {i}", log) for i in range(SLOTS)]

    def reads(experts, into):
        log.append(f"{now[-1].name} copies {experts}")
        read(experts, into)

    def multiplies(x, weight, experts, bounds, out):
        log.append(f"{now[-1].name} computes {list(experts)}")
        multiply(x, weight, experts, bounds, out)

    monkeypatch.setattr(bank.source, "read", reads)
    monkeypatch.setattr(staging, "multiply", multiplies)
    ends = torch.tensor([3, 4, 4, 6, 7, 7, 7, 9], dtype=torch.int32)  # experts 2, 5 and 6 have none
    x = torch.randn(9, bank.in_features)
    made = bank(x, ends)
    experts = pipeline().model.model.layers[0].mlp.experts.w2
    assert torch.equal(made, experts(x, ends))
    assert log == [
        "side waits for freed 0", "side copies [0, 1]", "copied 0 recorded on side",
        "main waits for copied 0", "main computes [0, 1]",
        "side waits for freed 1", "side copies [3, 4]", "copied 1 recorded on side",
        "freed 0 recorded on main", "main waits for copied 1", "main computes [3, 4]",
        "side waits for freed 0", "side copies [7]", "copied 0 recorded on side",
        "freed 1 recorded on main", "main waits for copied 0", "main computes [7]",
        "freed 0 recorded on main",
    ]  # fmt: skip
    log.clear()
    slots.allocate(free=True)
    slots.allocate()
    assert log == ["main waits for side", "side waits for main"]


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


def test_layers_are_dispatched_by_accelerate():
    """Hooks on every layer, one device here: the same text, latents and LoRA; what isn't possible is said."""
    p = Pipeline.load(BASE, dtype=torch.float32, system=SYSTEM, device_map="auto")
    layer = p.model.model.layers[1]
    assert layer._hf_hook.execution_device == torch.device("cpu")
    request = Request("an other thing", [], size="128x128", seed=1)
    assert p.think(request, sampler=Sampler(), most=3) == pipeline().think(
        request, sampler=Sampler(), most=3
    )
    lora = generator()(pipeline().condition([request]))
    made = p.sample([request], lora, steps=2)
    assert torch.equal(made, pipeline().sample([request], lora, steps=2))
    for wrong, said in (
        ({"model.layers.1": "disk"}, "1 of 3 layers don't fit"),
        ({"model.layers.9": "cpu"}, "isn't a layer"),
    ):
        with pytest.raises(HYWUError, match=said):
            Pipeline.load(BASE, dtype=torch.float32, system=SYSTEM, device_map=wrong)
    with pytest.raises(HYWUError, match="none with a budget"):
        Pipeline.load(BASE, system=SYSTEM, device_map="auto", budget=1 << 30)


@pytest.mark.parametrize("device_map", ["auto", {"model.layers.1": "cpu"}])
def test_quantized_layers_are_dispatched_by_accelerate(device_map, tmp_path):
    """Stored as they are, latents with a LoRA bit by bit those of one device; they don't leave for a while."""
    out = quantize(BASE, tmp_path / "out", "nf4")
    p = Pipeline.load(out, dtype=torch.float32, system=SYSTEM, device_map=device_map)
    banks = [m for m in p.model.modules() if isinstance(m, CodedBank)]
    assert len(banks) == 9
    assert {bank.coded.dtype for bank in banks} == {torch.uint8}
    assert p.model.model.layers[1]._hf_hook.execution_device == torch.device("cpu")
    request = Request("an other thing", [], size="128x128", seed=1)
    lora = generator()(pipeline().condition([request]))
    one = Pipeline.load(out, dtype=torch.float32, system=SYSTEM)
    assert torch.equal(p.sample([request], lora, steps=2), one.sample([request], lora, steps=2))
    with pytest.raises(HYWUError, match="layers on several devices"):
        p.evicted()
    with pytest.raises(
        HYWUError, match=r"1 of 3 layers .*; use one device|1 of 3 layers .* use one"
    ):
        Pipeline.load(out, system=SYSTEM, device_map={"model.layers.1": "disk"})


def test_quantized_layers_count_as_they_are_stored(tmp_path, monkeypatch):
    """Three layers on two devices that hold one and a half in bfloat16: all fit in NF4; each is read to its device."""
    folder = open_folder(quantize(BASE, tmp_path / "out", "nf4"))
    with torch.device("meta"):
        model = HunyuanImage3(folder.config)
    coded = coded_banks(folder, model, torch.bfloat16)
    accelerate = pytest.importorskip("accelerate")
    others = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("model.layers"))
    layer = sum(p.numel() * min(2, p.itemsize) for p in model.model.layers[0].parameters())
    # accelerate leaves room for another layer on the first
    room = {0: 2 * others + 2 * layer, 1: 2 * layer}
    monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: dict(room))
    made = dispatch._auto(accelerate, model, torch.device("cuda", 0), torch.bfloat16)
    assert list(made.values()) == sorted(made.values())
    assert set(made.values()) == {0, 1}
    with torch.device("meta"):
        plain = HunyuanImage3(folder.config)
    assert (
        "disk"
        in dispatch._auto(accelerate, plain, torch.device("cuda", 0), torch.bfloat16).values()
    )
    assert [dispatch._as_device(d).index for d in made.values()] == list(made.values())
    bank = coded[2]["w2"]
    assert bank.coded.is_meta
    bank.read(torch.device("cpu"))
    assert bank.coded.any()


def test_banks_in_page_locked_memory(monkeypatch):
    """In pieces, so that rounding each up to a power of two wastes little; the same bytes."""
    bank = load(fixed() + SLOTS * MATRIX).model.model.layers[0].mlp.experts.w2
    empty, sizes = torch.empty, []

    def pinned(*shape, pin_memory=False, **how):
        made = empty(*shape, **how)
        sizes.extend([made.nbytes] if pin_memory else [])
        return made

    monkeypatch.setattr(torch, "empty", pinned)
    kept = in_memory(bank.source, 8, pin=True)
    # 3 x 2^12 bytes a matrix: 5 of them take 94 % of a power of two
    assert sizes == [5 * MATRIX, 3 * MATRIX]
    one, other = empty(3, MATRIX, dtype=torch.uint8), empty(3, MATRIX, dtype=torch.uint8)
    kept.read([1, 4, 7], one)
    bank.source.read([1, 4, 7], other)
    assert torch.equal(one, other)
