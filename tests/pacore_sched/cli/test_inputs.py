"""Images and checkpoints of a resumed job are compared by content."""

import base64
import builtins
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from model.step3vl import Step3VL
from model.weights.source import source_files
from pacore_sched.cli import inputs
from pacore_sched.cli.inputs import ImageFiles
from tests.support.job_call import Call


def _photo(file: Path, size: tuple[int, int], color: str = "red") -> None:
    Image.new("RGB", size, color).save(file)


@pytest.fixture
def photos(call: Call) -> Call:
    """A job on two images that was killed after three rollouts of the first problem."""
    _photo(call.folder / "a.png", (40, 30))
    _photo(call.folder / "b.png", (50, 30))
    url = "data:image/png;base64," + base64.b64encode((call.folder / "b.png").read_bytes()).decode()
    call.ask(
        {"question": "Alike?", "images": ["a.png", url, "b.png"]},
        {"question": "What?", "image": "a.png"},
        {"question": "Why?"},
    )
    whole = call.folder / "whole.jsonl"
    assert call(out=whole)[0] == 0
    lines = whole.with_suffix(".journal.jsonl").read_text().splitlines(keepends=True)
    first = [line for line in lines[1:] if json.loads(line)["problem"] == "1"]
    assert json.loads(first[0])["kind"] == "images"
    call.journal.write_text("".join([lines[0], *first[:4]]))
    return call


def test_images_are_resumed_by_content(photos: Call):
    """A run that is not resumed though its images are the same, or gives other results."""
    file = photos.folder / "a.png"
    os.utime(file, (0, 0))
    code, out, _ = photos("--resume", "--json")
    assert (code, json.loads(out)["resumed_rollouts"]) == (0, 3)
    assert photos.out.read_bytes() == (photos.folder / "whole.jsonl").read_bytes()
    assert photos.journal.read_text().count('"kind": "images"') == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: _photo(file, (50, 30), "blue"), "line 1: image .*b.png has changed"),
        (Path.unlink, "line 1: image b.png cannot be read"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "line 1: .*b.png"),
    ],
)
def test_another_image_is_not_resumed(
    photos: Call, monkeypatch: pytest.MonkeyPatch, change: Callable, message: str
):
    """Rollouts of two images in one answer; a FIFO that is waited for; or weights that are read,
    for minutes, before that is noticed."""
    before = photos.journal.read_bytes()
    change(photos.folder / "b.png")
    monkeypatch.setattr(Step3VL, "from_preset", None)
    code, out, err = photos("--resume")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(f"{message}.* has rollouts of it: restore the file or choose another", err)
    assert photos.journal.read_bytes() == before


def test_an_image_that_changes_during_the_run(photos: Call, monkeypatch: pytest.MonkeyPatch):
    """An image that changes after the check and before it is loaded: old and new rollouts mixed."""
    check = ImageFiles.check

    def change(self: ImageFiles, questions: list) -> None:
        check(self, questions)
        _photo(photos.folder / "b.png", (50, 30), "blue")

    monkeypatch.setattr(ImageFiles, "check", change)
    code, _, err = photos("--resume")
    assert (code, "failed: line 1: image " in err, "b.png has changed" in err) == (1, True, True)
    results = photos.results()
    assert [result["failed"] for result in results] == [True, False, False]


def test_a_problem_without_rollouts_may_have_another_image(photos: Call):
    """A refusal, though no rollout has seen the image; also after a kill in the write of the
    images' hashes and the first rollout."""
    lines = photos.journal.read_text().splitlines(keepends=True)
    photos.journal.write_text("".join([*lines[:2], lines[2][:40]]))
    _photo(photos.folder / "b.png", (50, 30), "blue")
    assert photos("--resume")[0] == 0
    new = photos.folder / "new.jsonl"
    assert photos(out=new)[0] == 0
    assert photos.out.read_bytes() == new.read_bytes()
    assert photos("--resume")[0] == 0  # the hashes are those of the new image


def test_a_mended_image_gives_another_answer_line(call: Call):
    """A journal that still shows the error of a problem that a resumed run has answered."""
    call.ask({"question": "How many?", "image": "photo.png"})
    (call.folder / "photo.png").write_bytes(b"not an image")
    assert call()[0] == 1
    _photo(call.folder / "photo.png", (40, 30))
    for _ in range(2):
        assert call("--resume")[0] == 0
    lines = [json.loads(line) for line in call.journal.read_text().splitlines()]
    errors = [line["error"] for line in lines if line["kind"] == "answer"]
    assert (len(errors), errors[0] is None, errors[1]) == (2, False, None)


@pytest.fixture
def checkpoint(call: Call) -> Path:
    """A checkpoint, with which a run was begun."""
    path = call.folder / "checkpoint"
    Step3VL.from_preset("tiny").save_pretrained(path)
    (path / "README.md").write_text("about it")
    call.ask({"question": "Who?"})
    assert call("--model", str(path))[0] == 0
    call.out.unlink()
    return path


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "model-00001-of-00001.safetensors"]
)
def test_another_checkpoint_is_not_resumed(call: Call, checkpoint: Path, name: str):
    """Rollouts of two models in one file, since the checkpoint's path is the same; or a refusal
    that does not name the file that changed, or comes after weights were read."""
    data = bytearray((checkpoint / name).read_bytes())
    data[-1:] = b" " if name.endswith("json") else bytes([data[-1] ^ 1])
    (checkpoint / name).write_bytes(data)
    code, out, err = call("--resume", "--model", str(checkpoint))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"was started with model {name} 'sha256 " in err
    assert not call.out.exists()


def test_a_checkpoint_that_was_moved_is_resumed(call: Call, checkpoint: Path):
    """A comparison of paths, of times, or of files that the model is not read from."""
    moved = checkpoint.rename(call.folder / "moved")
    for file in moved.iterdir():
        os.utime(file, (0, 0))
    (moved / "README.md").write_text("more about it")
    assert call("--resume", "--model", str(moved))[0] == 0
    (moved / "added_tokens.json").write_text("{}")
    code, _, err = call("--resume", "--model", str(moved))
    assert (code, "model added_tokens.json None, which is 'sha256" in err) == (2, True)


def test_large_files_are_compared_by_size_and_time(
    call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """Shards of gigabytes that are hashed, for minutes, or not compared at all."""
    monkeypatch.setattr(inputs, "MAX_HASHED", 10**6)
    out, shard = call.folder / "large.jsonl", checkpoint / "model-00001-of-00001.safetensors"
    assert call("--model", str(checkpoint), out=out)[0] == 0
    assert call("--model", str(checkpoint), "--resume", out=out)[0] == 0
    time = shard.stat().st_mtime_ns + 1000
    os.utime(shard, ns=(time, time))
    code, _, err = call("--model", str(checkpoint), "--resume", out=out)
    assert (code, f"{shard.name} '{shard.stat().st_size} bytes, modified" in err) == (2, True)


def test_every_file_that_a_model_is_read_from_is_compared(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """A file that reading a checkpoint opens, and a resumed run does not compare."""
    (checkpoint / "additional_chat_templates").mkdir()
    texts = ["chat_template.jinja", "additional_chat_templates/short.jinja"]
    jsons = ["generation_config", "special_tokens_map", "added_tokens", "processor_config"]
    for name in texts:
        (checkpoint / name).write_text("{{ messages }}")
    for name in jsons:
        (checkpoint / f"{name}.json").write_text("{}")
    opened, real = set(), io.open

    def spy(file: object, *options: object, **more: object) -> object:
        opened.add(str(file))
        return real(file, *options, **more)

    monkeypatch.setattr(io, "open", spy)
    monkeypatch.setattr(builtins, "open", spy)
    assert Step3VL.from_pretrained(checkpoint).tokenizer.chat_templates
    files = {file for file in opened if file.startswith(f"{checkpoint}/")}
    assert {f"{checkpoint}/{name}" for name in (*texts, "added_tokens.json")} <= files
    assert files <= set(map(str, source_files(checkpoint)))
