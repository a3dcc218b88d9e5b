"""The registry of benchmarks: one line each. Nothing else in the project compares their names.

A module here says BENCHMARK (its items, and where results lie), QUESTIONNAIRE (what is asked about an
edit, and how answers count), or both. Their order is that of the command line and of the nodes' widgets.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import HYWUError
from ..items import ItemList
from . import folder, gedit, imgedit, wu_eval
from .base import Benchmark, Questionnaire

_MODULES = (wu_eval, gedit, imgedit, folder)

#: name -> where items come from and results go
BENCHMARKS: dict[str, Benchmark] = {
    module.BENCHMARK.name: module.BENCHMARK for module in _MODULES if hasattr(module, "BENCHMARK")
}

#: name -> what is asked, and how answers count
QUESTIONNAIRES: dict[str, type[Questionnaire]] = {
    module.QUESTIONNAIRE.name: module.QUESTIONNAIRE
    for module in _MODULES
    if hasattr(module, "QUESTIONNAIRE")
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name. Raises HYWUError listing those there are."""
    if name not in BENCHMARKS:
        raise HYWUError(f"There is no benchmark '{name}'; choose {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def read_items(name: str, path: str | Path, beside: Path | None = None) -> ItemList:
    """Items of a benchmark from the user's path.

    beside: the folder of results; a benchmark that is published packed is unpacked into it.
    Raises HYWUError naming the file.
    """
    return find_benchmark(name).read(Path(path), beside)


def load_questionnaire(name: str, path: str | Path | None = None) -> Questionnaire:
    """A questionnaire with our prompts, or with those of a JSON file. Raises HYWUError."""
    if name not in QUESTIONNAIRES:
        raise HYWUError(f"There is no questionnaire '{name}'; choose {', '.join(QUESTIONNAIRES)}.")
    return QUESTIONNAIRES[name].load(path)
