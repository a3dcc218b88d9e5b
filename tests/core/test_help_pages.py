"""Every node has a help page in English and Chinese, with its image and all of its sockets."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import node_definitions as nodes
import pytest
from PIL import Image

DOCS = nodes.ROOT / "web" / "docs"
NAMES = sorted(nodes.display_names())
PAGES = [(name, page) for name in NAMES for page in (f"{name}.md", f"{name}/zh.md")]


@pytest.fixture(scope="module")
def defined() -> dict[str, dict]:
    return nodes.definitions()


@pytest.mark.parametrize(("name", "page"), PAGES)
def test_a_page_names_every_socket_and_shows_the_node(name, page, defined):
    text = (DOCS / page).read_text(encoding="utf-8")
    language = "zh" if page.endswith("zh.md") else "en"
    title = nodes.read_locale(language, "nodeDefs")[name]["display_name"]
    assert text.startswith(f"# {title}\n")
    assert len(text.split("\n## ")) == 4, "inputs, outputs, errors"
    sockets = {*defined[name].get("inputs", {})}
    sockets |= {output["name"] for output in defined[name]["outputs"].values()}
    for socket in sockets:
        assert f"**{socket}**" in text or f"(`{socket}`)" in text, socket
    images = re.findall(r"!\[.+\]\((.+)\)", text)
    assert images == [f"images/{name}.webp"]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_small_and_whole(name):
    path = DOCS / "images" / f"{name}.webp"
    assert path.stat().st_size < 40_000
    with Image.open(path) as image:
        assert min(image.size) >= 100
        assert image.convert("L").getextrema()[1] > 150  # a node's texts are light on dark


def test_no_page_is_of_a_node_that_is_gone():
    files = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.is_file()}
    pages = {page for _, page in PAGES} | {f"{name}/en.md" for name in NAMES}
    assert files == pages | {f"images/{name}.webp" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_that_frontends_ask_for_first_is_the_same(name):
    """They ask for en.md and, where it isn't there, say so in the console before they take NAME.md, which is
    also what all other languages get. `python3 dev.py help-images` copies it."""
    assert (DOCS / name / "en.md").read_bytes() == (DOCS / f"{name}.md").read_bytes()


def test_scripts_are_imported_from_where_comfyui_lies():
    """Under a path of a reverse proxy too: `/scripts/app.js` would leave it."""
    found = 0
    for file in sorted((nodes.ROOT / "web" / "js").glob("*.js")):
        place = f"http://host/comfy/extensions/hywu/js/{file.name}"
        for name in re.findall(
            r"""(?:from|import\()\s*["']([^"']+)["']""", file.read_text("utf-8")
        ):
            leads = urljoin(place, name)
            own = leads.startswith("http://host/comfy/extensions/hywu/js/")
            assert own or re.fullmatch("http://host/comfy/scripts/[a-z]+[.]js", leads), (
                file.name,
                name,
            )
            found += not own
    assert found >= 5
