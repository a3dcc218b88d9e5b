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


def similarity(one: str, other: str) -> float:
    """Cosine of the counts of two words' character trigrams, 0..1; deterministic."""
    a, b = _trigrams(one), _trigrams(other)
    dot = sum(count * b[gram] for gram, count in a.items())
    return dot / (sum(c * c for c in a.values()) * sum(c * c for c in b.values())) ** 0.5


def unknown_instruction(instruction: str, known: Iterable[tuple[str, str]]) -> str:
    """A warning that lists what the editor knows, or "" when the instruction is near to something.

    known: (task name, phrasing) pairs. It looks at words alone: a known word in a strange request
    ("blur only the dog") passes.
    """
    known = list(known)
    if any(instruction.strip().lower() == text for _, text in known):
        return ""
    words = {word for _, text in known for word in _telling(text)}
    if any(similarity(w, k) >= THRESHOLD for w in _telling(instruction) for k in words):
        return ""
    tasks = ", ".join(dict.fromkeys(name for name, _ in known))
    return f"'{instruction}' is far from everything the editor was trained on. It knows: {tasks}."


def _telling(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", text.lower())) - COMMON


def _trigrams(word: str) -> Counter[str]:
    padded = f"  {word} "
    return Counter(padded[i : i + 3] for i in range(len(padded) - 2))
