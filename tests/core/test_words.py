"""One word for one thing, in code, docs, help pages and messages, English and Chinese."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = ("dev.py", "README.md", "hywu_core/**/*.py", "nodes/**/*.py", "bench/*.py", "workflows/*.py",
         "docs/*.md", "web/**/*.md", "web/**/*.js", "locales/**/*.json")  # fmt: skip
#: What isn't said -> what is said instead.
WORDS = {
    r"\b[Pp]ictures?\b|_pictures?\b|\bpictures?_": "image",
    r"\b_?[Ff]acts?\b": "metadata, or the thing's own name",
    r"\b[Rr]eckon": "estimate",
    r"\bodd(ly)?\b": "unexpected",
    r"\b[Qq]uantis": "quantize",
    r"\b([Oo]ne|[Oo]nce|[Tt]wice|[Tt]wo|seconds|items|steps) an? "
    r"(item|image|line|step|task|file|stack|prompt|node|session|weight|second)\b": "per",
    "图片": "图像", "参考图(?!像)": "参考图像", "源图(?!像)": "源图像", "标记数": "token 数", "潜变量": "潜空间图像",
    "附带": "自带", "自带编辑器": "自带编辑模型", "ComfyUI 自带": "ComfyUI 内置", "热图": "范数图",
}  # fmt: skip
#: Instructions that are trained, and words that editors know.
SPOKEN = {
    f"hywu_core/experiments/{n}.py" for n in ("phrasings", "pretraining_tasks", "unknown_requests")
}
SPOKEN |= {"hywu_core/bases/bundled/vocabulary.py"}
#: Keys of stored files and reports, a class of stored pages, an instruction, odd numbers, former code.
KEPT = re.compile(
    r'"pictures_each"|\bpictures: |self\.pictures\b|class="facts"|make the picture look old|it is odd\b'
    r"|no odd length|Without one an image|\bodd := names|sorted\(odd\)"
)  # fmt: skip


def told(text: str) -> list[str]:
    """The lines of a text that say a thing by another word."""
    return [
        f"{line.strip()[:80]}: {better}"
        for line in text.splitlines()
        for word, better in WORDS.items()
        if re.search(word, KEPT.sub("", line))
    ]


def test_every_thing_has_its_word():
    files = {path for pattern in TEXTS for path in ROOT.glob(pattern)}
    assert len(files) > 300
    texts = {path.relative_to(ROOT).as_posix(): path for path in files}
    found = {
        name: told(path.read_text("utf-8")) for name, path in texts.items() if name not in SPOKEN
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_another_word_is_found():
    assert told("the picture, one a line\nmemory is reckoned")[1:] == [
        "the picture, one a line: per",
        "memory is reckoned: estimate",
    ]
