"""PEFT's patterns of module names, matched in a time that grows with their length and the name's only.

A pattern comes with a file of somebody else's, and Python's own matcher takes exponential time on some, as
``(a+)+b``. Here the pattern's parts become states, and all states that a start of the name leads to are held
at once (Thompson 1968): nothing is ever tried again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from ..errors import HYWUError

try:
    from re import _constants as sre
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse as parser

#: States of one pattern; counted repeats like ``(a{99}){99}`` multiply.
MOST_STATES = 2_000


class Free(Enum):
    """Steps that take no letter: always, at the name's start only, at its end only."""

    ALWAYS, START, END = range(3)


#: What one letter must be, or a step that takes none.
Test = Callable[[str], bool] | Free

_CATEGORIES = {
    sre.CATEGORY_DIGIT: r"\d", sre.CATEGORY_NOT_DIGIT: r"\D", sre.CATEGORY_SPACE: r"\s",
    sre.CATEGORY_NOT_SPACE: r"\S", sre.CATEGORY_WORD: r"\w", sre.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip


class Pattern:
    """What PEFT makes of a key of alpha_pattern: it fits a name's end, from a dot or the start on.

    Raises HYWUError on what is no pattern, on look-arounds and back-references, and on a pattern too large.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        #: For each state its steps: (test, next state).
        self._steps: list[list[tuple[Test, int]]] = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parser.parse(text)  # alone too: the brackets around it must not close its own
                tree = parser.parse(rf"(?:.*\.)?(?:{text})")
            self._folds = bool(tree.state.flags & re.IGNORECASE)
            self._start = self._state()
            self._end = self._sequence(tree, self._start)
        except (re.error, RecursionError, OverflowError, ValueError, LookupError) as error:
            raise HYWUError(f"the pattern '{text[:80]}' ({error})") from error

    def fits(self, name: str) -> bool:
        """Whether PEFT gives the pattern's value to the module `name`."""
        now = self._reached({self._start}, True, not name)
        for place, letter in enumerate(name, 1):
            step = {
                target
                for state in now
                for test, target in self._steps[state]
                if not isinstance(test, Free) and test(letter)
            }
            now = self._reached(step, False, place == len(name))
        return self._end in now

    def _reached(self, states: set[int], first: bool, last: bool) -> set[int]:
        """These states and all that follow without a letter."""
        passable = (
            {Free.ALWAYS} | ({Free.START} if first else set()) | ({Free.END} if last else set())
        )
        found, left = set(states), list(states)
        while left:
            for test, target in self._steps[left.pop()]:
                if isinstance(test, Free) and test in passable and target not in found:
                    found.add(target)
                    left.append(target)
        return found

    # -- from Python's parse tree to states ----------------------------------------------------------

    def _state(self) -> int:
        if len(self._steps) >= MOST_STATES:
            raise ValueError(f"it has more than {MOST_STATES} states")
        self._steps.append([])
        return len(self._steps) - 1

    def _step(self, source: int, test: Test, target: int | None = None) -> int:
        target = self._state() if target is None else target
        self._steps[source].append((test, target))
        return target

    def _sequence(self, parts: Iterable[tuple[Any, Any]], state: int) -> int:
        for kind, value in parts:
            state = self._part(kind, value, state)
        return state

    def _part(self, kind: Any, value: Any, state: int) -> int:
        """The state after a part that begins in `state`."""
        if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            return self._repeat(*value, state)
        if kind is sre.BRANCH:
            end = self._state()
            for branch in value[1]:
                self._step(self._sequence(branch, self._step(state, Free.ALWAYS)), Free.ALWAYS, end)
            return end
        if kind is sre.SUBPATTERN and not value[1] | value[2]:
            return self._sequence(value[3], state)
        if kind is sre.AT and value in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
            return self._step(state, Free.START)
        if kind is sre.AT and value in (sre.AT_END, sre.AT_END_STRING):
            return self._step(state, Free.END)
        return self._step(state, self._letter(kind, value))

    def _repeat(self, least: int, most: int, parts: Any, state: int) -> int:
        for _ in range(least):
            state = self._sequence(parts, self._step(state, Free.ALWAYS))
        end = self._step(state, Free.ALWAYS)
        if most == sre.MAXREPEAT:
            again = self._step(end, Free.ALWAYS)
            self._step(self._sequence(parts, again), Free.ALWAYS, end)
            return end
        for _ in range(most - least):
            state = self._sequence(parts, self._step(state, Free.ALWAYS))
            self._step(state, Free.ALWAYS, end)
        return end

    def _letter(self, kind: Any, value: Any) -> Callable[[str], bool]:
        if kind is sre.ANY:
            return lambda letter: letter != "\n"
        if kind is sre.IN:
            unlike = value[0][0] is sre.NEGATE
            tests = [self._letter(*item) for item in value[unlike:]]
            return lambda letter: any(test(letter) for test in tests) != unlike
        if kind is sre.NOT_LITERAL:
            equal = self._letter(sre.LITERAL, value)
            return lambda letter: not equal(letter)
        if kind in (sre.LITERAL, sre.RANGE):
            low, high = (value, value) if kind is sre.LITERAL else value
            if self._folds:
                return lambda letter: any(low <= ord(c) <= high for c in _cases(letter))
            return lambda letter: low <= ord(letter) <= high
        if kind is sre.CATEGORY:
            test = re.compile(_CATEGORIES[value])
            return lambda letter: test.match(letter) is not None
        raise ValueError(f"{str(kind).lower()} is more than the names of modules need")


def _cases(letter: str) -> set[str]:
    return {c for c in (letter, letter.lower(), letter.upper()) if len(c) == 1}
