"""What the editor knows: warns when an instruction shares no telling word with what was trained."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

#: Two words count as one from this similarity on ("warm" and "warmer", "foggy" and "foggier").
THRESHOLD = 0.55

#: Words that stand in requests of every kind and so tell nothing about what is asked.
_COMMON = """
    a add all an and apply as at be bit bring by can could do don everything for free from get
    give go has have her him i image in instead into is it its itself just less let like little
    look lot make me more much must my need needs no not now of off on one out over photo
    photograph picture please put remove replace return same see shot should so t take than that
    the there this to too try turn two under up version very want we what will with would you
"""
COMMON = frozenset(_COMMON.split())

#: Words that ask for a part of the image ("blur the background"); the editor knows only the whole.
_PARTS = """
    animal animals area background backdrop bottom building buildings car cat centre center child
    corner dog edge except eye eyes face faces flower flowers foreground grass hair hand hands her
    him house left man middle mountain mountains nobody object objects only ocean part people
    person region right road sea selectively side sign skin sky somebody subject text top tree trees
    wall water window windows woman
"""
PARTS = frozenset(_PARTS.split())


def similarity(one: str, other: str) -> float:
    """Cosine of the counts of two words' character trigrams, 0..1; deterministic."""
    a, b = _trigrams(one), _trigrams(other)
    dot = sum(count * b[gram] for gram, count in a.items())
    return dot / (sum(c * c for c in a.values()) * sum(c * c for c in b.values())) ** 0.5


def unknown_instruction(instruction: str, known: Iterable[tuple[str, str]]) -> str:
    """A warning that says what the editor doesn't know, or "" when the instruction is near to something
    that it was trained on: of no telling word it lists the tasks; of a known word for a part of the image
    ("blur the background") it says that the whole is edited.

    known: (task name, phrasing) pairs.
    It looks at words alone.
    """
    known = list(known)
    if any(instruction.strip().lower() == text for _, text in known):
        return ""
    words = {word for _, text in known for word in _telling(text)}
    if any(_near(word, each) for word in _telling(instruction) for each in words):
        spoken = re.findall(r"[^\W\d_]+", instruction.lower())
        parts = [word for word in spoken if word in PARTS and word not in words]
        if not parts:
            return ""
        return f"'{instruction}': the editor edits the whole image and can't keep to '{parts[0]}'."
    tasks = ", ".join(dict.fromkeys(name for name, _ in known))
    return f"'{instruction}' is far from everything the editor was trained on. It knows: {tasks}."


def _near(word: str, known: str) -> bool:
    """Whether a word counts as a known one: of short ones ("red", "reduce") only what begins with it."""
    if min(len(word), len(known)) <= 3 and not word.startswith(known):
        return False
    return similarity(word, known) >= THRESHOLD


def _telling(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", text.lower())) - COMMON


def _trigrams(word: str) -> Counter[str]:
    padded = f"  {word} "
    return Counter(padded[i : i + 3] for i in range(len(padded) - 2))
