"""API-format graphs: addressing nodes, setting inputs, safe output names."""

from __future__ import annotations

import json

import pytest

from hywu_core import HYWUError
from hywu_core.headless.address import Address
from hywu_core.headless.client import describe_refusal
from hywu_core.headless.graph import find_node, image_node, parse_value, read_graph, set_input
from hywu_core.headless.saving import safe_name, save_new


@pytest.fixture
def graph():
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "2": {"class_type": "KSampler", "inputs": {"seed": 1}, "_meta": {"title": "First"}},
        "3": {"class_type": "KSampler", "inputs": {"seed": 1}},
    }


def test_ui_format_is_explained(tmp_path):
    path = tmp_path / "ui.json"
    path.write_text(json.dumps({"nodes": [], "links": []}))
    with pytest.raises(HYWUError, match=r"UI format.*Export \(API\)"):
        read_graph(path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 1}', "not json"])
def test_what_is_no_workflow_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(HYWUError, match=r"other\.json"):
        read_graph(path)


def test_nodes_by_id_title_and_class(graph):
    assert find_node(graph, "3") == "3"
    assert find_node(graph, "First") == "2"
    assert find_node(graph, "LoadImage") == "1"
    with pytest.raises(HYWUError, match="2, 3"):
        find_node(graph, "KSampler")


def test_set_keeps_the_type(graph):
    set_input(graph, "First.seed=7")
    set_input(graph, "LoadImage.image=12")
    assert graph["2"]["inputs"]["seed"] == 7
    assert graph["1"]["inputs"]["image"] == "12"


@pytest.mark.parametrize("bad", ["First.sed=7", "Nobody.seed=7", "seed=7", "First.seed"])
def test_set_refuses_what_does_not_exist(graph, bad):
    before = json.dumps(graph)
    with pytest.raises(HYWUError):
        set_input(graph, bad)
    assert json.dumps(graph) == before


def test_image_goes_to_the_only_loader_or_the_named_one(graph):
    assert image_node(graph, "photo.png") == ("1", "photo.png")
    graph["9"] = {"class_type": "LoadImage", "inputs": {"image": "b.png"}}
    assert image_node(graph, "9=photo.png") == ("9", "photo.png")
    with pytest.raises(HYWUError, match="1, 9"):
        image_node(graph, "photo.png")


@pytest.mark.parametrize("name", ["../../a.png", "/etc/a.png", "C:\\x\\a.png", "..\\a.png"])
def test_names_cannot_escape(name):
    assert safe_name(name) == "a.png"


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a.png").touch()
    assert save_new(tmp_path / "a.png", b"new").name == "a-2.png"


def test_refusal_without_node_errors():
    assert "no outputs" in describe_refusal({"error": {"message": "Prompt has no outputs"}})


@pytest.mark.parametrize(
    ("text", "old", "declared", "wanted"),
    [
        ("False", True, None, False),
        ("no", False, None, False),
        ("off", True, None, False),
        ("YES", False, None, True),
        ("0", None, ["BOOLEAN", {}], False),
        ("7", 3, None, 7),
        ("18446744073709551615", 3, ["INT", {}], 18446744073709551615),
        ("1e3", 3, ["INT"], 1000),
        ("7", 0.5, ["FLOAT"], 7),
        ("0.25", 1, None, 0.25),
        ("7", "a", None, "7"),
        ("true", "a", ["STRING", {"multiline": True}], "true"),
        ("12", "a", [["12", 7]], "12"),
        ("7", "a", ["COMBO", {"options": ["12", 7]}], 7),
        ("new.png", "a", [["old.png"]], "new.png"),
        ('["4", 0]', 3, ["INT"], ["4", 0]),
        ('{"x": 1}', {}, ["CURVE"], {"x": 1}),
    ],
)
def test_values_by_type(text, old, declared, wanted):
    found = parse_value(text, old, declared)
    assert (found, type(found)) == (wanted, type(wanted))


@pytest.mark.parametrize(
    ("text", "old", "declared", "words"),
    [
        ("maybe", True, None, "'maybe' is neither true nor false"),
        ("7.5", 3, ["INT"], "'7.5' is no whole number"),
        ("nan", 3, ["FLOAT"], "'nan' is no number"),
        ("1e999", 3, None, "no number"),
        ("seven", 3, None, "no number"),
    ],
)
def test_values_of_another_type_are_refused(text, old, declared, words):
    with pytest.raises(HYWUError, match=words):
        parse_value(text, old, declared)


def test_an_unknown_name_is_listed_beside_those_there_are(graph):
    with pytest.raises(
        HYWUError, match=r"title or class Frist\. Is First meant\? .* 2 First, 3 KSam"
    ):
        find_node(graph, "Frist")


def test_titles_may_hold_dots_and_equals_signs(graph):
    graph["2"]["_meta"]["title"] = "a=b.c"
    set_input(graph, "a=b.c.seed=9")
    graph["2"]["inputs"]["text"] = ""
    set_input(graph, "a=b.c.text=x.y=z")
    assert graph["2"]["inputs"] == {"seed": 9, "text": "x.y=z"}


def test_a_byte_order_mark_and_odd_nodes(tmp_path, graph):
    path = tmp_path / "bom.json"
    path.write_text(json.dumps(graph), encoding="utf-8-sig")
    assert read_graph(path) == graph
    for unexpected in (
        {"1": {"class_type": 3}},
        {"1": {"class_type": "A", "inputs": []}},
        {"1": []},
    ):
        path.write_text(json.dumps(unexpected))
        with pytest.raises(HYWUError, match=r"bom\.json"):
            read_graph(path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("fête, 50% + más.png", "fête, 50% + más.png"),
        ("a?b:c.png", "a_b_c.png"),
        ("...", "unnamed"),
        ("CON.png", "_CON.png"),
        ("aux", "_aux"),
        ("com1 .tar.gz", "_com1 .tar.gz"),
        ("console.png", "console.png"),
        ("x" * 300 + ".png", "x" * 196 + ".png"),
        ("图" * 100 + ".png", "图" * 65 + ".png"),
    ],
)
def test_names_that_every_system_takes(name, wanted):
    assert safe_name(name) == wanted


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8188", "http://127.0.0.1:8188"),
        ("localhost", "http://localhost"),
        ("https://me:pw@host/comfy/?token=abc", "https://host/comfy"),
        ("http://[::1]:8188/", "http://[::1]:8188"),
        ("ws://host:1", "http://host:1"),
    ],
)
def test_addresses(text, url):
    assert Address(text).url == url


@pytest.mark.parametrize(
    "text", ["", "ftp://u:secret@host", "http://", "http://u:secret@host:70000", "http://[::1"]
)
def test_addresses_that_are_none(text):
    with pytest.raises(HYWUError, match="can't be used") as caught:
        Address(text)
    assert "secret" not in str(caught.value)


def test_a_login_that_travels_unencrypted_is_said(caplog):
    Address("http://127.0.0.1:8188", token="secret")
    Address("https://host:8188", token="secret")
    Address("http://host:8188")
    assert caplog.messages == []
    Address("http://me:secret@host:8188/x?token=secret")
    assert caplog.messages == [
        "the login for http://host:8188/x travels unencrypted; use https where you can"
    ]
