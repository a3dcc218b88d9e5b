"""A LoRA's copy on the device is ComfyUI's to keep and to evict; "meta" stands in for a device."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management as mm
import pytest
import torch
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.lora import GeneratedLoRA
from hywu_nodes.nodes.host import resident


def make() -> GeneratedLoRA:
    generator = torch.Generator().manual_seed(0)
    pairs = {
        f"blocks.{i}": (
            torch.randn(2, 2, 4, generator=generator), torch.randn(2, 4, 2, generator=generator),
        )
        for i in range(3)
    }  # fmt: skip
    return GeneratedLoRA.from_pairs(pairs, 2.0, provenance={"base": "tiny"})


@pytest.fixture
def lora() -> GeneratedLoRA:
    return make()


def move(model, device: str) -> None:
    """As `.to` does it, but that meta tensors have no values to bring back."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device))


def pointers(lora: GeneratedLoRA) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in lora.factors.values()}


def test_one_per_lora_and_none_for_one_that_is_gone():
    lora = make()
    patcher = resident.resident(lora)
    assert resident.resident(lora) is patcher
    assert patcher.model_size() == lora.nbytes
    gone = weakref.ref(patcher)
    del patcher, lora
    gc.collect()
    assert gone() is None


def test_on_the_host_it_is_the_lora_itself(lora):
    held = resident.resident(lora).model.lora
    assert pointers(held.placed) == pointers(lora)
    assert all(torch.equal(held.placed[path].A, lora[path].A) for path in lora)
    assert dict(held.placed.provenance) == dict(lora.provenance)


def test_moved_it_is_a_copy_and_evicted_the_hosts_own_again(lora):
    model = resident.resident(lora).model
    move(model, "meta")
    assert model.lora.placed.device.type == "meta"
    assert lora.device.type == "cpu"  # untouched
    move(model, "cpu")
    assert pointers(model.lora.placed) == pointers(lora)
    assert all(torch.equal(model.lora.placed[path].B, lora[path].B) for path in lora)


def test_what_the_generation_left_on_the_device_is_taken(lora):
    model = resident.resident(lora).model
    placed = lora.to("meta")
    model.lora.ready = tuple(placed.factors.values())
    move(model, "meta")
    assert [p.shape for p in model.lora.parameters()] == [v.shape for v in placed.factors.values()]
    model.lora.ready = ()
    move(model, "cpu")
    assert pointers(model.lora.placed) == pointers(lora)


def test_a_check_that_fails_names_the_targets(lora):
    bad = lora.to(dtype=torch.float32)
    bad["blocks.1"].B[0, 0, 0] = float("nan")
    with pytest.raises(HYWUError, match=r"not finite, in blocks\.1"):
        resident.to_host(bad)


def test_sampling_loads_it_as_comfyui_loads_models(lora, call, weights):
    """With the MODEL, and it stays as long as there is room."""
    model = call.HYWULoadBundledEditor()[0]
    made = call.HYWULoadLoRA("bundled: shared")[0]
    patched = call.HYWUApplyLoRA(model, made, 1.0, "unmerged")[0]
    (extra,) = patched.get_nested_additional_models()
    assert extra.model is resident.resident(made).model
    mm.load_models_gpu([patched, *patched.get_nested_additional_models()])
    assert any(loaded.model is not None and loaded.model.model is extra.model
               for loaded in mm.current_loaded_models)  # fmt: skip


def test_merged_it_needs_no_copy(lora, call, weights):
    model = call.HYWULoadBundledEditor()[0]
    made = call.HYWULoadLoRA("bundled: shared")[0]
    patched = call.HYWUApplyLoRA(model, made, 1.0, "merge")[0]
    assert patched.get_nested_additional_models() == []
