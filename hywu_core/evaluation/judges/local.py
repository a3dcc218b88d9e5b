"""A judge on this machine: any vision-language model that `transformers` loads from a folder."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ... import fingerprint
from ...atomic import real_path
from ...devices import chosen_device
from ...errors import HYWUError, need, one_line
from ..options import Kind, Option
from .base import MAX_TOKENS, Failure, JudgeRequest, Reply


@dataclass
class LocalJudge:
    """Greedy answers of the model in `folder` (safetensors, with its processor and chat template).

    Nothing is downloaded and no code from the folder runs.
    dtype: "auto" takes the checkpoint's. The version is a hash of the folder's config and of its weights'
        names and sizes.
    Raises HYWUError when the folder holds no such model, or no chat template.
    """

    folder: Path
    device: str = "cpu"
    dtype: str = "auto"
    max_tokens: int = 512
    parallel: int = field(default=1, init=False)
    name: str = field(default="", init=False)
    version: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if not (self.folder / "config.json").is_file():
            raise HYWUError(
                f"{self.folder}: holds no config.json; give a transformers model's folder."
            )
        self.name = real_path(self.folder).name
        self.version = f"local-1-{_folder_hash(self.folder)}"
        device = str(chosen_device(self.device))
        self._model, self._processor = _load(self.folder, device, self.dtype)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Free the model."""
        self._model = self._processor = None

    @torch.inference_mode()
    def score(self, request: JudgeRequest) -> Reply:
        content: list[dict[str, Any]] = [{"type": "image", "image": i} for i in request.images]
        content.append({"type": "text", "text": request.question.prompt})
        try:
            return self._answer(content)
        except (RuntimeError, ValueError) as error:  # no memory for these images, for instance
            raise Failure(f"the model failed: {str(error).strip()[:300]}") from error

    def _answer(self, content: list[dict[str, Any]]) -> Reply:
        with self._lock:
            inputs = self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self._model.device, dtype=self._model.dtype)
            length = inputs["input_ids"].shape[1]
            output = self._model.generate(
                **inputs, max_new_tokens=self.max_tokens, do_sample=False, num_beams=1
            )[0, length:]
        if len(output) >= self.max_tokens and int(output[-1]) not in self._ends():
            raise Failure(f"the answer was cut off at {self.max_tokens} tokens; raise --max-tokens")
        text = self._processor.decode(output, skip_special_tokens=True)
        return Reply(text, self.name, length, len(output))

    def _ends(self) -> list[int]:
        """Tokens that end an answer."""
        end = self._model.generation_config.eos_token_id
        return [] if end is None else list(end) if isinstance(end, (list, tuple)) else [end]


def _load(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    transformers = need("transformers", "to judge with a local vision-language model")
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, **options)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, **{_dtype_word(transformers): dtype}, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise HYWUError(
            f"{folder}: no vision-language model that transformers loads ({one_line(error)})."
        ) from error
    if getattr(processor, "chat_template", None) is None:
        raise HYWUError(
            f"{folder}: its processor has no chat template; take an instruction-tuned model."
        )
    return model.to(device).eval(), processor


def _dtype_word(transformers: Any) -> str:
    # `dtype` came with 4.56; before, it is handed on to the model's class, which refuses it
    major, minor = map(int, transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _folder_hash(folder: Path) -> str:
    weights = sorted(folder.glob("*.safetensors"))
    sizes = (f"{file.name}{file.stat().st_size}" for file in weights)
    return fingerprint.digest([(folder / "config.json").read_bytes(), *sizes], 8)


KIND = Kind(
    "--judge",
    "local",
    "a transformers vision-language model's folder",
    LocalJudge,
    (
        Option(
            "folder",
            "folder of the model, safetensors and processor",
            needed="a transformers model's folder",
        ),
        Option("device", "torch device (%(default)s)", "cpu"),
        MAX_TOKENS,
    ),
)
