"""The one class of error that is a message to the user, lines for logs, and asking for an optional package."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType


def printable(text: str) -> str:
    """The text with ``\\udXXX`` for lone surrogates (half an emoji, an undecodable file name).

    No log, file or client can take those: what a user gave is passed through here before it is shown.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, whose lines any log can take: ComfyUI's ends the queue on one that it can't."""
    logger = logging.getLogger(name)
    if not any(isinstance(found, _Printable) for found in logger.filters):
        logger.addFilter(_Printable())
    return logger


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True


class HYWUError(ValueError):
    """Something the user can put right: the text names the file or key, what disagrees, the way out."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(a) if isinstance(a, str) else a for a in args))


def one_line(error: BaseException) -> str:
    """The first line of what a library's error says, else its class: ours are one sentence."""
    return next(iter(str(error).strip().splitlines()), "").rstrip(".: ") or type(error).__name__


#: What torch's errors say where a device or the host has no memory left; they have no class in common.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up, the host's or a device's."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(t in str(error).lower() for t in _NO_MEMORY)


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
