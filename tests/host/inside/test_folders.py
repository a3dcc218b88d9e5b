"""ComfyUI's folders as they were: what the extension registers, lists, makes and refuses."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths
import pytest
import torch
from hywu_nodes.hywu_core.errors import HYWUError
from hywu_nodes.hywu_core.files import atomic_path
from hywu_nodes.nodes.host import paths, previews

import dev


def registered() -> dict[str, list[str]]:
    return {name: list(found[0]) for name, found in folder_paths.folder_names_and_paths.items()}


def test_only_folders_of_our_own_are_model_folders(base):
    """A user's images, outputs and LoRAs would be tagged and listed as models of ours."""
    ours = {name: folders for name, folders in registered().items() if name.startswith("hywu")}
    models = base / "models"
    assert ours == {
        "hywu": [str(models / "hywu")],
        "hywu_conditions": [str(models / "hywu_conditions")],
    }


@pytest.mark.parametrize("folder", ["input", "output", "models/loras", "temp"])
def test_no_folder_of_comfyui_is_taken_for_models(base, folder):
    taken = [name for name, folders in registered().items()
             if name.startswith("hywu") and str(base / folder) in folders]  # fmt: skip
    assert taken == []


def test_the_folder_for_generators_is_there(base):
    assert (base / "models" / "hywu").is_dir()


@pytest.mark.parametrize(
    ("folder", "names"),
    [("input/deep", paths.condition_names), ("output/conditions", paths.condition_names),
     ("models/hywu_conditions", paths.condition_names), ("models/loras/style", paths.lora_names),
     ("output/loras", paths.lora_names)],
)  # fmt: skip
def test_files_are_still_listed_and_found(base, folder, names):
    (base / folder).mkdir(parents=True, exist_ok=True)
    file = base / folder / f"listed_{folder.replace('/', '_')}.safetensors"
    file.touch()
    # relative to the folder that is looked in
    listed = next(name for name in names() if name.endswith(file.name))
    find = paths.condition_path if names is paths.condition_names else paths.lora_path
    assert find(listed) == file
    file.unlink()
    with pytest.raises(HYWUError, match="there is no such file"):
        find(listed)


def test_folders_of_the_operator_are_looked_in(base, tmp_path, monkeypatch):
    for name in ("hywu_conditions", "hywu_loras"):
        known = registered().get(name, [])
        entry = ([*known, str(tmp_path / name)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, entry)
        (tmp_path / name).mkdir()
        (tmp_path / name / "theirs.safetensors").touch()
    assert "theirs.safetensors" in paths.condition_names()
    assert "theirs.safetensors" in paths.lora_names()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../b", "\0", "x" * 5000])
@pytest.mark.parametrize("find", [paths.generator_path, paths.condition_path, paths.lora_path])
def test_no_name_leads_out(find, name):
    with pytest.raises(HYWUError, match="there is no such file"):
        find(name)


@pytest.mark.parametrize(
    "prefix", ["../x", "/tmp/x", "a/../../x", "..", "", "a/", "\0", "x" * 5000, "\ud83d"]
)
@pytest.mark.parametrize("node", ["HYWUSaveLoRA", "HYWUSaveCondition"])
def test_a_prefix_that_cannot_be_used_is_said_before_the_run(nodes, node, prefix):
    said = nodes[node].VALIDATE_INPUTS(filename_prefix=prefix)
    if prefix in ("a/",):  # as ComfyUI takes it: a file called a
        assert said is True
        return
    assert "use a name below it" in said
    said.encode()
    with pytest.raises(HYWUError):
        paths.save_path(prefix, ".safetensors")


@pytest.mark.parametrize("prefix", [None, "loras/hywu", "a", "%date%/b", "猫/é", "./x"])
def test_a_prefix_that_can_be_used_is_taken(nodes, prefix):
    assert nodes["HYWUSaveLoRA"].VALIDATE_INPUTS(filename_prefix=prefix) is True


def test_names_of_the_nodes_can_be_read_without_python(nodes):
    """ComfyUI-Manager's scanner reads the text: a literal mapping, its keys in quotes."""
    text = (dev.ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8")
    (mapping,) = re.findall(r"^NODE_CLASS_MAPPINGS\s*=\s*\{([^}]*)\}", text, re.MULTILINE)
    assert set(re.findall(r'"([^"]*)"\s*:', mapping)) == nodes.keys()


LISTS = [paths.check_generator, paths.check_condition, paths.check_lora, paths.check_hunyuan]


@pytest.mark.parametrize(
    "name", ["no.safetensors", "half \ud83d pair", "../x", "n" * 5000, paths.NOTHING]
)
@pytest.mark.parametrize("check", LISTS)
def test_what_no_list_has_is_said_before_the_run(check, name):
    with pytest.raises(HYWUError, match="there is no such file in models/") as caught:
        check(name)
    text = str(caught.value)
    text.encode()
    assert "Listed: " in text
    assert len(text) < 1500


def test_what_a_list_has_passes_and_is_counted(base, monkeypatch):
    for name in paths.generator_names():
        paths.check_generator(name)
    for name in paths.lora_names():
        if name != paths.NOTHING:
            paths.check_lora(name)
    for check in LISTS:
        check(None)  # a link brings it
    monkeypatch.setattr(paths, "generator_names", lambda: [f"g{i}" for i in range(30)])
    with pytest.raises(HYWUError, match="'g7' and 22 more"):
        paths.check_generator("h")


def test_two_servers_save_under_one_prefix_and_nothing_is_lost(base):
    theirs = []

    def write(path):
        if not theirs:  # another server takes the number between the look and the save
            theirs.append(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"theirs")
        with atomic_path(path) as part:
            part.write_bytes(b"ours")

    name = paths.save_new("race/x", ".txt", write)
    assert theirs[0].read_bytes() == b"theirs"
    assert (base / "output" / name).read_bytes() == b"ours"
    with pytest.raises(HYWUError, match="full"):
        paths.save_new("race/x", ".txt", full)


def full(path):
    raise HYWUError("the disk is full")


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, which Windows can't")
def test_images_that_do_not_fit_on_the_disk_are_named_and_none_is_left():
    import resource

    temp, before = (
        Path(folder_paths.get_temp_directory()),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    previews.preview(torch.rand(1, 8, 8, 3))
    there = set(temp.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(HYWUError, match=r"temp: the node's images can't be written"):
            previews.preview(torch.cat([torch.zeros(1, 64, 64, 3), torch.rand(1, 64, 64, 3)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert set(temp.iterdir()) == there
