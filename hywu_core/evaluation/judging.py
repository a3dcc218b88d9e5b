"""Ask a judge about every result: in parallel, resumable answer by answer, nothing asked twice."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..errors import HYWUError
from ..files import folder_lock
from ..fingerprint import digest
from ..images import load_image
from .items import Item, ItemList
from .judges.base import Failure, Judge, JudgeRequest, Refusal, check_answerable
from .questionnaires import Question, Questionnaire
from .results import JUDGEMENTS, Results
from .store import ANSWERED, FAILED, REFUSED, Judgement, JudgementStore, StoreName

log = logging.getLogger(__name__)


@dataclass
class JudgingCount:
    """What one run did: questions answered, refused and failed now, found answered, and no picture."""

    answered: int = 0
    refused: int = 0
    failed: int = 0
    kept: int = 0
    without_picture: int = 0


@dataclass(frozen=True)
class _Job:
    item: Item
    question: Question
    pictures: str


def store_name(judge: Judge, questionnaire: Questionnaire) -> StoreName:
    """The identity under which a judge's answers are kept."""
    return StoreName(judge.name, judge.version, questionnaire.name, questionnaire.version)


def judge_results(
    results: Results,
    items: ItemList,
    questionnaire: Questionnaire,
    judge: Judge,
    again: tuple[str, ...] = (FAILED,),
    progress: bool = True,
) -> JudgingCount:
    """Ask every question that has no answer yet about every result there is.

    again: statuses that are asked once more (by default only failures: a refusal is an answer).
    An item without a result is not asked about; scoring counts it as missing. Interrupted or
    killed, everything answered so far is kept. Raises HYWUError when no request can succeed.
    """
    check_answerable(judge)
    count = JudgingCount()
    with (
        folder_lock(results.root),
        JudgementStore(
            results.root / JUDGEMENTS, store_name(judge, questionnaire), writable=True
        ) as store,
    ):
        jobs = list(_jobs(results, items, questionnaire, store, again, count))
        bar = tqdm(total=len(jobs), desc=f"judging {results.method}", disable=not progress)
        with bar:
            _run(jobs, results, judge, store, count, bar)
    return count


def _jobs(
    results: Results,
    items: ItemList,
    questionnaire: Questionnaire,
    store: JudgementStore,
    again: tuple[str, ...],
    count: JudgingCount,
) -> Iterator[_Job]:
    for item in items.items:
        if not results.picture(item).is_file():
            count.without_picture += 1
            continue
        for question in questionnaire.questions(item):
            pictures = pictures_hash(results, item)
            known = store.get(item.id, question.name, pictures, question.digest)
            if known is None or known.status in again:
                yield _Job(item, question, pictures)
            else:
                count.kept += 1


def _run(
    jobs: list[_Job],
    results: Results,
    judge: Judge,
    store: JudgementStore,
    count: JudgingCount,
    bar: tqdm,
) -> None:
    waiting = iter(jobs)
    running: set[Future[Judgement]] = set()
    with ThreadPoolExecutor(max(1, judge.parallel)) as pool:
        try:
            while True:
                # A few jobs ahead, not all: an interruption then has little to wait for
                while len(running) < 2 * judge.parallel and (job := next(waiting, None)):
                    running.add(pool.submit(_ask, job, results, judge, store))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    status = future.result().status
                    setattr(count, status, getattr(count, status) + 1)
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            if close := getattr(judge, "close", None):
                close()
            raise


def _ask(job: _Job, results: Results, judge: Judge, store: JudgementStore) -> Judgement:
    key = (job.item.id, job.question.name, job.pictures, job.question.digest)
    try:
        reply = judge.score(build_request(results, job.item, job.question))
    except Refusal as refusal:
        judgement = Judgement(*key, REFUSED, _writable(str(refusal)))
    except Failure as failure:
        judgement = Judgement(*key, FAILED, _writable(str(failure)))
    else:
        judgement = Judgement(
            *key,
            ANSWERED,
            _writable(reply.text),
            _writable(reply.model),
            reply.tokens_in,
            reply.tokens_out,
            reply.attempts,
        )
    store.append(judgement)
    return judgement


def _writable(text: str) -> str:
    """The text with "?" for lone surrogates (an answer cut within an emoji), which no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def build_request(results: Results, item: Item, question: Question) -> JudgeRequest:
    """The question with its pictures. Raises Failure when a picture can't be read.

    For GEdit-Bench the edited picture is brought to the source's size first, as its authors do.
    """
    try:
        source = load_image(results.judged_source(item))
        edited = load_image(results.picture(item))
        target = None if item.target is None else load_image(item.target)
    except HYWUError as error:
        raise Failure(str(error)) from error
    if results.benchmark == "gedit" and edited.size != source.size:
        edited = edited.resize(source.size, Image.Resampling.BICUBIC)
    return JudgeRequest(question, source, edited, target)


def pictures_hash(results: Results, item: Item) -> str:
    """Hash of the files of the pictures judged; a file that is gone counts as empty."""
    paths = (results.judged_source(item), results.picture(item), item.target)
    return digest((bytes.fromhex(digest([_bytes(path)], 64)) for path in paths), 24)


def _bytes(path: Path | None) -> bytes:
    try:
        return b"" if path is None else path.read_bytes()
    except OSError:
        return b""
