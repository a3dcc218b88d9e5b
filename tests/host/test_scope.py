"""LoRAs of one graph stay in their own branches, on a real server with stock nodes beside ours."""

from __future__ import annotations

import edit_graph as g
import pytest

#: Levels of 255 up to which images count as equal: rounding to bytes may fall either way.
EQUAL = g.SAME


def common() -> dict[str, dict]:
    """Two generated LoRAs, and the MODEL that all branches start from."""
    graph = g.edit_graph()
    kept = {k: graph[k] for k in ("generator", "editor", "photo", "encode", "generate")}
    kept["encode2"] = g.node(
        "HYWUConditionEncode", generator=["generator", 0], image=["photo", 0],
        instruction="sharpen the image",
    )  # fmt: skip
    kept["generate2"] = g.node(
        "HYWUGenerateLoRA", generator=["generator", 0], condition=["encode2", 0]
    )
    return kept


def applied(model: str, lora: str, mode: str, strength: float = 3.0, **more) -> dict:
    return g.node(
        "HYWUApplyLoRA", model=[model, 0], lora=[lora, 0], strength=strength, mode=mode, **more
    )


def branch(name: str) -> dict[str, dict]:
    """The nodes of one branch, from the MODEL to its image. `bypass`: newer ComfyUIs require it."""
    models = {
        "Plain": {},
        "Unmerged": {"aUnmerged": applied("editor", "generate", "unmerged")},
        "Merged": {"aMerged": applied("editor", "generate2", "merge")},
        "Stock": {
            "aStock": g.node(
                "LoraModelLoader", model=["editor", 0], lora=["generate2", 1],
                strength_model=-3.0, bypass=False,
            )
        },
        "Stacked": {
            "bStacked": g.node(
                "LoraModelLoader", model=["editor", 0], lora=["generate", 1], strength_model=2.0,
                bypass=False,
            ),
            "cStacked": applied("bStacked", "generate2", "merge"),
            "scope": g.node(
                "HYWULoRAScope", start_percent=0.0, end_percent=0.5,
                module_strengths="*decode* = 0.5",
            ),
            "aStacked": applied("cStacked", "generate", "unmerged", scope=["scope", 0]),
        },
    }  # fmt: skip
    model = [f"a{name}" if models[name] else "editor", 0]
    return models[name] | g.sampling(name, "an edit", model, ["photo", 0])


NAMES = ("Plain", "Unmerged", "Merged", "Stock", "Stacked")


@pytest.fixture(scope="module")
def alone(server):
    """Each branch's image from a prompt of its own."""
    g.put_photo(server.base / "input")
    return {
        name: g.images(server, g.run(server, common() | branch(name)), f"save{name}")
        for name in NAMES
    }


def test_sibling_branches_never_see_each_others_lora(server, alone):
    for order in (NAMES, NAMES[::-1]):
        graph = common()
        for name in order:
            graph |= branch(name)
        outputs = g.run(server, graph)
        for name in NAMES:
            assert g.levels(g.images(server, outputs, f"save{name}"), alone[name]) <= EQUAL, name


def test_every_branch_is_an_image_of_its_own(alone):
    for i, one in enumerate(NAMES):
        for two in NAMES[i + 1 :]:
            assert g.levels(alone[one], alone[two]) > 3 * EQUAL, (one, two)


def test_keyframes_of_stock_hook_nodes_are_a_range_of_the_sampling(server, alone):
    graph = common() | g.sampling("Hook", "an edit", ["editor", 0], ["photo", 0])
    graph |= {
        "hook": g.node("HYWULoRAHook", model=["editor", 0], lora=["generate", 0], strength=3.0),
        "first": g.node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0),
        "then": g.node(
            "CreateHookKeyframe", strength_mult=0.0, start_percent=0.5, prev_hook_kf=["first", 0]
        ),
        "timed": g.node("SetHookKeyframes", hooks=["hook", 0], hook_kf=["then", 0]),
    }
    for i, end in enumerate(("positive", "negative")):
        graph[end] = g.node(
            "ConditioningSetProperties", cond_NEW=["pairHook", i], strength=1.0,
            set_cond_area="default", hooks=["timed", 0],
        )  # fmt: skip
        graph["sampleHook"]["inputs"][end] = [end, 0]
    graph["half"] = g.node("HYWULoRAScope", start_percent=0.0, end_percent=0.5, module_strengths="")
    graph["aHalf"] = applied("editor", "generate", "unmerged", scope=["half", 0])
    graph |= g.sampling("Half", "an edit", ["aHalf", 0], ["photo", 0])
    outputs = g.run(server, graph)
    hooked, half = (g.images(server, outputs, f"save{name}") for name in ("Hook", "Half"))
    assert g.levels(hooked, half) <= EQUAL
    assert g.levels(hooked, alone["Plain"]) > 3 * EQUAL
    assert g.levels(hooked, alone["Unmerged"]) > 3 * EQUAL
