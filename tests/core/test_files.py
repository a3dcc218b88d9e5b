"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os

import pytest
import torch

from hywu_core import HYWUError
from hywu_core.files import atomic_folder, atomic_path, read_tensors, save_tensors


def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def old_folder(tmp_path):
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("old a")
    (folder / "sub" / "mine.txt").write_text("mine")
    return folder


def test_new_folder_appears_when_the_block_ends(tmp_path):
    folder = tmp_path / "deep" / "out"
    with atomic_folder(folder) as part:
        (part / "a.txt").write_text("new")
        assert not folder.exists()
    assert tree(tmp_path) == {"deep/out/a.txt": "new"}
    if os.name == "posix":
        (tmp_path / "usual").mkdir()
        assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_overwriting_replaces_and_keeps_other_files(tmp_path):
    folder = old_folder(tmp_path)
    with atomic_folder(folder, overwrite=True) as part:
        (part / "a.txt").write_text("new a")
        assert (folder / "a.txt").read_text() == "old a"
    assert tree(tmp_path) == {"out/a.txt": "new a", "out/sub/mine.txt": "mine"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_interrupted_write_leaves_the_old_folder(tmp_path, error):
    folder = old_folder(tmp_path)
    before = tree(tmp_path)
    wanted = HYWUError if error is OSError else error
    with pytest.raises(wanted), atomic_folder(folder, overwrite=True) as part:
        (part / "a.txt").write_text("half")
        raise error("stopped")
    assert tree(tmp_path) == before
    with pytest.raises(wanted), atomic_folder(tmp_path / "new") as part:
        (part / "a.txt").write_text("half")
        raise error("stopped")
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder = old_folder(tmp_path)
    before, replace = tree(tmp_path), os.replace

    def fails_for_the_new(source, target):
        if os.path.basename(source) == "new":
            raise PermissionError(13, "in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_for_the_new)
    with (
        pytest.raises(HYWUError, match=r"out: can't be written \(in use\)"),
        atomic_folder(folder, overwrite=True) as part,
    ):
        (part / "a.txt").write_text("new")
    assert tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    folder = old_folder(tmp_path)
    link = tmp_path / "link"
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError:
        pytest.skip("this system lets only administrators make symbolic links")
    with atomic_folder(link, overwrite=True) as part:
        (part / "a.txt").write_text("new a")
    assert link.is_symlink()
    assert tree(folder) == {"a.txt": "new a", "sub/mine.txt": "mine"}


def test_refusals_of_folders(tmp_path):
    folder = old_folder(tmp_path)
    for path, overwrite, words in (
        (folder, False, "exists already"),
        (folder / "a.txt", True, "is a file"),
        (folder / "a.txt" / "x", False, "can't be written"),
    ):
        with pytest.raises(HYWUError, match=words), atomic_folder(path, overwrite):
            raise AssertionError("the block must not be entered")


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path, overwrite=True) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"x.txt": "old"}


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    whole = torch.arange(6.0)
    path = save_tensors(
        tmp_path / "x", {"whole": whole, "part": whole[:2], "same": whole}, {"n": 1}
    )
    tensors, header = read_tensors(path)
    assert header == {"n": 1}
    assert torch.equal(tensors["whole"], whole)
    assert torch.equal(tensors["part"], whole[:2])
    assert torch.equal(tensors["same"], whole)


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, which Windows can't")
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(HYWUError, match=r"x.safetensors: can't be written \(.*too large"):
            save_tensors(tmp_path / "x", {"a": torch.ones(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
