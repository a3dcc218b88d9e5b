"""A voting session: how it is made from two results, and what each voter is shown.

Images are written anew as PNG without metadata under random names, so that neither a file's name
nor a workflow embedded in it tells a voter which method made it. Order and sides are shuffled by
the session's seed and the voter's name: the same voter sees the same order in every tab.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ...errors import HYWUError
from .store import DATABASE, IMAGES, Pair, Store, write_session

CHOICES = ("left", "same", "right")


@dataclass(frozen=True)
class Entry:
    """One item to compare: where its source and the two methods' results lie."""

    item: str
    instruction: str
    source: Path
    a: Path
    b: Path


def create_session(
    out: str | Path,
    entries: Sequence[Entry],
    methods: tuple[str, str],
    name: str = "Which edit is better?",
    seed: int | None = None,
    pairs_per_voter: int = 0,
) -> Path:
    """Write a session folder; it appears whole or not at all.

    Raises HYWUError when the folder exists, nothing can be compared, or an image is unreadable.
    """
    # Imported here, as below: serving votes needs no torch.
    from ...files import atomic_folder

    out = Path(out)
    if out.exists():
        raise HYWUError(f"{out} exists already, and votes in it are kept: choose another --out.")
    if not entries:
        raise HYWUError("The two results have no item in common: nothing can be compared.")
    with atomic_folder(out) as work:
        (work / IMAGES).mkdir()
        pairs = [
            Pair(
                secrets.token_hex(8),
                entry.item,
                entry.instruction,
                *(_copy(path, work / IMAGES) for path in (entry.source, entry.a, entry.b)),
            )
            for entry in tqdm(entries, desc="pairs", unit="pair")
        ]
        about = {
            "name": name,
            "method_a": methods[0],
            "method_b": methods[1],
            "seed": secrets.randbits(62) if seed is None else seed,
            "token": secrets.token_urlsafe(24),
            "pairs_per_voter": pairs_per_voter,
        }
        write_session(work / DATABASE, about, pairs)
    return out


def _copy(path: Path, folder: Path) -> str:
    # Serving votes needs none of what reading images brings in (torch, numpy).
    from ...images import load_image

    image_id = secrets.token_hex(12)
    image = load_image(path).convert("RGB")
    image.info.clear()
    image.save(folder / f"{image_id}.png")
    return image_id


def assignment(store: Store, voter: str) -> list[tuple[Pair, bool]]:
    """The voter's pairs in order, each with whether A is on the left (half of them, rounded)."""
    rng = random.Random(f"{store.about['seed']}/{voter}")
    order = list(store.pairs.values())
    rng.shuffle(order)
    limit = int(store.about["pairs_per_voter"])
    order = order[:limit] if limit else order
    lefts = [i % 2 == 0 for i in range(len(order))]
    rng.shuffle(lefts)
    return list(zip(order, lefts, strict=True))


def state(store: Store, voter: str) -> dict[str, object]:
    """What the page shows next: no method, file name or item key is in it."""
    assigned = assignment(store, voter)
    voted = store.voted(voter)
    done = set(voted)
    open_pairs = [(pair, left) for pair, left in assigned if pair.pair not in done]
    answer: dict[str, object] = {
        "name": store.about["name"],
        "done": len(assigned) - len(open_pairs),
        "total": len(assigned),
        "last": voted[-1] if voted else None,
        "pair": None,
    }
    if open_pairs:
        pair, a_left = open_pairs[0]
        left, right = (pair.a, pair.b) if a_left else (pair.b, pair.a)
        answer["pair"] = {
            "id": pair.pair,
            "instruction": pair.instruction,
            "source": pair.source,
            "left": left,
            "right": right,
        }
    return answer


def vote(store: Store, voter: str, pair: str, choice: str) -> None:
    """Commit a voter's choice (left, same, right); the side is worked out here, not believed.

    Raises HYWUError for a pair that isn't the voter's, store.Conflict for a second vote.
    """
    a_left = {p.pair: left for p, left in assignment(store, voter)}.get(pair)
    if a_left is None or choice not in CHOICES:
        raise HYWUError("This vote names no pair of yours, or no choice of left, same, right.")
    if choice == "same":
        verdict = "same"
    else:
        verdict = "good" if (choice == "left") == a_left else "bad"
    store.add_vote(voter, pair, verdict, a_left)
