"""Judges: a local stub endpoint that misbehaves in every way, pixels, and a real local model."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from judge_stub import GOOD, KEY, benchmark, completion, request_for
from PIL import Image, ImageFilter

from hywu_core.errors import HYWUError
from hywu_core.evaluation.benchmarks import load_questionnaire
from hywu_core.evaluation.benchmarks.wu_eval import DIMENSIONS
from hywu_core.evaluation.items import Item, ItemList
from hywu_core.evaluation.judges.base import Failure, JudgeRequest, Refusal
from hywu_core.evaluation.judges.openai import OpenAIJudge
from hywu_core.evaluation.judges.reference import ReferenceJudge, shares_done
from hywu_core.evaluation.report.build import build_report
from hywu_core.evaluation.report.html import write_html
from hywu_core.evaluation.results import JUDGEMENTS
from hywu_core.evaluation.run import judge as run_judge
from hywu_core.evaluation.run import store_name
from hywu_core.evaluation.scores import score_results, summarize
from hywu_core.evaluation.store import ANSWERED, FAILED, REFUSED, JudgementStore, choose_store
from hywu_core.images import write_image

pytestmark = pytest.mark.usefixtures("judge_key")


def judge_at(url: str, **options) -> OpenAIJudge:
    return OpenAIJudge("judge", url, **{"backoff": 0.01, "timeout": 0.6, "retries": 3, **options})


def kind_of(prompt: str) -> str:
    """The instruction in a WU-Eval prompt names how the stub treats it."""
    return next(line for line in prompt.splitlines() if line.startswith("do "))[3:].split(" #")[0]


def refused(reason: str):
    body = completion(None)
    body["choices"][0]["message"]["refusal"] = reason
    return body


MISBEHAVIOUR = {
    "fine": lambda n: GOOD,
    "fenced": lambda n: f"```json\n{GOOD}\n```",
    "garbage": lambda n: "four out of five, I would say",
    "half": lambda n: GOOD[:40],
    "not json": lambda n: (200, {}, b"<html>bad gateway</html>"),
    "no choices": lambda n: (200, {}, b'{"choices": []}'),
    "deep": lambda n: (200, {}, b"[" * 100_000),
    "half an emoji": lambda n: (200, {}, json.dumps(completion("4 \ud83d")).encode()),
    "nothing in parts": lambda n: (200, {}, json.dumps(completion([{"text": None}])).encode()),
    "nothing": lambda n: (200, {}, json.dumps(completion(None)).encode()),
    "refusal": lambda n: (200, {}, json.dumps(refused("not this one")).encode()),
    "filter": lambda n: (
        200,
        {},
        json.dumps(completion("x", finish_reason="content_filter")).encode(),
    ),
    "400": lambda n: (400, {}, b'{"error": "image too large"}'),
    "429 twice": lambda n: (429, {"Retry-After": "0.05"}, b"slow down") if n < 3 else GOOD,
    "500 once": lambda n: (500, {}, b"oops") if n == 1 else GOOD,
    "503 for ever": lambda n: (503, {}, f"bearer {KEY} overloaded".encode()),
    "stall once": lambda n: 1.2 if n == 1 else GOOD,
    "stall for ever": lambda n: 1.2,
    "hang up": lambda n: (200, {"Content-Length": "99"}, b""),
    "500 that hangs up": lambda n: (500, {"Transfer-Encoding": "chunked"}, b"99\r\noo"),
}

#: What a run over them must come to; two items of each kind.
EXPECTED = {
    "scored": ["fine", "fenced", "429 twice", "500 once", "stall once"],
    "unparsable": ["garbage", "half", "half an emoji"],
    "refused": ["refusal", "filter"],
    "failed": [
        "nothing",
        "nothing in parts",
        "400",
        "not json",
        "no choices",
        "deep",
        "503 for ever",
        "stall for ever",
        "hang up",
        "500 that hangs up",
    ],
}


def test_a_misbehaving_endpoint_is_counted_exactly(tmp_path, stub, caplog):
    server = stub(lambda prompt, n: MISBEHAVIOUR[kind_of(prompt)](n))
    kinds = [f"do {kind} #{i}" for kind in MISBEHAVIOUR for i in range(2)]
    results, items = benchmark(tmp_path, [*kinds, "do fine #missing"])
    results.image(items.items[-1]).unlink()
    questionnaire = load_questionnaire("wu-eval")
    judge = judge_at(server.url, parallel=8)
    count = run_judge(results, items, questionnaire, judge, progress=False)
    expected = {name: 2 * len(kinds) for name, kinds in EXPECTED.items()}
    assert (count.answered, count.refused, count.failed, count.without_result) == (16, 4, 20, 1)

    scores = score_results(results, items, questionnaire, store_name(judge, questionnaire))
    assert scores.outcomes() == {**expected, "unjudged": 0, "missing": 1}
    for score in scores.scores[:-1]:
        assert kind_of("do " + score.item.instruction[3:]) in EXPECTED[score.outcome]
    assert scores.models == {"judge-2026-01-01": 16}
    assert scores.tokens_in == 1600

    report = build_report([scores])
    write_html(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "10 scored, 6 unparsable, 4 refused, 20 failed, 1 missing of 41 items" in page
    assert "Judge: judge, version chat-1, answered by judge-2026-01-01." in page
    assert len(report.unscored) == 31

    # Nothing is asked twice but what failed; then an endpoint that works again completes the run
    asked = sum(server.seen.values())
    server.behave = lambda prompt, n: GOOD
    again = run_judge(results, items, questionnaire, judge_at(server.url), progress=False)
    assert (again.answered, again.kept, again.failed) == (20, 20, 0)
    assert sum(server.seen.values()) == asked + 20
    # The key went to the endpoint and nowhere else
    assert set(server.keys) == {f"Bearer {KEY}"}
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in written
    assert KEY not in caplog.text


def test_cost_is_counted(tmp_path, stub):
    server = stub(lambda prompt, n: GOOD)
    results, items = benchmark(tmp_path, ["do fine #1", "do fine #2"])
    questionnaire = load_questionnaire("wu-eval")
    judge = judge_at(server.url)
    run_judge(results, items, questionnaire, judge, progress=False)
    scores = score_results(results, items, questionnaire, store_name(judge, questionnaire))
    tokens = summarize(scores, price_in=2.0, price_out=8.0)["tokens"]
    assert tokens == {"in": 200, "out": 14, "cost": round((200 * 2 + 14 * 8) / 1e6, 6)}


def test_concurrency_and_rate_limit(tmp_path, stub):
    server = stub(lambda prompt, n: GOOD)
    results, items = benchmark(tmp_path, [f"do fine #{i}" for i in range(12)])
    questionnaire = load_questionnaire("wu-eval")
    run_judge(results, items, questionnaire, judge_at(server.url, parallel=4), progress=False)
    assert 2 <= server.most <= 4
    server.times.clear()
    limited = judge_at(server.url, parallel=4, per_minute=1200)
    run_judge(results, items, questionnaire, limited, again=(ANSWERED,), progress=False)
    gaps = np.diff(server.times)
    assert server.times[-1] - server.times[0] >= 11 * 0.05 * 0.9
    assert gaps.mean() >= 0.045


def test_retry_after_is_honoured(tmp_path, stub):
    server = stub(lambda prompt, n: (429, {"Retry-After": "0.4"}, b"") if n == 1 else GOOD)
    request = request_for(tmp_path)
    reply = judge_at(server.url, backoff=0.001).score(request)
    assert reply.attempts == 2
    assert server.times[1] - server.times[0] >= 0.4


def test_the_endpoint_sees_the_pixels_and_no_sampling(tmp_path, stub):
    server = stub(lambda prompt, n: GOOD)
    request = request_for(tmp_path)
    judge_at(server.url).score(request)
    body = server.bodies[0]
    assert (body["model"], body["temperature"]) == ("judge", 0)
    shown = [part["image_url"]["url"] for part in body["messages"][0]["content"][1:]]
    for url, image in zip(shown, (request.source, request.edited), strict=True):
        png = base64.b64decode(url.removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(image))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_can_never_succeed_stops_the_run(tmp_path, stub, status):
    server = stub(lambda prompt, n: (status, {}, f"wrong key {KEY}".encode()))
    results, items = benchmark(tmp_path, [f"do fine #{i}" for i in range(30)])
    judge = judge_at(server.url, parallel=2)
    with pytest.raises(HYWUError, match=f"HTTP {status} .*OPENAI_API_KEY") as caught:
        run_judge(results, items, load_questionnaire("wu-eval"), judge, progress=False)
    assert KEY not in str(caught.value)
    assert sum(server.seen.values()) <= 6


def test_unsafe_or_wrong_urls(monkeypatch):
    with pytest.raises(HYWUError, match="unencrypted"):
        OpenAIJudge("m", "http://192.0.2.1/v1")
    with pytest.raises(HYWUError, match="must begin with http"):
        OpenAIJudge("m", "file:///etc/passwd")
    with pytest.raises(HYWUError, match="credentials"):
        OpenAIJudge("m", "https://user:pw@example.org/v1")
    monkeypatch.delenv("OPENAI_API_KEY")
    OpenAIJudge("m", "http://192.0.2.1/v1")


def test_nothing_listens(tmp_path):
    judge = judge_at("http://127.0.0.1:9", retries=1)
    with pytest.raises(Failure, match=r"no answer: .*\(2 tries\)"):
        judge.score(request_for(tmp_path))


def test_answers_of_two_models_are_not_mixed(tmp_path, stub):
    server = stub(
        lambda prompt, n: (
            200,
            {},
            json.dumps(completion(GOOD, "a" if "#1" in prompt else "b")).encode(),
        )
    )
    results, items = benchmark(tmp_path, ["do fine #1", "do fine #2"])
    questionnaire = load_questionnaire("wu-eval")
    judge = judge_at(server.url)
    run_judge(results, items, questionnaire, judge, progress=False)
    name = store_name(judge, questionnaire)
    with pytest.raises(HYWUError, match=r"several models: .*--answered-by"):
        score_results(results, items, questionnaire, name)
    scores = score_results(results, items, questionnaire, name, model="a")
    assert scores.outcomes()["scored"] == 1
    assert scores.outcomes()["unjudged"] == 1
    assert "answered by a." in " ".join(build_report([scores]).opening)


def test_a_changed_image_or_prompt_is_judged_anew(tmp_path, stub):
    server = stub(lambda prompt, n: GOOD)
    results, items = benchmark(tmp_path, ["do fine #1", "do fine #2"])
    questionnaire = load_questionnaire("wu-eval")
    judge = judge_at(server.url)
    run_judge(results, items, questionnaire, judge, progress=False)
    write_image(Image.new("RGB", (32, 24)), results.image(items.items[0]))
    name = store_name(judge, questionnaire)
    before = score_results(results, items, questionnaire, name)
    assert before.outcomes()["unjudged"] == 1
    count = run_judge(results, items, questionnaire, judge, progress=False)
    assert (count.answered, count.kept) == (1, 1)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"wu-eval": "Rate. do fine\n<instruction>"}))
    other = load_questionnaire("wu-eval", prompts)
    assert run_judge(results, items, other, judge, progress=False).answered == 2
    with pytest.raises(HYWUError, match="same --prompts"):
        score_results(results, items, other, name)


def test_prompt_files_are_checked(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"semantics": "x <instruction>"}))
    with pytest.raises(HYWUError, match="no prompt for quality, which gedit needs"):
        load_questionnaire("gedit", path)
    path.write_text(json.dumps({"semantics": "x", "quality": "y"}))
    with pytest.raises(HYWUError, match="prompt for semantics has no <instruction>"):
        load_questionnaire("gedit", path)


def test_store_drops_a_line_cut_short_and_names_a_damaged_one(tmp_path, stub):
    server = stub(lambda prompt, n: GOOD)
    results, items = benchmark(tmp_path, ["do fine #1", "do fine #2"])
    questionnaire = load_questionnaire("wu-eval")
    judge = judge_at(server.url, parallel=1)
    run_judge(results, items, questionnaire, judge, progress=False)
    name = store_name(judge, questionnaire)
    path = results.root / JUDGEMENTS / name.file_name
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    count = run_judge(results, items, questionnaire, judge, progress=False)
    assert (count.answered, count.kept) == (1, 1)
    with JudgementStore(results.root / JUDGEMENTS, name) as store:
        assert Counter(j.status for j in store) == {ANSWERED: 2}
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"item": 1}\n' + lines[2])
    with pytest.raises(HYWUError, match=r"line 2: 'item' is a whole number"):
        JudgementStore(results.root / JUDGEMENTS, name)


# -- reference judge -----------------------------------------------------------------------------


def photograph() -> Image.Image:
    from skimage import data

    return Image.fromarray(data.astronaut()).resize((128, 128), Image.Resampling.LANCZOS)


def test_reference_anchors():
    source = photograph()
    target = source.filter(ImageFilter.GaussianBlur(2))
    assert shares_done(source, target, target) == dict.fromkeys(DIMENSIONS, 1.0)
    assert shares_done(source, source, target) == dict.fromkeys(DIMENSIONS, 0.0)
    worse = Image.fromarray(255 - np.asarray(source))
    assert shares_done(source, worse, target)["instruction_alignment"] == 0.0
    assert shares_done(source, worse, target)["content_consistency"] == 0.0
    # Half the way in pixels is half the error
    half = Image.blend(source, target, 0.5)
    assert shares_done(source, half, target)["instruction_alignment"] == pytest.approx(
        0.5, abs=0.01
    )


def test_reference_orders_degrees_of_an_edit():
    source = photograph()
    target = source.filter(ImageFilter.GaussianBlur(2))
    degrees = [source.filter(ImageFilter.GaussianBlur(r)) for r in (0.4, 0.8, 1.2, 1.6, 2)]
    for name in DIMENSIONS:
        shares = [shares_done(source, edited, target)[name] for edited in degrees]
        assert shares == sorted(shares)
        assert shares[-1] - shares[0] > 0.5


def test_reference_where_the_source_is_the_target_already():
    source = photograph()
    assert shares_done(source, source, source) == dict.fromkeys(DIMENSIONS, 1.0)
    changed = shares_done(source, source.filter(ImageFilter.GaussianBlur(1)), source)
    assert changed == dict.fromkeys(DIMENSIONS, 0.0)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (64, 9)])
def test_reference_takes_any_size(size):
    rng = np.random.default_rng(1)
    images = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)) for _ in range(2)]
    edited = images[1].resize((size[0] + 3, size[1] + 2))
    shares = shares_done(images[0], edited, images[1])
    assert all(0 <= value <= 1 for value in shares.values())


@pytest.mark.parametrize("questionnaire", ["wu-eval", "gedit", "imgedit"])
def test_reference_answers_every_questionnaire(questionnaire):
    source = photograph()
    target = source.filter(ImageFilter.GaussianBlur(2))
    item = Item("k", "style", "blur it", Path("s.png"))
    asked = load_questionnaire(questionnaire)
    found = []
    for edited in (source, target):
        answers = {
            q.name: ReferenceJudge().score(JudgeRequest(q, source, edited, target)).text
            for q in asked.questions(item)
        }
        found.append(asked.parse(answers)["overall"])
    assert found == ([0, 10] if questionnaire == "gedit" else [1, 5])


def test_reference_tells_psnr_and_ssim_as_its_reason():
    source = Image.new("RGB", (16, 16), (100, 100, 100))
    edited = Image.new("RGB", (16, 16), (105, 105, 105))
    question = load_questionnaire("wu-eval").questions(Item("k", "t", "x", Path("s.png")))[0]
    judge = ReferenceJudge()
    # 20 log10(255 / 5), by hand
    answer = json.loads(judge.score(JudgeRequest(question, source, edited, source)).text)
    assert answer["reason"].startswith("PSNR 34.15 dB, SSIM 0.9")
    answer = json.loads(judge.score(JudgeRequest(question, source, source, source)).text)
    assert answer["reason"] == "PSNR inf dB, SSIM 1.0000 to the target"


def test_methods_by_two_judges_or_on_two_sets_are_in_no_report(tmp_path, stub):
    server = stub(lambda prompt, n: GOOD)
    questionnaire = load_questionnaire("wu-eval")
    scores = []
    for folder, judge in (("a", ReferenceJudge()), ("b", judge_at(server.url))):
        results, items = benchmark(tmp_path / folder, ["do fine #1", "do fine #2"])
        run_judge(results, items, questionnaire, judge, progress=False)
        name = store_name(judge, questionnaire)
        scores.append(score_results(results, items, questionnaire, name))
    with pytest.raises(HYWUError, match=r"One report has one judge.*reference \(pixels-1\).*judge"):
        build_report(scores)
    run_judge(results, items, questionnaire, ReferenceJudge(), progress=False)
    with pytest.raises(HYWUError, match="never mixed.*--judged-by"):
        choose_store(results.root / JUDGEMENTS)
    assert choose_store(results.root / JUDGEMENTS, judge="reference").judge == "reference"
    fewer = ItemList("folder", items.items[:1])
    name = store_name(ReferenceJudge(), questionnaire)
    both = [score_results(results, given, questionnaire, name) for given in (items, fewer)]
    with pytest.raises(HYWUError, match="given different items"):
        build_report(both)


def test_reference_refuses_without_a_target(tmp_path):
    request = request_for(tmp_path)
    with pytest.raises(Refusal, match="no target image"):
        ReferenceJudge().score(JudgeRequest(request.question, request.source, request.edited))


# -- local model ---------------------------------------------------------------------------------


def tiny_llava(folder: Path) -> None:
    """A LLaVA (CLIP vision tower, Llama language model) of random weights, with its processor."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<image>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    base = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    base.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    size = {"height": 28, "width": 28}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=vocabulary["<image>"],
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def test_local_model_of_a_real_architecture(tmp_path):
    from hywu_core.evaluation.judges.local import LocalJudge

    tiny_llava(tmp_path / "tiny-llava")
    judge = LocalJudge(tmp_path / "tiny-llava", max_tokens=12)
    assert judge.name == "tiny-llava"
    assert judge.version.startswith("local-1-")
    request = request_for(tmp_path)
    with pytest.raises(Failure, match="cut off at 12 tokens; raise --max-tokens"):
        judge.score(request)
    judge._ends = lambda: range(1000)  # random weights never end an answer: any token does now
    reply = judge.score(request)
    assert reply.tokens_out == 12
    # Four patches per image, two images, and the prompt byte by byte
    assert reply.tokens_in == 2 * 4 + len(request.question.prompt.encode())
    assert judge.score(request) == reply
    # It sees the images: logits, hence the answer, depend on them
    with_other = JudgeRequest(request.question, request.source, Image.new("RGB", (28, 28)))
    assert judge._model is not None
    assert pixel_values(judge, request) != pixel_values(judge, with_other)

    results, items = benchmark(tmp_path, ["do fine #1", "do fine #2"])
    questionnaire = load_questionnaire("wu-eval")
    count = run_judge(results, items, questionnaire, judge, progress=False)
    assert count.answered == 2
    scores = score_results(results, items, questionnaire, store_name(judge, questionnaire))
    assert scores.outcomes()["unparsable"] == 2  # random weights say nothing sensible

    def no_memory(**_):
        raise RuntimeError("out of memory")

    judge._model.generate = no_memory
    count = run_judge(results, items, questionnaire, judge, again=(ANSWERED,), progress=False)
    assert (count.answered, count.failed) == (0, 2)


def pixel_values(judge, request) -> list[float]:
    import torch

    with torch.inference_mode():
        content = [{"type": "image", "image": i} for i in request.images]
        inputs = judge._processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return judge._model(**inputs).logits[0, -1].tolist()


def test_local_folder_errors(tmp_path):
    from hywu_core.evaluation.judges.local import LocalJudge

    with pytest.raises(HYWUError, match=r"holds no config.json"):
        LocalJudge(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(HYWUError, match="no vision-language model that transformers loads"):
        LocalJudge(tmp_path)


def test_statuses_are_words_of_the_report():
    assert {ANSWERED, REFUSED, FAILED} == {"answered", "refused", "failed"}


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_local_model_on_a_device_that_is_not_there(tmp_path, device):
    from hywu_core.evaluation.judges.local import LocalJudge

    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(HYWUError, match=f"device '{device}'"):
        LocalJudge(tmp_path, device)
