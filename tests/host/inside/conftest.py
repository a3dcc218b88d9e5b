"""Tests of this folder run inside ComfyUI: their process imports its tree, and the extension as it does.

Test files import `comfy` and `hywu_nodes` (the extension's package) like any module. All folders of ComfyUI
(models, input, output, temp, user) lie in a temporary one that the process removes at its end.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dev

#: Name of the extension's package in here.
PACKAGE = "hywu_nodes"


def _become_comfyui() -> Path:
    """Import ComfyUI's command line and folders as its main.py does; returns the folder of its folders."""
    host = dev.prepare_host()
    if host.python.resolve() != Path(sys.executable).resolve():
        raise pytest.UsageError(
            f"{host.tree} is run by {host.python} and these tests by {sys.executable}; start them with "
            "`python3 dev.py test host`, which takes the former."
        )
    base = Path(tempfile.mkdtemp(prefix="hywu_inside_"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    sys.path.insert(0, str(host.tree))
    given = sys.argv
    sys.argv = ["main.py", "--cpu", "--disable-cuda-malloc", "--base-directory", str(base)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = given
    import folder_paths

    for folder in (folder_paths.get_input_directory(), folder_paths.get_output_directory()):
        Path(folder).mkdir(parents=True, exist_ok=True)
    return base


def _load_extension() -> dict[str, type]:
    spec = importlib.util.spec_from_file_location(
        PACKAGE, dev.ROOT / "__init__.py", submodule_search_locations=[str(dev.ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


BASE = _become_comfyui()
import utils.extra_config  # noqa: E402, F401, I001 - what ComfyUI has imported before it loads extensions
import comfy.samplers  # noqa: E402, F401

import nodes as _stock  # noqa: E402, F401

import torch  # noqa: E402

_started = time.process_time()  # other programs' share of the machine is not the import's
NODES = _load_extension()
IMPORT_SECONDS = time.process_time() - _started

# what imports the extension
import hidden_models  # noqa: E402
import train_node  # noqa: E402
import training_models  # noqa: E402


class Call:
    """`call.HYWUGenerateLoRA(generator, condition)` runs a node and gives its outputs."""

    def __getattr__(self, name: str) -> Callable[..., tuple]:
        node = NODES[name]

        def run(*args: object, **kwargs: object) -> tuple:
            made = getattr(node(), node.FUNCTION)(*args, **kwargs)
            return made["result"] if isinstance(made, dict) else made

        return run

    @staticmethod
    def shown(name: str, *args: object, **kwargs: object) -> dict:
        """What a node gives its `ui`."""
        node = NODES[name]
        return getattr(node(), node.FUNCTION)(*args, **kwargs)["ui"]

    @staticmethod
    def report(name: str, *args: object, **kwargs: object) -> dict:
        """The JSON that a node shows as its text."""
        return json.loads(Call.shown(name, *args, **kwargs)["text"][0])


@pytest.fixture(scope="session")
def call() -> Call:
    return Call()


@pytest.fixture(scope="session")
def nodes() -> dict[str, type]:
    """The extension's node classes by name."""
    return NODES


@pytest.fixture(scope="session")
def base() -> Path:
    """The folder of ComfyUI's folders."""
    return BASE


@pytest.fixture(autouse=True)
def fresh_lists() -> None:
    """ComfyUI lists its folders anew."""
    import folder_paths

    folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="session")
def import_seconds() -> float:
    """Processor time that importing the extension took, ComfyUI and torch being there."""
    return IMPORT_SECONDS


@pytest.fixture(scope="module")
def colour(base) -> Path:
    """The list of a training's pairs."""
    return training_models.make_pairs(base / "input" / "colour")


@pytest.fixture(scope="module")
def loaded(colour):
    """(MODEL, VAE, CLIP), loaded as ComfyUI loads them: in inference mode."""
    with torch.inference_mode():
        wan = training_models.load_model("Wan 2.1")
        return wan, training_models.wan_vae(), training_models.ToyCLIP(4096)


@pytest.fixture(scope="module")
def train(call, loaded):
    """The node's outputs; `on` are the three sockets where they are others."""

    def run(on=None, **widgets):
        with torch.inference_mode():
            return call.HYWUTrainGenerator(*(on or loaded), **{**train_node.WIDGETS, **widgets})

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture
def as_comfyui_runs_nodes():
    with torch.inference_mode():
        yield


@pytest.fixture
def encode(call):
    """(generator, text, images) -> the condition."""

    def run(generator, text, images=hidden_models.IMAGES, **inputs):
        return call.HYWUConditionEncode(generator, images, text, **inputs)[0]

    return run


@pytest.fixture
def tokens(encode):
    return lambda *args, **inputs: encode(*args, **inputs).parts[hidden_models.PART]


@pytest.fixture
def warnings(call):
    def run(generator, text, images=hidden_models.IMAGES, **inputs):
        return call.report("HYWUConditionEncode", generator, images, text, **inputs)["warnings"]

    return run
