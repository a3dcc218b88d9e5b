"""The folder's tokenizer and its special tokens. All ids are taken from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import HYWUError, need

TOKENIZER = "tokenizer.json"

#: attribute -> the token's text
_SPECIAL = {
    "boi": "<boi>",
    "eoi": "<eoi>",
    "image": "<img>",
    "unconditional": "<cfg>",
    "timestep": "<timestep>",
    "timestep_r": "<timestep_r>",
    "guidance": "<guidance>",
    "joint": "<joint_img_sep>",
    "think": "<think>",
    "end_think": "</think>",
    "recaption": "<recaption>",
    "end_recaption": "</recaption>",
    "answer": "<answer>",
    "end_answer": "</answer>",
}
_BEGIN, _END, _PAD = "<|startoftext|>", "<|endoftext|>", "<pad>"


@dataclass(frozen=True)
class Tokens:
    """A tokenizer with the ids that a sequence is built of.

    ratios: the id of each bucket, in order.
    """

    tokenizer: Any
    ids: dict[str, int]
    ratios: tuple[int, ...]
    bos: int
    eos: int
    pad: int

    def __getattr__(self, name: str) -> int:
        try:
            return self.__dict__["ids"][name]
        except KeyError:
            raise AttributeError(name) from None

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text by itself; special tokens written in it count as such."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def load_tokens(folder: Path, config: dict[str, Any], num_ratios: int, base: int) -> Tokens:
    """Read ``tokenizer.json``.

    config: the folder's ``config.json``.
    base: its image_base_size.

    Raises HYWUError where it is missing, or lacks a token that a sequence needs.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise HYWUError(f"{folder}: no {TOKENIZER}; download it from the model's page.")
    library = need("tokenizers", "to read HunyuanImage-3's tokenizer")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise HYWUError(f"{path}: can't be read ({error}); download it again.") from error
    named = {**_SPECIAL, "size": f"<img_size_{base}>"}
    ids = {key: tokenizer.token_to_id(text) for key, text in named.items()}
    ratios = [tokenizer.token_to_id(f"<img_ratio_{i}>") for i in range(num_ratios)]
    lacking = [named[key] for key, value in ids.items() if value is None]
    lacking += [f"<img_ratio_{i}>" for i, value in enumerate(ratios) if value is None]
    if lacking:
        raise HYWUError(
            f"{path}: has no token {', '.join(lacking[:6])}{' and others' if lacking[6:] else ''}. The "
            "base model HunyuanImage-3.0 lacks tokens of HunyuanImage-3.0-Instruct, which edits images; "
            "download that one."
        )

    def marked(key: str, text: str) -> int:
        found = config.get(key)
        return int(found) if found is not None else tokenizer.token_to_id(text)

    return Tokens(
        tokenizer,
        ids,
        tuple(ratios),
        marked("bos_token_id", _BEGIN),
        marked("eos_token_id", _END),
        marked("pad_token_id", _PAD),
    )
