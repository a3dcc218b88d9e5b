"""Damaged files of every kind that is read: each must load, or be refused in one sentence, soon and in little memory.

The mutations know the files' structure (JSON trees, safetensors headers and tensors, image chunks) and are a
function of the seed. `tests/core/test_fuzz.py` runs some hundred of each kind; more by the command

  python dev.py fuzz --count 10000            or  python tests/helpers/fuzz.py --count 10000

which prints every traceback, hang and memory hog with its seed, and exits with 1 where there is any.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from hywu_core import HYWUError  # noqa: E402

#: Seconds of computing that one file may take (ten times as long by the clock), and bytes of memory beyond what reading the whole one took.
SECONDS, MEMORY = 5.0, 200 << 20

Read = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """make: folder -> the file or folder that is read; read: what reads it."""

    name: str
    make: Callable[[Path], Path]
    read: Read


# -- mutations ---------------------------------------------------------------------------------------

UNEXPECTED: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**6, 10**9, 2**31, 2**63, 10**400, -(10**9), 0.5, 1e308, 1e-300,
    "", "x", "a/b", "../../x", "/etc/passwd", "nul\0l", "\ud83d", "é\u2028\u0085", "x" * 5000, "*bad(",
    [], {}, [[]], [None], ["a", "b"], {"a": 1}, [[1, 2]], {"": {}}, "inf", "1e999",
)  # fmt: skip

RAW_JSON: tuple[bytes, ...] = (
    b"", b"{", b"null", b"[]", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 6000, b"NaN", b"Infinity",
    b'{"a": 1e999}', b'"\xff\xfe"', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"{}{}", b'{"a": 1, "a": 2}',
)  # fmt: skip


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to every value of a JSON tree."""
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """One to three values replaced, removed, doubled, renamed or moved."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(tree)))
        if not path:
            if rng.random() < 0.1:
                tree = rng.choice(UNEXPECTED)
            continue
        owner = tree
        for key in path[:-1]:
            owner = owner[key]
        key, how = path[-1], rng.random()
        if how < 0.55:
            owner[key] = rng.choice(UNEXPECTED)
        elif (
            how < 0.65 and isinstance(owner[key], (int, float)) and not isinstance(owner[key], bool)
        ):
            owner[key] = owner[key] * rng.choice((-1, 2, 1000)) + rng.choice((0, 1))
        elif how < 0.8:
            del owner[key]
        elif isinstance(owner, dict):
            owner[str(key) + rng.choice(("", "x", "\ud83d", "\0"))] = owner.pop(key)
        else:
            owner.append(owner[key])
    return tree


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a part cut out, doubled, zeroed, or the end missing."""
    if not data:
        return b"\0"
    data = bytearray(data)
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 4, 64, 4096)))
    how = rng.randrange(6)
    if how == 0:
        for _ in range(rng.choice((1, 8, 64))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[start:]
    elif how == 2:
        del data[start:stop]
    elif how == 3:
        data[start:stop] = bytes(stop - start)
    elif how == 4:
        data[start:start] = data[start:stop] * rng.choice((1, 16))
    else:
        data[start:stop] = rng.randbytes(stop - start)
    return bytes(data)


def mutate_json(path: Path, rng: random.Random) -> None:
    """A JSON file, or a line of a JSONL file."""
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.15:
        path.write_bytes(rng.choice(RAW_JSON))
        return
    if rng.random() < 0.15:
        path.write_bytes(mutate_bytes(text.encode(), rng))
        return
    if path.suffix == ".jsonl":
        lines = text.rstrip("\n").split("\n")
        n = rng.randrange(len(lines))
        lines[n] = json.dumps(
            mutate_tree(json.loads(lines[n]), rng), ensure_ascii=rng.random() < 0.7
        )
        changed = "\n".join(lines) + "\n"
    else:
        changed = json.dumps(mutate_tree(json.loads(text), rng), ensure_ascii=rng.random() < 0.7)
    path.write_bytes(changed.encode("utf-8", "surrogatepass"))


def mutate_safetensors(path: Path, rng: random.Random) -> None:
    """The head's tree, our header in it, the tensors, or the bytes."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    how = rng.random()
    if how < 0.2:
        path.write_bytes(mutate_bytes(data, rng))
    elif how < 0.35:
        path.write_bytes(mutate_bytes(data[: 8 + length], rng) + data[8 + length :])
    elif how < 0.55:
        head = json.loads(data[8 : 8 + length])
        text = json.dumps(mutate_tree(head, rng), ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    elif how < 0.85:
        _mutate_header(path, json.loads(data[8 : 8 + length]), data[8 + length :], rng)
    else:
        _mutate_tensors(path, json.loads(data[8 : 8 + length]).get("__metadata__", {}), rng)


def _mutate_header(path: Path, head: dict, body: bytes, rng: random.Random) -> None:
    metadata = head.setdefault("__metadata__", {})
    own = metadata.get("hywu")
    if own is None or rng.random() < 0.1:
        metadata[rng.choice(("hywu", "lora_adapter_metadata", "ss_network_alpha"))] = rng.choice(
            (
                "{",
                "[]",
                "null",
                "3",
                "NaN",
                '{"format": "hywu-lora-1"}',
                '{"format": 3}',
                "[" * 9999,
            )
        )
    else:
        tree = mutate_tree(json.loads(own), rng)
        metadata["hywu"] = json.dumps(tree, ensure_ascii=True)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _mutate_tensors(path: Path, metadata: dict, rng: random.Random) -> None:
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    path.unlink()
    texts = [
        key
        for key in sorted(tensors)
        if tensors[key].dtype is torch.uint8 and _is_text(tensors[key])
    ]
    if texts and rng.random() < 0.6:
        key = rng.choice(texts)
        tree = mutate_tree(json.loads(bytes(tensors[key].tolist())), rng)
        tensors[key] = torch.tensor(list(json.dumps(tree).encode()), dtype=torch.uint8)
        save_file(tensors, path, metadata=metadata)
        return
    key = rng.choice(sorted(tensors))
    value, how = tensors.pop(key), rng.randrange(8)
    if how == 0:
        value.fill_(
            rng.choice((float("nan"), float("inf"), 0.0))
        ) if value.is_floating_point() else None
    elif how == 1:
        value = value[..., :0]
    elif how == 2:
        value = value[None]
    elif how == 3:
        value = value.to(
            rng.choice((torch.int64, torch.bool, torch.uint8, torch.float64, torch.float16))
        )
    elif how == 4:
        value = value.flatten()
    elif how == 5:
        key += rng.choice((".x", "\u2028", "a" * 300))
    elif how == 6:
        value = torch.cat([value, value]) if value.ndim else value[None]
    if how != 7:
        tensors[key] = value.contiguous()
    save_file(tensors, path, metadata=metadata)


def _is_text(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds a JSON object, as marks of quantized weights do."""
    return tensor.ndim == 1 and len(tensor) > 1 and bytes(tensor[:1].tolist()) == b"{"


def mutate(path: Path, rng: random.Random) -> None:
    """One file of a folder, or the file."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        path = rng.choice(files)
        if rng.random() < 0.05:
            path.unlink()
            return
    if path.suffix == ".safetensors":
        mutate_safetensors(path, rng)
    elif path.suffix in (".json", ".jsonl"):
        mutate_json(path, rng)
    else:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))


# -- what is read --------------------------------------------------------------------------------------


def kinds() -> list[Kind]:
    """Every kind of file that users bring, with what reads it."""
    from fuzz_kinds import KINDS

    return [Kind(*row) for row in KINDS]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """A TimeoutError after so many seconds of computing, or ten times as many of waiting."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    timers = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    former = {number: signal.signal(number, stop) for number in timers}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    try:
        yield
    finally:
        for number, timer in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, former[number])


def peak(reset: bool = False) -> int:
    """Bytes of the largest resident memory since the last reset; where it can't be reset, so far."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(kind: Kind, whole: Path, folder: Path, seed: int) -> str:
    """What was wrong with how a damaged copy was read; empty when nothing was."""
    copy = folder / whole.name
    try:
        if whole.is_dir():
            shutil.copytree(whole, copy)
        else:
            shutil.copyfile(whole, copy)
        if not damage(copy, random.Random(f"{kind.name} {seed}")):
            return ""
        return judged(kind, copy)
    finally:
        if copy.is_dir():
            shutil.rmtree(copy)
        copy.unlink(missing_ok=True)


def damage(copy: Path, rng: random.Random) -> bool:
    """Mutate once, sometimes twice; False where it can't be done a second time."""
    try:
        mutate(copy, rng)
        if rng.random() < 0.15:
            mutate(copy, rng)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        OSError,
    ):
        return False
    except Exception as error:
        if not type(error).__name__.startswith("Safetensor"):
            raise
        return False
    return True


def judged(kind: Kind, copy: Path) -> str:
    """What was wrong with how a file was read."""
    before = peak(reset=True)
    try:
        with limited(SECONDS):
            kind.read(copy)
    except HYWUError as error:
        text = str(error)
        if "\n" in text.strip():
            return f"more than one line: {text[:300]!r}"
        if text != text.encode("utf-8", "replace").decode():
            return f"text that can't be encoded: {text[:300]!a}"
    except TimeoutError as error:
        return f"hang: {error}"
    except BaseException:
        return traceback.format_exc(limit=-6)
    grown = peak() - before
    return f"memory: {grown >> 20} MiB more" if grown > MEMORY else ""


def run(kind: Kind, count: int, first: int = 0) -> list[str]:
    """Seeds `first` to `first + count` of one kind: a line (or traceback) for each failure."""
    failures = []
    with tempfile.TemporaryDirectory(prefix="hywu_fuzz_") as name:
        made, work = Path(name) / "whole", Path(name) / "damaged"
        made.mkdir()
        work.mkdir()
        whole = kind.make(made)
        kind.read(whole)
        for seed in range(first, first + count):
            if wrong := attempt(kind, whole, work, seed):
                failures.append(f"{kind.name}, seed {seed}: {wrong}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000, help="mutations of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--kinds", nargs="+", help="only these")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    chosen = [k for k in kinds() if not args.kinds or k.name in args.kinds]
    each, failed = -(-args.count // len(chosen)), 0
    for kind in chosen:
        started = time.perf_counter()
        failures = run(kind, each, args.seed)
        failed += len(failures)
        print(
            f"{kind.name}: {each} in {time.perf_counter() - started:.0f} s, {len(failures)} wrong",
            flush=True,
        )
        for text in failures[:20]:
            print(text, flush=True)
    print(f"{each * len(chosen)} mutations of {len(chosen)} kinds, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
