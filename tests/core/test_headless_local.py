"""Starting and stopping a server process, on programs that only look like ComfyUI from outside."""

from __future__ import annotations

import sys
import time

import pytest

from hywu_core.errors import HYWUError
from hywu_core.headless.local import LocalServer, get_json

#: Answers ComfyUI's first question, says how it was called, and ends on SIGTERM unless told not to.
ANSWERS = """
import http.server, json, os, signal, sys
print("called with", sys.argv[1:], flush=True)
print("PYTHONPATH", os.environ.get("PYTHONPATH"), flush=True)
if "--stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"path": self.path}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def make(tmp_path):
    """Program text -> a server of it, not started yet."""
    tree, base = tmp_path / "tree", tmp_path / "base"
    tree.mkdir()

    def server(program: str, **options) -> LocalServer:
        (tree / "main.py").write_text(program)
        return LocalServer(sys.executable, tree, base, **options)

    return server


def test_it_answers_inside_the_block_and_is_gone_after_it(make, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # loopback is never asked for by a proxy
    with make(ANSWERS, arguments=["--cpu", "--extra"]) as server:
        assert get_json(f"{server.url}/system_stats") == {"path": "/system_stats"}
        assert server.seconds_to_start > 0
        assert server.process.poll() is None
    assert server.process.poll() is not None
    with pytest.raises(OSError):
        get_json(f"{server.url}/system_stats")
    log = server.log_tail()
    assert "'--listen', '127.0.0.1'" in log
    assert f"'--base-directory', {str(tmp_path / 'base')!r}" in log
    assert "'--cpu', '--extra'" in log
    assert "PYTHONPATH None" in log
    assert {p.name for p in (tmp_path / "base").iterdir()} >= {"models", "input", "output", "user"}
    assert [p.name for p in (tmp_path / "tree").iterdir()] == ["main.py"]


def test_a_server_that_ends_shows_the_end_of_its_log(make):
    lines = "".join(f"print('line {n}')\n" for n in range(100))
    server = make(lines + "raise SystemExit(3)")
    with pytest.raises(HYWUError, match=r"ended with code 3; the end of .*server\.log") as error:
        server.start()
    assert "line 99" in str(error.value)
    assert "line 42" not in str(error.value)


def test_a_silent_server_is_given_up_and_stopped(make):
    server = make("import time\ntime.sleep(60)")
    with pytest.raises(HYWUError, match="was silent for 0 s"):
        server.start(timeout=0.4)
    assert server.process.poll() is not None


def test_an_interruption_while_waiting_leaves_no_process(make, monkeypatch):
    server = make("import time\ntime.sleep(60)")

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert server.process.poll() is not None


@pytest.mark.skipif(sys.platform == "win32", reason="terminate() is already a kill on Windows")
def test_one_that_does_not_stop_is_killed(make, monkeypatch):
    server = make(ANSWERS, arguments=["--stubborn"]).start()
    usual = server.process.wait
    monkeypatch.setattr(server.process, "wait", lambda seconds: usual(min(seconds, 0.3)))
    started = time.monotonic()
    server.stop()
    assert server.process.poll() == -9
    assert time.monotonic() - started < 10
    server.stop()  # once more is nothing


def test_stopping_what_was_never_started_is_nothing(make):
    server = make(ANSWERS)
    server.stop()
    assert server.log_tail() == ""
