"""The one class of error that is a message to the user, and the request for an optional package."""

from __future__ import annotations

import importlib
from types import ModuleType


class HYWUError(ValueError):
    """Something the user can put right: the text names the file or key, what disagrees, the way out."""


def need(package: str, purpose: str, install: str | None = None) -> ModuleType:
    """Import an optional package where it is used.

    `purpose` completes the sentence "<package> is needed ...", for example "to save as PEFT".
    Raises HYWUError, naming the pip command, when the package is missing.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = install or package.split(".")[0]
        raise HYWUError(
            f"The package {name} is needed {purpose}: install it with `pip install {name}` ({error})."
        ) from error
