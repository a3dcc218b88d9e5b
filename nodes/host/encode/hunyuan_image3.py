"""The published condition: hidden states of HunyuanImage-3 itself, of instruction, images and thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ....hywu_core.bases.hunyuan_image3.pipeline import condition_of
from ....hywu_core.condition import OFFICIAL_PART, Condition
from ....hywu_core.encoders.base import Reads
from ....hywu_core.errors import HYWUError
from ..hunyuan_image3.load import model_of
from ..hunyuan_image3.model import KEY
from ..hunyuan_image3.prompt import encoded, hidden_states, requests_of


class HunyuanEncoder:
    """(images, instructions, further images) -> Condition, by the MODEL that is connected.

    With a conditioning of HunyuanImage-3 Edit Prompt, its images, instructions and thoughts are what is
    read, and its noise; else those of the node, without a thought.
    """

    any_number = True

    def __init__(self, reads: Reads, sockets: Mapping[str, Any]) -> None:
        self.parts, self.identity, self.sockets = reads.parts, reads.identity, sockets
        if sockets.get("model") is None:
            raise HYWUError(
                "This generator reads hidden states of HunyuanImage-3; connect the MODEL of Load "
                "HunyuanImage-3 to model, or make the condition on a machine that has it and bring it in "
                "with Load Condition."
            )
        self.model = sockets["model"]
        width = model_of(self.model).diffusion_model.config.hidden_size
        wanted = self.parts.get(OFFICIAL_PART)
        if width != wanted:
            raise HYWUError(
                f"The connected HunyuanImage-3 has hidden states {width} wide, the generator reads {wanted}; "
                "connect the base model that it was trained for."
            )

    def __call__(self, images: Tensor, instructions: Sequence[str], *further: Tensor) -> Condition:
        reader = model_of(self.model).reader
        if (given := self.sockets.get("conditioning")) is not None:
            rows = given[0][1].get(KEY)
            if rows is None:
                raise HYWUError(
                    "The conditioning isn't HunyuanImage-3's; connect positive of HunyuanImage-3 Edit Prompt, "
                    "or nothing."
                )
            requests, sources = [r.request for r in rows], [r.sources for r in rows]
        else:
            shown = [each.movedim(1, -1) for each in (images, *further)]
            requests = requests_of(reader, "\n".join(instructions), shown)
            sources = encoded(reader, requests)
        states = hidden_states(self.model, requests, sources).float().cpu()
        lengths = [len(reader.prompts.ratio(request)) for request in requests]
        made = condition_of(states, lengths, requests, reader.prompts.folder.path.name)
        return (
            made
            if given is None
            else replace(made, origin={**made.origin, "text_from": "conditioning"})
        )

    def warnings(self, texts: Sequence[str], condition: Condition) -> list[str]:
        return []
