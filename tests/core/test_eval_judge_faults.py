"""What an endpoint says against a request: settings stop the run, content is final, the rest is asked again.

Bodies of errors are those that OpenAI, Azure, OpenRouter, Anthropic's and vLLM's endpoints were reported to
send, in their words as far as they decide something.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge_stub import GOOD, KEY, benchmark, completion, request_for

from hywu_core.cli import main
from hywu_core.errors import HYWUError
from hywu_core.evaluation.benchmarks import load_questionnaire
from hywu_core.evaluation.judges.base import Failure, Refusal
from hywu_core.evaluation.judges.faults import Concern, Fault
from hywu_core.evaluation.judges.openai import OpenAIJudge
from hywu_core.evaluation.run import judge as run_judge
from hywu_core.evaluation.store import FAILED, REFUSED

pytestmark = pytest.mark.usefixtures("judge_key")


def judge_at(url: str, **options) -> OpenAIJudge:
    return OpenAIJudge("judge", url, **{"backoff": 0.01, "timeout": 5, "retries": 1, **options})


def answer(code: int, message: str = "", /, **fields):
    """An error as most endpoints word it."""
    body = json.dumps({"error": {"message": message, **fields}}).encode()
    return code, {"Content-Type": "application/json"}, body


def run(tmp_path: Path, judge: OpenAIJudge, count: int = 6, **options):
    results, items = benchmark(tmp_path, [f"do fine #{i}" for i in range(count)])
    questionnaire = load_questionnaire("wu-eval")
    return run_judge(results, items, questionnaire, judge, progress=False, **options)


SETTINGS = {
    "wrong key": answer(401, "Incorrect API key provided"),
    "no credit": answer(402, "Insufficient credits. Add more using the settings page."),
    "no right to the model": answer(403, "Project does not have access to model `judge`"),
    "quota": answer(429, "You exceeded your current quota", code="insufficient_quota"),
    "credit, as a bad request": answer(400, "Your credit balance is too low to access the API"),
    "no such model": answer(404, "The model `judge` does not exist", code="model_not_found"),
    "no such model, as a bad request": answer(400, "The model `judge` does not exist"),
    "unknown parameter": answer(400, "Unknown parameter: 'messages'", code="unknown_parameter"),
    "unprocessable": answer(422, "Input should be a valid string", type="invalid_request_error"),
    "moved": (307, {"Location": "https://example.org/v2"}, b""),
    "gone": answer(410, "This API version was shut down"),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_stop_the_run_and_are_asked_again(tmp_path, stub, kind):
    server = stub(lambda prompt, n: SETTINGS[kind])
    status, _, body = SETTINGS[kind]
    with pytest.raises(HYWUError, match=f"HTTP {status}") as caught:
        run(tmp_path, judge_at(server.url, parallel=1), 12)
    if body:
        assert json.loads(body)["error"]["message"].rstrip(".") in str(caught.value)
    assert sum(server.seen.values()) <= 6
    server.behave = lambda prompt, n: GOOD
    count = run(tmp_path, judge_at(server.url), 12)
    assert (count.answered, count.kept) == (12, 0)


@pytest.mark.parametrize("status", [302, 401, 402, 403, 404, 405, 410])
def test_a_status_counts_without_any_word(status):
    assert Fault(status, "no").concern is Concern.SETTINGS


def test_credit_that_runs_out_in_mid_run_keeps_what_was_answered(tmp_path, stub):
    server = stub(
        lambda prompt, n: GOOD if sum(server.seen.values()) < 4 else SETTINGS["no credit"]
    )
    with pytest.raises(HYWUError, match=r"HTTP 402 Insufficient credits.*the same command"):
        run(tmp_path, judge_at(server.url, parallel=1), 12)
    server.behave = lambda prompt, n: GOOD
    count = run(tmp_path, judge_at(server.url), 12)
    assert (count.answered, count.kept) == (9, 3)


CONTENT = {
    "openai": answer(400, "Your request was rejected by our safety system", code="content_policy_violation"),
    "azure": answer(400, "The response was filtered", code="content_filter", status=400),
    "openrouter": answer(403, "Your chosen model requires moderation and your input was flagged"),
    "without a code": answer(400, "Image rejected by content moderation"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTENT)
def test_a_refusal_of_the_content_is_final(tmp_path, stub, kind):
    server = stub(lambda prompt, n: CONTENT[kind] if "#1" in prompt else GOOD)
    count = run(tmp_path, judge_at(server.url))
    assert (count.answered, count.refused, count.failed) == (5, 1, 0)
    asked = sum(server.seen.values())
    assert run(tmp_path, judge_at(server.url)).kept == 6
    assert sum(server.seen.values()) == asked


OF_ONE_ITEM = {
    "too large": answer(413, "Request Entity Too Large"),
    "too long": answer(400, "This model's maximum context length is 8192 tokens", code="context_length_exceeded"),
    "an image": answer(400, "image too large"),
    "no reason": (400, {}, b""),
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_ONE_ITEM)
def test_a_request_that_is_refused_for_its_size_is_a_failure(tmp_path, stub, kind):
    server = stub(lambda prompt, n: OF_ONE_ITEM[kind] if "#1" in prompt else GOOD)
    count = run(tmp_path, judge_at(server.url, parallel=1))
    assert (count.answered, count.refused, count.failed) == (5, 0, 1)
    assert sum(server.seen.values()) == 6  # it is not asked twice in one run
    server.behave = lambda prompt, n: GOOD
    assert run(tmp_path, judge_at(server.url)).answered == 1


def unsupported(body: dict, name: str):
    if name in body:
        return answer(
            400, f"Unsupported parameter: '{name}' is not supported with this model.", param=name,
            code="unsupported_parameter",
        )  # fmt: skip
    return None


def test_limits_of_answers_go_by_the_name_that_the_endpoint_knows(tmp_path, stub):
    server = stub(lambda prompt, n: unsupported(server.bodies[-1], "max_tokens") or GOOD)
    count = run(tmp_path, judge_at(server.url, parallel=1, max_tokens=99))
    assert count.answered == 6
    assert len(server.bodies) == 7  # found out once
    assert server.bodies[-1]["max_completion_tokens"] == 99
    assert "max_tokens" not in server.bodies[-1]


@pytest.mark.parametrize("taken", [(1,), (None,), (1, None)])
def test_a_temperature_that_cannot_be_set_is_the_models_own_unless_the_user_chose_it(
    tmp_path, stub, caplog, taken
):
    def behave(prompt, n):
        if server.bodies[-1].get("temperature") in taken:
            return GOOD
        return answer(
            400, "Unsupported value: 'temperature' does not support 0 with this model.",
            param="temperature", code="unsupported_value",
        )  # fmt: skip

    server = stub(behave)
    assert run(tmp_path, judge_at(server.url, parallel=4)).answered == 6
    assert server.bodies[-1].get("temperature") in taken
    assert "temperature" in caplog.text
    with pytest.raises(HYWUError, match="HTTP 400 Unsupported value: 'temperature'"):
        run(tmp_path / "chosen", judge_at(server.url, temperature=0.5))


def test_a_parameter_that_no_change_helps_against_stops_the_run(tmp_path, stub):
    for name in ("temperature", "max_tokens", "max_completion_tokens"):
        server = stub(lambda prompt, n, name=name: answer(400, f"Unsupported parameter: '{name}'"))
        with pytest.raises(HYWUError, match=name):
            run(tmp_path / name, judge_at(server.url, parallel=1))
        assert len(server.bodies) <= 3


def test_another_temperature_is_another_judge():
    assert judge_at("http://127.0.0.1:9").version == "chat-1"
    assert judge_at("http://127.0.0.1:9", temperature=0.0).version == "chat-1"
    assert judge_at("http://127.0.0.1:9", temperature=0.5).version == "chat-1-t0.5"


@pytest.mark.parametrize("text", ["", GOOD[:30]])
def test_an_answer_that_was_cut_off_is_a_failure(tmp_path, stub, text):
    server = stub(
        lambda p, n: (200, {}, json.dumps(completion(text, finish_reason="length")).encode())
    )
    with pytest.raises(Failure, match=r"cut off at 512 tokens.*--max-tokens"):
        judge_at(server.url).score(request_for(tmp_path))
    with pytest.raises(HYWUError, match=r"cut off at 512 tokens"):
        run(tmp_path, judge_at(server.url, parallel=1), 12)
    assert sum(server.seen.values()) <= 5  # three in a row without any answer say enough
    server.behave = lambda prompt, n: GOOD
    assert run(tmp_path, judge_at(server.url), 12).answered == 12


@pytest.mark.parametrize(
    ("choice", "raised", "said"),
    [
        ({"finish_reason": "error"}, Failure, "broke off"),
        ({"finish_reason": "insufficient_system_resource"}, Failure, "broke off"),
        ({"finish_reason": "abort"}, Failure, "broke off"),
        (
            {"finish_reason": "stop", "error": {"code": 502, "message": "Upstream is gone"}},
            Failure,
            "broke off.*Upstream is gone",
        ),
        ({"finish_reason": "MAX_TOKENS"}, Failure, "cut off at 512"),
        ({"finish_reason": {"type": "length", "length": 512}}, Failure, "cut off at 512"),
        ({"finish_reason": "model_length"}, Failure, "cut off at 512"),
        ({"finish_reason": "SAFETY"}, Refusal, "safety"),
        ({"finish_reason": "refusal"}, Refusal, "refusal"),
    ],
)
def test_a_whole_answer_that_the_server_did_not_end_well_is_none(
    tmp_path, stub, choice, raised, said
):
    """What can be read as scores, but isn't all that the model would have said."""
    answer = completion(GOOD)
    answer["choices"][0] |= choice
    server = stub(lambda prompt, n: (200, {}, json.dumps(answer).encode()))
    with pytest.raises(raised, match=said):
        judge_at(server.url).score(request_for(tmp_path))


@pytest.mark.parametrize("reason", ["stop", "eos_token", "end_turn", None, ["stop"], 7])
def test_other_reasons_end_an_answer_well(tmp_path, stub, reason):
    body = json.dumps(completion(GOOD, finish_reason=reason)).encode()
    server = stub(lambda prompt, n: (200, {}, body))
    assert judge_at(server.url).score(request_for(tmp_path)).text == GOOD


def test_an_empty_answer_is_a_failure(tmp_path, stub):
    server = stub(lambda prompt, n: (200, {}, json.dumps(completion("")).encode()))
    with pytest.raises(Failure, match="empty answer"):
        judge_at(server.url).score(request_for(tmp_path))


def test_an_error_within_a_whole_answer_counts_like_its_status(tmp_path, stub):
    body = {"error": {"message": "Insufficient credits", "code": 402}}
    server = stub(lambda prompt, n: (200, {}, json.dumps(body).encode()))
    with pytest.raises(HYWUError, match="HTTP 402 Insufficient credits"):
        judge_at(server.url).score(request_for(tmp_path))
    body["error"] = {"message": "Provider returned error", "code": 502}
    with pytest.raises(Failure, match="HTTP 502 Provider returned error"):
        judge_at(server.url).score(request_for(tmp_path))


@pytest.mark.parametrize("what", ["nothing listens", "garbage"])
def test_a_dead_endpoint_stops_the_run_and_says_why(tmp_path, stub, what):
    garbage = stub(lambda prompt, n: (200, {}, b"<html>sign in</html>"))
    url = garbage.url if what == "garbage" else "http://127.0.0.1:9/v1"
    reason = "is not JSON" if what == "garbage" else "no answer"
    with pytest.raises(HYWUError, match=f"no question got an answer.*{reason}"):
        run(tmp_path, judge_at(url, retries=0, parallel=1), 40)


def test_an_endpoint_that_dies_in_mid_run_stops_it(tmp_path, stub):
    server = stub(lambda prompt, n: GOOD if sum(server.seen.values()) < 6 else (503, {}, b"down"))
    with pytest.raises(HYWUError, match="HTTP 503 down.*in a row"):
        run(tmp_path, judge_at(server.url, retries=0, parallel=1), 40)
    server.behave = lambda prompt, n: GOOD
    assert run(tmp_path, judge_at(server.url), 40).kept == 5


def test_reasons_are_on_the_screen_by_kind(tmp_path, stub, capsys):
    def behave(prompt, n):
        if "#1" in prompt:
            return answer(400, "Image rejected by content moderation")
        return (
            answer(413, f"too large, request id {n}{hash(prompt) % 10**9}")
            if "#2" in prompt
            else GOOD
        )

    server = stub(behave)
    folder = tmp_path / "data"
    benchmark(tmp_path, ["x"] * 0)
    folder.mkdir(exist_ok=True)
    rows = [{"source": "s.png", "instruction": f"do fine #{n}"} for n in (1, 2, 22, 222, 3)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    request_for(tmp_path / "made").source.save(folder / "s.png")
    given = ["--benchmark", "folder", "--data", str(folder), "--out", str(tmp_path)]
    assert main(["eval", "generate", *given, "--editor", "copy"]) == 0
    capsys.readouterr()
    asked = ["eval", "judge", str(tmp_path / "copy"), "--judge", "openai", "--model", "judge"]
    asked += ["--url", server.url, "--parallel", "1"]
    assert main(asked) == 3
    said = capsys.readouterr().out
    assert "1 answered, 1 refused, 3 failed" in said
    assert said.count("too large, request id") == 1
    assert "3 x failed: HTTP 413 too large, request id" in said
    assert "1 x refused: HTTP 400 Image rejected by content moderation" in said
    assert main(asked) == 3
    assert "--again refused" in capsys.readouterr().out


@pytest.mark.parametrize("again", [(FAILED,), (FAILED, REFUSED)])
def test_refusals_are_asked_again_when_told_so(tmp_path, stub, again):
    server = stub(lambda prompt, n: CONTENT["openai"])
    assert run(tmp_path, judge_at(server.url)).refused == 6
    server.behave = lambda prompt, n: GOOD
    count = run(tmp_path, judge_at(server.url), again=again)
    assert (count.answered, count.kept) == ((6, 0) if REFUSED in again else (0, 6))


# -- secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["user:hunter2@example.org/v1", "ftp://user:hunter2@example.org", "https://u:hunter2@h/v1"],
)
def test_no_password_of_a_wrong_url_is_shown(url):
    with pytest.raises(HYWUError) as caught:
        judge_at(url)
    assert "hunter2" not in str(caught.value)


def test_a_key_given_for_its_variables_name_is_not_shown():
    with pytest.raises(HYWUError, match="name of an environment variable") as caught:
        judge_at("https://example.org/v1", key_env="sk-proj-hunter2")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["hunter2\nx", "hunter2 老", "hunter2 x"])
def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(HYWUError, match="OPENAI_API_KEY holds") as caught:
        judge_at("https://example.org/v1")
    assert "hunter2" not in str(caught.value)


def test_a_key_that_an_endpoint_echoes_is_in_no_file(tmp_path, stub):
    echo = f"you sent {KEY}"
    server = stub(
        lambda prompt, n: (
            echo if "#1" in prompt else (500, {}, echo.encode()) if "#2" in prompt else GOOD
        )
    )
    run(tmp_path, judge_at(server.url, parallel=1, retries=0))
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"you sent ***" in written
    assert KEY.encode() not in written


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_wrong_url_and_carries_no_key(tmp_path, stub, status):
    other = stub(lambda prompt, n: GOOD)
    server = stub(lambda prompt, n: (status, {"Location": other.url}, b""))
    with pytest.raises(HYWUError, match=f"HTTP {status}.*{other.url}"):
        judge_at(server.url).score(request_for(tmp_path))
    assert not other.keys


def test_refusal_is_still_a_refusal(tmp_path, stub):
    body = completion(None)
    body["choices"][0]["message"]["refusal"] = "I can't help with that."
    server = stub(lambda prompt, n: (200, {}, json.dumps(body).encode()))
    with pytest.raises(Refusal, match="can't help"):
        judge_at(server.url).score(request_for(tmp_path))
