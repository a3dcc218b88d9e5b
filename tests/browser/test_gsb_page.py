"""The voting page in Chromium, standalone and inside ComfyUI, on a desktop's and a phone's width."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hywu_core.cli import main
from hywu_core.evaluation.gsb import session
from hywu_core.evaluation.gsb.store import Store

pytest.importorskip("aiohttp", reason="the voting server needs the `eval` extra")

SERVE = (
    "import sys; from pathlib import Path; from hywu_core.evaluation.gsb.server import serve; "
    "serve(Path(sys.argv[1]), '127.0.0.1', 0, [], lambda url: print(url, flush=True))"
)
ROOT = Path(__file__).resolve().parents[2]


def make_session(tmp_path: Path, folder: Path) -> Path:
    """A session of four pairs of a photograph, blurred and brightened."""
    from PIL import Image, ImageEnhance, ImageFilter
    from skimage import data

    photo = Image.fromarray(data.astronaut())
    versions = {
        "s": photo,
        "a": photo.filter(ImageFilter.GaussianBlur(6)),
        "b": ImageEnhance.Brightness(photo).enhance(1.5),
    }
    for name, image in versions.items():
        image.save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in versions]
    entries = [session.Entry(f"{i}", f"Blur the picture, please ({i})", *paths) for i in range(4)]
    return session.create_session(folder, entries, ("a", "b"), seed=1)


@pytest.fixture
def standalone(tmp_path):
    """(link, session folder) of `hywu eval gsb serve`."""
    folder = make_session(tmp_path, tmp_path / "session")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    yield process.stdout.readline().strip(), folder
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def inside_comfyui(server, tmp_path, capsys):
    """(link, session folder) of a session in the user folder of a running ComfyUI."""
    gsb = server.base / "user" / "hywu" / "gsb"
    folder = make_session(tmp_path, gsb / f"votes {len(list(gsb.glob('*')))}")
    assert main(["eval", "gsb", "link", str(folder), "--server", server.url]) == 0
    return capsys.readouterr().out.strip(), folder


@pytest.mark.parametrize(("width", "height"), [(1366, 800), (390, 844)])
@pytest.mark.parametrize("place", ["standalone", "inside_comfyui"])
def test_a_voter_votes_by_keyboard(browser, request, artefacts, place, width, height):
    link, folder = request.getfixturevalue(place)
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("response", lambda r: problems.append(r.url) if r.status >= 400 else None)
    page.goto(link)
    page.fill("#voter", "Ada")
    page.keyboard.press("Enter")

    def at(done: int) -> None:
        _wait(page, f"document.getElementById('progress').textContent === '{done} of 4' && !busy")

    at(0)
    page.screenshot(path=artefacts / f"gsb_{place}_{width}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.mouse.move(*_middle(page, "#left"))
    page.mouse.wheel(0, -300)
    _wait(page, "view.scale > 1")
    left, right = (page.eval_on_selector(s, "e => e.style.transform") for s in ("#left", "#right"))
    assert left == right
    shown = page.get_attribute("#left", "src")
    page.keyboard.down("s")
    assert page.get_attribute("#left", "src") == page.get_attribute("#right", "src") != shown
    page.keyboard.up("s")
    assert page.get_attribute("#left", "src") == shown
    page.keyboard.press("f")
    assert page.is_visible("#left") != page.is_visible("#right")
    page.keyboard.press("0")
    for done, key in enumerate(("1", "ArrowDown", "3"), start=1):
        page.keyboard.press(key)
        at(done)
    page.keyboard.press("u")
    at(2)
    for done, key in enumerate(("ArrowRight", "2"), start=3):
        page.keyboard.press(key)
        at(done)
    assert page.is_visible("#finished")
    page.screenshot(path=artefacts / f"gsb_{place}_{width}_end.png")
    context.close()
    store = Store(folder)
    verdicts = [vote.verdict for vote in store.votes()]
    store.close()
    assert len(verdicts) == 4
    assert verdicts.count("same") == 2
    assert problems == []


def _middle(page, selector: str) -> tuple[float, float]:
    box = page.locator(selector).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def _wait(page, condition: str) -> None:
    """Playwright's own waiting evaluates text inside the page, which the page's policy forbids."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"waited 15 s for {condition}")
