"""What a user can choose about an editor or a judge: said beside it, read by whoever asks the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..errors import HYWUError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Option:
    """One choice: ``--name`` of a command.

    needed: what it is, where it can't be left out ("" where the name says it); else None.
    type: bool is a switch.
    """

    name: str
    help: str
    default: Any = None
    type: Callable[[str], Any] = str
    metavar: str | None = None
    needed: str | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Kind(Generic[Made]):
    """One kind of editor or judge: its name, a summary, its options, and what makes it of them.

    what: the option that chooses it ("--editor").
    make: takes the options by name.
    Kinds may share options, which are then the same.
    """

    what: str
    name: str
    summary: str
    make: Callable[..., Made]
    options: tuple[Option, ...] = ()

    def build(self, values: Mapping[str, Any]) -> Made:
        """Make one of the user's values (option -> value). Raises HYWUError naming what is missing."""
        missing = [o for o in self.options if o.needed is not None and not values.get(o.name)]
        if missing:
            flags = ", ".join(option.flag for option in missing)
            told = f", {missing[0].needed}" if len(missing) == 1 and missing[0].needed else ""
            raise HYWUError(f"{self.what} {self.name} needs {flags}{told}.")
        return self.make(**{option.name: values[option.name] for option in self.options})
