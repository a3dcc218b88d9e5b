"""The locales say what the nodes say: no missing key, no stale one, in English the same text."""

from __future__ import annotations

import inspect
import re

import node_definitions as nodes
import pytest

CHINESE = re.compile(r"[\u4e00-\u9fff]")


def flat(tree: dict, path: str = "") -> dict[str, str]:
    """Dotted key -> text."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        at = f"{path}.{key}" if path else key
        found |= flat(value, at) if isinstance(value, dict) else {at: value}
    return found


@pytest.fixture(scope="module")
def defined() -> dict[str, str]:
    return flat(nodes.definitions())


def test_every_node_is_defined_with_a_tooltip_on_everything(defined):
    names = nodes.display_names()
    assert len(names) >= 15
    assert {key.partition(".")[0] for key in defined} == set(names)
    assert all(text.strip() for text in defined.values())


def test_every_node_is_found_by_other_words():
    for name, cls in nodes.node_classes().items():
        assert "hywu" in cls.SEARCH_ALIASES, name
        assert len(set(cls.SEARCH_ALIASES)) == len(cls.SEARCH_ALIASES) >= 3, name


def test_every_report_is_one_that_comfyui_sends_again_from_its_cache():
    for name, cls in nodes.node_classes().items():
        if "text_output(" in inspect.getsource(getattr(cls, cls.FUNCTION)):
            again = (
                getattr(cls, "OUTPUT_NODE", False),
                getattr(cls, "HAS_INTERMEDIATE_OUTPUT", False),
            )
            assert any(again), name


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_key_is_missing_and_none_is_stale(language, defined):
    translated = flat(nodes.read_locale(language, "nodeDefs"))
    assert defined.keys() - translated.keys() == set()
    assert translated.keys() - defined.keys() == set()


def test_english_is_the_nodes_own_text(defined):
    translated = flat(nodes.read_locale("en", "nodeDefs"))
    stale = [key for key, text in defined.items() if translated.get(key) != text]
    assert not stale, "write it anew: python tests/helpers/node_definitions.py"


def test_chinese_is_chinese():
    for key, text in flat(nodes.read_locale("zh", "nodeDefs")).items():
        if not key.endswith(".name"):  # CLIP and LoRA are names in Chinese too
            assert CHINESE.search(text), key


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_is_syntax_to_the_frontend(language):
    for key, text in flat(nodes.read_locale(language, "nodeDefs")).items():
        assert nodes.escape(nodes.unescape(text)) == text, key


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_category_is_named(language):
    main = nodes.read_locale(language, "main")
    assert set(main["nodeCategories"]) == nodes.categories()
    assert set(main) == {"nodeCategories"}
