"""Make a method's results, and have them judged: one pool of threads, resumable job by job.

What is done lies on the disk before the next job is given out, so that an interrupted or killed run
loses nothing and the same call goes on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from .. import fingerprint
from ..errors import HYWUError, get_logger
from ..files import folder_lock
from ..images import load_image
from .benchmarks.base import Question, Questionnaire
from .editors.base import EditFailed, Editor
from .items import Item, ItemList
from .judges.base import Failure, Judge, JudgeRequest, Refusal, check_answerable
from .results import JUDGEMENTS, Failures, Results, write_manifest
from .store import ANSWERED, FAILED, REFUSED, Judgement, JudgementStore, StoreName

log = get_logger(__name__)

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


def in_threads(
    jobs: Iterable[Job],
    work: Callable[[Job], Outcome],
    parallel: int,
    stop: Callable[[], None] | None = None,
) -> Iterator[tuple[Job, Outcome]]:
    """Each job with what ``work(job)`` gave, as they are done; `parallel` of them at once.

    stop: called when the run ends early (an error in a job, an interruption), so that jobs in their midst can
        give up.
    No further job is begun then.
    """
    waiting = iter(jobs)
    running: dict[Future[Outcome], Job] = {}
    with ThreadPoolExecutor(max(1, parallel)) as pool:
        try:
            while True:
                # A few jobs ahead, not all: an interruption then has little to wait for
                while len(running) < 2 * parallel and (job := next(waiting, None)) is not None:
                    running[pool.submit(work, job)] = job
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            if stop is not None:
                stop()
            raise


# -- results -------------------------------------------------------------------------------------


@dataclass
class GenerationCount:
    """What one run did: results made, results found, and items that still have none, with reasons."""

    made: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def generate(
    results: Results,
    items: ItemList,
    editor: Editor,
    data: str | Path,
    seed: int = 0,
    tries: int = 2,
    selection: dict[str, Any] | None = None,
    progress: bool = True,
) -> GenerationCount:
    """Make every result that is missing; what is there stays as it is.

    items: all of the benchmark's.
    selection: keyword arguments of ItemList.select, kept in the manifest.
    tries: how often an item is tried in this run. Items that still fail stand in ``failures.jsonl`` and are
        tried again by the next run. Interrupted or killed, finished results are kept and none is half there.
    Raises HYWUError when the folder holds another editor's results.
    """
    selection = {name: value for name, value in (selection or {}).items() if value is not None}
    chosen = items.select(**selection)

    def make(item: Item) -> str | None:
        """Make and write one result; the reason when it failed."""
        reason = None
        for _ in range(max(1, tries)):
            try:
                results.save(item, editor.edit(results.editor_source(item), item, seed))
                return None
            except (EditFailed, HYWUError, OSError, RuntimeError) as error:
                reason = str(error).strip() or type(error).__name__
                log.warning("%s: %s", item.id, reason)
        return reason

    with folder_lock(results.root):
        sources = ImageHashes(results).of_sources(items)
        write_manifest(results, items, editor.describe(), data, seed, selection, sources)
        missing = results.missing(chosen)
        count = GenerationCount(kept=len(chosen.items) - len(missing))
        failures = Failures(results)
        failures.settle(items)  # a killed run may have left half a line
        title, close = f"generating {results.method}", getattr(editor, "close", None)
        try:
            with tqdm(
                total=len(chosen.items), initial=count.kept, desc=title, disable=not progress
            ) as bar:
                for item, reason in in_threads(missing, make, editor.parallel, close):
                    if reason:
                        count.failed[item.id] = reason
                        failures.add(item, reason)
                        bar.set_postfix(failed=len(count.failed))
                    else:
                        count.made += 1
                        bar.update()
        finally:
            if close is not None:
                close()
            failures.settle(items)
    return count


# -- judgements ------------------------------------------------------------------------------------


@dataclass
class JudgingCount:
    """What one run did: questions answered, refused and failed now, found answered, and no result.

    refused_before: how many of `kept` are refusals.
    reasons: why questions got no answer, as "failed: ..." or "refused: ...", with how many did; what differs
        by numbers alone counts as one.
    """

    answered: int = 0
    refused: int = 0
    failed: int = 0
    kept: int = 0
    without_result: int = 0
    refused_before: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, judgement: Judgement) -> None:
        """Count what was just judged."""
        setattr(self, judgement.status, getattr(self, judgement.status) + 1)
        if judgement.status != ANSWERED:
            reason = f"{judgement.status}: {judgement.text}"
            alike = re.sub(r"[0-9a-f]{6,}|[0-9]+", "#", reason)
            known = {re.sub(r"[0-9a-f]{6,}|[0-9]+", "#", told): told for told in self.reasons}
            self.reasons[known.get(alike, reason)] += 1


@dataclass(frozen=True)
class _Asked:
    """One question to ask.

    images: hash of the images judged.
    """

    item: Item
    question: Question
    images: str


def store_name(judge: Judge, questionnaire: Questionnaire) -> StoreName:
    """The identity under which a judge's answers are kept."""
    return StoreName(judge.name, judge.version, questionnaire.name, questionnaire.version)


def judge(
    results: Results,
    items: ItemList,
    questionnaire: Questionnaire,
    judge: Judge,
    again: tuple[str, ...] = (FAILED,),
    progress: bool = True,
) -> JudgingCount:
    """Ask every question that has no answer yet about every result there is.

    again: statuses that are asked once more (by default only failures: a refusal is an answer). An item
        without a result is not asked about; scoring counts it as missing. Interrupted or killed, everything
        answered so far is kept.
    Raises HYWUError when no request can succeed.
    """
    check_answerable(judge)
    count = JudgingCount()
    name = store_name(judge, questionnaire)
    with (
        folder_lock(results.root),
        JudgementStore(results.root / JUDGEMENTS, name, writable=True) as store,
    ):
        asked = list(_asked(results, items, questionnaire, store, again, count))

        def ask(one: _Asked) -> tuple[Judgement, bool]:
            judgement, of_item = _ask(one, results, judge)
            store.append(judgement)
            return judgement, of_item

        in_a_row = 0
        title = f"judging {results.method}"
        with tqdm(total=len(asked), desc=title, disable=not progress) as bar:
            close = getattr(judge, "close", None)
            for _, (judgement, of_item) in in_threads(asked, ask, judge.parallel, close):
                count.add(judgement)
                bar.update()
                if judgement.status != FAILED:
                    in_a_row = 0
                elif not of_item:
                    in_a_row += 1
                    _check_patience(judge, count, in_a_row, judgement.text)
    return count


def _check_patience(judge: Judge, count: JudgingCount, in_a_row: int, reason: str) -> None:
    """Raises HYWUError when so many questions failed that the others would only cost time and money."""
    if count.answered + count.refused == 0 and in_a_row >= 3:
        raise HYWUError(
            f"{judge.name}: no question got an answer, {in_a_row} in a row failed: {reason}; put that right "
            "and give the same command again."
        )
    if in_a_row >= 10 + 2 * judge.parallel:
        raise HYWUError(
            f"{judge.name}: {reason}; {in_a_row} questions in a row failed. What was answered is kept: the "
            "same command goes on."
        )


def _asked(
    results: Results,
    items: ItemList,
    questionnaire: Questionnaire,
    store: JudgementStore,
    again: tuple[str, ...],
    count: JudgingCount,
) -> Iterator[_Asked]:
    hashes = ImageHashes(results)
    for item in items.items:
        if not results.image(item).is_file():
            count.without_result += 1
            continue
        images = hashes.of(item)
        for question in questionnaire.questions(item):
            known = store.get(item.id, question.name, images, question.digest)
            if known is None or known.status in again:
                yield _Asked(item, question, images)
            else:
                count.kept += 1
                count.refused_before += known.status == REFUSED


def _ask(one: _Asked, results: Results, judge: Judge) -> tuple[Judgement, bool]:
    """The judgement, and whether a failure lies in the item itself."""
    key = (one.item.id, one.question.name, one.images, one.question.digest)
    try:
        reply = judge.score(build_request(results, one.item, one.question))
    except Refusal as refusal:
        return Judgement(*key, REFUSED, _writable(str(refusal))), False
    except Failure as failure:
        return Judgement(*key, FAILED, _writable(str(failure))), failure.of_item
    text, model = _writable(reply.text), _writable(reply.model)
    counts = reply.tokens_in, reply.tokens_out, reply.attempts
    return Judgement(*key, ANSWERED, text, model, *counts), False


def _writable(text: str) -> str:
    """The text with "?" for lone surrogates (an answer cut within an emoji), which no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def build_request(results: Results, item: Item, question: Question) -> JudgeRequest:
    """The question with its images. Raises Failure when an image can't be read."""
    try:
        source = load_image(results.judged_source(item))
        edited = load_image(results.image(item))
        target = None if item.target is None else load_image(item.target)
    except HYWUError as error:
        raise Failure(str(error), of_item=True) from error
    return JudgeRequest(question, source, results.benchmark.judged(edited, source), target)


class ImageHashes:
    """Hashes of the images judged, each file read once however many items and questions show it."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._known: dict[Path | None, bytes] = {}

    def of(self, item: Item) -> str:
        """Hash of the source shown, the result and the target; a file that is gone counts as empty."""
        files = self.results.judged_source(item), self.results.image(item), item.target
        return fingerprint.digest(map(self._file, files), 24)

    def of_sources(self, items: ItemList) -> str:
        """Hash of what editors are given: every item's source."""
        return fingerprint.digest((self._file(item.source) for item in items.items), 24)

    def _file(self, path: Path | None) -> bytes:
        if path not in self._known:
            try:
                self._known[path] = bytes.fromhex(fingerprint.of_files([path] if path else [], 64))
            except OSError:
                self._known[path] = bytes.fromhex(fingerprint.of_files([], 64))
        return self._known[path]
