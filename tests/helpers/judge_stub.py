"""A judge's endpoint on loopback that behaves as a test says, and small items to ask it about."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from hywu_core.evaluation.benchmarks import BENCHMARKS, load_questionnaire
from hywu_core.evaluation.benchmarks.wu_eval import DIMENSIONS
from hywu_core.evaluation.items import Item, ItemList
from hywu_core.evaluation.judges.base import JudgeRequest
from hywu_core.evaluation.results import Results
from hywu_core.images import write_image

KEY = "sk-test-0123456789"
GOOD = json.dumps(dict.fromkeys(DIMENSIONS, 4))


class Stub:
    """An OpenAI-compatible endpoint on loopback. `behave(prompt, n)` decides the n-th answer to a
    prompt: text, or (status, headers, body bytes), or seconds to stall."""

    def __init__(self, behave):
        self.behave = behave
        self.seen: Counter[str] = Counter()
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.running = self.most = 0
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"][0]["text"]
                with lock:
                    stub.seen[prompt] += 1
                    number = stub.seen[prompt]
                    stub.bodies.append(body)
                    stub.keys.append(self.headers.get("Authorization"))
                    stub.times.append(time.monotonic())
                    stub.running += 1
                    stub.most = max(stub.most, stub.running)
                answer = stub.behave(prompt, number)
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = GOOD
                else:
                    time.sleep(0.02)
                with lock:
                    stub.running -= 1
                if isinstance(answer, tuple):
                    status, headers, data = answer
                else:
                    status, headers = 200, {}
                    data = json.dumps(completion(answer)).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client gave up: that is what is tested

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def completion(text, model="judge-2026-01-01", **choice):
    return {
        "model": model,
        "choices": [{"message": {"content": text}, "finish_reason": "stop", **choice}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7},
    }


def benchmark(root: Path, instructions: list[str]) -> tuple[Results, ItemList]:
    """Items with these instructions, each with a source, a target and a result."""
    rng = np.random.default_rng(0)
    items = []
    for number, instruction in enumerate(instructions):
        source = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        paths = [root / "data" / f"{kind}{number}.png" for kind in ("source", "target")]
        write_image(source, paths[0])
        write_image(source.filter(ImageFilter.GaussianBlur(1)), paths[1])
        items.append(Item(f"k{number}", "blur", instruction, paths[0], target=paths[1]))
        write_image(source.filter(ImageFilter.GaussianBlur(0.5)), root / "mine" / f"k{number}.png")
    return Results(root / "mine", BENCHMARKS["folder"]), ItemList("folder", tuple(items))


def request_for(root: Path, instruction: str = "do fine #1") -> JudgeRequest:
    _, items = benchmark(root, [instruction])
    item = items.items[0]
    question = load_questionnaire("wu-eval").questions(item)[0]
    with Image.open(item.source) as source, Image.open(item.target) as target:
        return JudgeRequest(question, source.convert("RGB"), target.convert("RGB"), target.copy())
