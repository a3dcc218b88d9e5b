"""Decoder layers on several devices: placed and run by accelerate's `dispatch_model`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import HYWUError, need
from .checkpoint import Folder
from .model import HunyuanImage3
from .offload import coded_banks

#: Module of the network -> device, as accelerate writes it.
DeviceMap = Mapping[str, int | str | torch.device]
LAYERS = "model.layers"


def dispatch(
    folder: Folder, model: HunyuanImage3, device_map: DeviceMap | str, main: torch.device, dtype: torch.dtype,
    budget: int | None = None,
) -> None:  # fmt: skip
    """Read the weights of a network on "meta" to several devices.

    device_map: where each layer is (all else is on `main`), or "auto": in the devices' free memory, in order.
    Quantized experts stay as they are stored, each layer's on its device.
    Raises HYWUError with a budget, and where layers are left for host memory or disk.
    """
    if budget is not None:
        raise HYWUError(
            f"{folder.path}: a device map keeps whole layers on the devices; give none with a budget."
        )
    accelerate = need("accelerate", "to spread HunyuanImage-3 over several devices")
    coded = coded_banks(folder, model, dtype)
    chosen = _auto(accelerate, model, main, dtype) if device_map == "auto" else dict(device_map)
    left = [name for name, device in chosen.items() if _is_left(device, main)]
    if left:
        fewer = "`hywu hunyuan quantize FOLDER OUT --experts nf4` makes them a third as large, or"
        way = "" if folder.quantized else fewer
        raise HYWUError(
            f"{folder.path}: {len(left)} of {len(model.model.layers)} layers don't fit on the devices "
            f"(from {left[0]} on); {way} use one device with a budget."
        )
    everything = {n: main for n, _ in model.named_children() if n != "model"}
    everything |= {f"model.{n}": main for n, _ in model.model.named_children() if n != "layers"}
    everything |= {f"{LAYERS}.{i}": main for i in range(len(model.model.layers))}
    if unknown := chosen.keys() - everything.keys():
        raise HYWUError(f"device_map names {sorted(unknown)[0]}, which isn't a layer of {LAYERS}.")
    everything |= chosen
    for i, banks in enumerate(coded):
        for bank in banks.values():
            bank.read(_as_device(everything[f"{LAYERS}.{i}"]))
    for name, device in everything.items():
        folder.fill(model.get_submodule(name), f"{name}.", device, dtype)
    accelerate.dispatch_model(model, everything, main_device=main, force_hooks=True)


def _auto(accelerate: object, model: HunyuanImage3, main: torch.device, dtype: torch.dtype) -> dict:
    layers = model.model.layers
    room = accelerate.utils.get_max_memory()  # type: ignore[attr-defined]
    others = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(LAYERS))
    first = (main.index or 0) if main.type == "cuda" else main.type
    room[first] = max(0, room[first] - others * dtype.itemsize)
    made = accelerate.infer_auto_device_map(  # type: ignore[attr-defined]
        layers, room, no_split_module_classes=["DecoderLayer"], dtype=dtype
    )
    if "" in made:  # all on one
        made = {str(i): made[""] for i in range(len(layers))}
    return {f"{LAYERS}.{name}": device for name, device in made.items()}


def _as_device(device: int | str | torch.device) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _is_left(device: int | str | torch.device, main: torch.device) -> bool:
    return str(device) == "disk" or (str(device) == "cpu" and main.type != "cpu")
