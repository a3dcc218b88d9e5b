"""One voting session's database: pairs, images by opaque id, and votes.

SQLite with a write-ahead log and synchronous=FULL: a vote is acknowledged after its commit is on the
disk, so that a killed process loses none. (voter, pair) is the primary key: a second tab's vote for
the same pair is refused, never counted.
"""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ...errors import HYWUError, printable

DATABASE = "session.sqlite3"
IMAGES = "images"
FORMAT = "hywu-gsb-1"
VERDICTS = ("good", "same", "bad")

#: Keys of a session's settings.
ABOUT = ("name", "method_a", "method_b", "seed", "token", "pairs_per_voter")

SCHEMA = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pairs (
  pair TEXT PRIMARY KEY, item TEXT NOT NULL UNIQUE, instruction TEXT NOT NULL,
  source TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL);
CREATE TABLE votes (
  serial INTEGER PRIMARY KEY AUTOINCREMENT, voter TEXT NOT NULL,
  pair TEXT NOT NULL REFERENCES pairs(pair),
  verdict TEXT NOT NULL CHECK (verdict IN ('good', 'same', 'bad')),
  a_on_left INTEGER NOT NULL CHECK (a_on_left IN (0, 1)), time REAL NOT NULL,
  UNIQUE (voter, pair));
CREATE TABLE undone (
  serial INTEGER, voter TEXT, pair TEXT, verdict TEXT, a_on_left INTEGER, time REAL, undone REAL);
"""


@dataclass(frozen=True)
class Pair:
    """Two results of one item; source, a and b are opaque image ids."""

    pair: str
    item: str
    instruction: str
    source: str
    a: str
    b: str


@dataclass(frozen=True)
class Vote:
    """One vote, seen from method A: good means that A was better."""

    voter: str
    pair: str
    item: str
    verdict: str
    a_on_left: bool
    time: float


class Conflict(HYWUError):
    """The vote or undo meets a state that another tab has changed."""


class NotKept(HYWUError):
    """The disk didn't take what was to be kept."""


class Store:
    """An open session. Safe to use from several threads and several processes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / DATABASE
        if not path.is_file():
            raise HYWUError(
                f"{self.folder} is no voting session (it has no {DATABASE}): "
                "make one with `hywu eval gsb create`."
            )
        self._lock = threading.Lock()
        self._path, self._opened = path, path.stat()
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self.about: dict[str, str] = dict(self._db.execute("SELECT key, value FROM about"))
            rows = self._db.execute(
                "SELECT pair, item, instruction, source, a, b FROM pairs ORDER BY item"
            )
            self.pairs = {row[0]: Pair(*row) for row in rows}
            problem = self._problem()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            problem = f"can't be read as a voting session: {error}"
        if problem:
            self._db.close()
            raise HYWUError(f"{path}: {problem}.")
        self.images = {i for p in self.pairs.values() for i in (p.source, p.a, p.b)}

    def _problem(self) -> str:
        """What is wrong with an opened session; "" when nothing is."""
        if self.about.get("format") != FORMAT:
            return (
                f"has format {self.about.get('format')}, this version reads {FORMAT}: make the session again "
                "with this version"
            )
        texts = [value for pair in self.pairs.values() for value in astuple(pair)]
        if not self.pairs or not all(isinstance(text, str) for text in texts):
            return "is damaged: it holds no pairs, or such that are no text"
        images = [image for p in self.pairs.values() for image in (p.source, p.a, p.b)]
        if not all(re.fullmatch(r"[0-9a-f]+", image) for image in images):
            return "is damaged: it names images by what is no name of ours"
        lacking = [key for key in ABOUT if not self.about.get(key)]
        numbers = [self.about.get(key, "") for key in ("seed", "pairs_per_voter")]
        if lacking or not all(re.fullmatch(r"\d{1,30}|-\d{1,30}", n) for n in numbers):
            return f"is damaged: its settings lack {', '.join(lacking) or 'a whole number'}"
        if int(numbers[1]) < 0:
            return "is damaged: its pairs per voter are fewer than none"
        for table in ("votes", "undone"):
            self._db.execute(f"SELECT voter, pair, verdict, a_on_left, time FROM {table} LIMIT 1")
        strange = self._db.execute(
            "SELECT COUNT(*) FROM votes WHERE pair NOT IN (SELECT pair FROM pairs)"
        ).fetchone()
        return "is damaged: it holds votes on pairs that it doesn't have" if strange[0] else ""

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()

    def is_current(self) -> bool:
        """False when the folder was removed or replaced since: a vote would go to a file nobody has."""
        try:
            return os.path.samestat(self._path.stat(), self._opened)
        except OSError:
            return False

    def image(self, image: str) -> Path | None:
        """The file of a listed image id; None for anything else."""
        return self.folder / IMAGES / f"{image}.png" if image in self.images else None

    def voted(self, voter: str) -> list[str]:
        """The pairs that this voter has voted on, oldest vote first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT pair FROM votes WHERE voter=? ORDER BY serial", (voter,)
            )
            return [row[0] for row in rows]

    def add_vote(self, voter: str, pair: str, verdict: str, a_on_left: bool) -> None:
        """Commit one vote. Raises Conflict when this voter has already voted on the pair."""
        with self._transaction() as db:
            try:
                db.execute(
                    "INSERT INTO votes (voter, pair, verdict, a_on_left, time) VALUES (?,?,?,?,?)",
                    (voter, pair, verdict, int(a_on_left), time.time()),
                )
            except sqlite3.IntegrityError as error:
                if "UNIQUE" not in str(error):
                    raise
                raise Conflict(
                    "You have already voted on this pair, in another tab or window: "
                    "this vote was not counted."
                ) from error

    def undo(self, voter: str, pair: str) -> None:
        """Take back the voter's last vote, which must be the one on `pair`; it stays in `undone`."""
        with self._transaction() as db:
            last = db.execute(
                "SELECT serial, pair FROM votes WHERE voter=? ORDER BY serial DESC LIMIT 1",
                (voter,),
            ).fetchone()
            if last is None or last[1] != pair:
                raise Conflict("Your last vote is another one now: nothing was undone.")
            db.execute(
                "INSERT INTO undone SELECT serial, voter, pair, verdict, a_on_left, time, ? "
                "FROM votes WHERE serial=?",
                (time.time(), last[0]),
            )
            db.execute("DELETE FROM votes WHERE serial=?", (last[0],))

    def votes(self) -> list[Vote]:
        """All votes that count, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT voter, pair, verdict, a_on_left, time FROM votes ORDER BY serial"
            ).fetchall()
        return [Vote(v, p, self.pairs[p].item, w, bool(left), t) for v, p, w, left, t in rows]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Keep all that is done in the block, or nothing. Raises NotKept where the disk is full or read-only."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                # of a full disk SQLite may have rolled back by itself; left open, no other would ever begin
                with suppress(sqlite3.Error):
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise NotKept(f"{self._path}: can't be written ({error}).") from error
                raise


def write_session(path: Path, about: Mapping[str, Any], pairs: list[Pair]) -> None:
    """Write a new session's database."""
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(SCHEMA)
        rows = [(key, printable(str(value))) for key, value in {**about, "format": FORMAT}.items()]
        db.executemany("INSERT INTO about VALUES (?, ?)", rows)
        db.executemany(
            "INSERT INTO pairs VALUES (?,?,?,?,?,?)",
            [(p.pair, p.item, p.instruction, p.source, p.a, p.b) for p in pairs],
        )
