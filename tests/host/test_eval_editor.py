"""`hywu eval generate --editor comfy` against a real server, with stock nodes."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from hywu_core.cli import main
from hywu_core.headless.local import LocalServer, free_port

BLUR = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "missing.png"}},
    "2": {
        "class_type": "ImageBlur",
        "inputs": {"image": ["1", 0], "blur_radius": 5, "sigma": 2.0},
    },
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
}


def test_a_workflow_as_an_editor(server: LocalServer, tmp_path: Path):
    """A blur is the edit asked for on one sample and not on the other, and the scores say so."""
    workflow = tmp_path / "blur.json"
    workflow.write_text(json.dumps(BLUR))
    out = tmp_path / "out"
    command = ["eval", "generate", "--benchmark", "folder", "--data", "samples", "--out", str(out)]
    command += ["--editor", "comfy", "--workflow", str(workflow), "--workers", "2"]
    command += ["--comfy-image", "LoadImage.image", "--comfy-instruction", "3.filename_prefix"]
    assert main([*command, "--method", "blur", "--server", server.url]) == 0
    assert main(["eval", "judge", str(out / "blur")]) == 0
    assert main(["eval", "score", str(out / "blur")]) == 0
    summary = json.loads(next((out / "blur" / "scores").rglob("summary.json")).read_text())
    rows = {row[0]: float(row[-1]) for row in summary["table"]["rows"] if row[0] != "all tasks"}
    assert rows["blur"] > 3.5
    assert rows["brighten"] == 1.0

    gone = f"http://127.0.0.1:{free_port()}"
    assert main([*command, "--method", "gone", "--server", gone]) == 3
    failures = (out / "gone" / "failures.jsonl").read_text().splitlines()
    assert len(failures) == 2
    assert all("No ComfyUI answers" in json.loads(line)["error"] for line in failures)


def test_many_images_through_a_server_beside_one_that_is_not_there(server: LocalServer, tmp_path):
    """`hywu comfy batch`: results named after their sources, nothing left of the uploads."""
    (tmp_path / "blur.json").write_text(json.dumps(BLUR))
    sources = tmp_path / "sources"
    sources.mkdir()
    for name, shade in (("a.png", 40), ("b.jpg", 200)):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(sources / name)
    gone = f"http://127.0.0.1:{free_port()}"
    command = ["comfy", "batch", str(sources), "--workflow", str(tmp_path / "blur.json")]
    command += ["--server", gone, "--server", server.url, "--out", str(tmp_path / "out")]
    assert main([*command, "--set", "2.blur_radius=3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    assert sorted((row["name"], row["server"]) for row in rows) == [
        ("a", server.url), ("b", server.url),
    ]  # fmt: skip
    for name, shade in (("a.png", 40), ("b.png", 200)):
        red = Image.open(tmp_path / "out" / name).getpixel((16, 16))[0]
        assert abs(red - shade) <= 2
    uploads = list((Path(server.base) / "temp").rglob("hywu_*"))
    assert len(uploads) == 2
    assert all(path.stat().st_size == 0 for path in uploads)
    assert main([*command, "--set", "2.blur_radius=9"]) == 1  # another workflow
