"""Two vision towers on the same images, read from image files."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from vision_maker import make_vision_checkpoint, picture, vision_config

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.convert.vision import open_vision
from pocketquant.errors import EvalError
from pocketquant.eval.vision import VisionSettings, compare_towers
from pocketquant.llama.vision import check_image, open_vision_runtime

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
COMMAND = str(Path(sys.executable).with_name("pocketquant"))


def write_png(path: Path, image: np.ndarray) -> Path:
    height, width, _ = image.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + line.tobytes() for line in image)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pieces = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(pieces))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    wide = vision_config(hidden_size=256, intermediate_size=512)  # K-quants stay K-quants
    checkpoint = make_vision_checkpoint(folder / "Tiny-1M", vision=wide, dtype="BF16")
    tower = open_vision(checkpoint)
    assert tower is not None
    write(plan(open_model(checkpoint), open_recipe("f32")), folder / "text.gguf")
    for recipe in ("f32", "q8_0", "q4_k_m"):
        write(plan(tower, open_recipe(recipe)), folder / f"mmproj-{recipe}.gguf")
    write_png(folder / "first.png", picture(96, 160, seed=1))
    write_png(folder / "second.png", picture(96, 96, seed=2))
    return folder


def test_smaller_towers_cost_more(files: Path) -> None:
    images = [files / "first.png", files / "second.png"]
    reports = {
        recipe: compare_towers(
            files / "text.gguf",
            files / f"mmproj-{recipe}.gguf",
            files / "mmproj-f32.gguf",
            images,
            VisionSettings(answer_tokens=6, context=128, threads=1),
        )
        for recipe in ("f32", "q8_0", "q4_k_m")
    }
    same, eight, four = reports["f32"], reports["q8_0"], reports["q4_k_m"]
    assert same.kld_mean == 0
    assert same.cosine_mean == pytest.approx(1, abs=1e-12)
    assert 0 < eight.kld_mean < four.kld_mean
    assert 1 > eight.cosine_mean > four.cosine_mean > 0.9
    assert eight.kld_standard_error is not None
    for result, (height, width) in zip(four.images, ((96, 160), (96, 96)), strict=True):
        assert (result.height, result.width) == (height, width)
        assert result.image_tokens == height * width // 1024
        assert result.cosine_min <= result.cosine_mean
        assert 0 < result.kld_mean <= result.kld_max
        assert 1 <= result.answer_tokens <= 6
    # the answer is the reference's, whatever is judged
    assert [each.answer for each in eight.images] == [each.answer for each in four.images]


def test_following_an_answer_equals_writing_it(files: Path) -> None:
    prompt = ["A ", picture(64, 96, seed=2), " shows"]
    with open_vision_runtime(files / "text.gguf", files / "mmproj-f32.gguf", context=128, threads=1) as runtime:
        tokens = runtime.answer(prompt, 6)
        rows = list(runtime.follow(prompt, tokens))
        assert [int(row.argmax()) for row in rows] == tokens
        assert np.array_equal(rows[0], runtime.logits(prompt))
        with pytest.raises(ValueError, match="do not fit a window of 128"):
            runtime.answer(prompt, 200)


def test_image_files_are_read_as_they_are(files: Path) -> None:
    with open_vision_runtime(files / "text.gguf", files / "mmproj-f32.gguf", context=128, threads=1) as runtime:
        assert np.array_equal(runtime.read_image(files / "first.png"), picture(96, 160, seed=1))


def test_what_is_no_image_or_too_large_is_refused(files: Path, tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    huge = tmp_path / "huge.png"
    huge.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header)
    jpeg = tmp_path / "huge.jpg"  # a table, then a frame of 65,000 x 60,000
    jpeg.write_bytes(
        b"\xff\xd8\xff\xdb\x00\x04\x00\x00\xff\xc0\x00\x11\x08" + struct.pack(">HH", 60_000, 65_000) + b"\0" * 9
    )
    text = tmp_path / "text.png"
    text.write_text("not an image")
    (tmp_path / "empty.png").touch()
    for path, message in (
        (huge, "100000 x 100000 pixels"),
        (jpeg, "65000 x 60000 pixels"),
        (text, "no PNG or JPEG"),
        (tmp_path / "empty.png", "no PNG or JPEG"),
        (tmp_path / "absent.png", "No such file"),
    ):
        with pytest.raises(EvalError, match=message):
            check_image(path)
    good = (files / "first.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    with open_vision_runtime(files / "text.gguf", files / "mmproj-f32.gguf", context=128, threads=1) as runtime:
        with pytest.raises(EvalError, match="cannot read it as an image"):
            runtime.read_image(tmp_path / "cut.png")


def test_the_command_prints_numbers_for_each_image(files: Path) -> None:
    arguments = [COMMAND, "eval-vision", files / "text.gguf", "--mmproj", files / "mmproj-q4_k_m.gguf"]
    arguments += ["--reference-mmproj", files / "mmproj-f32.gguf", "--image", files / "first.png"]
    arguments += ["--context", "128", "--threads", "1", "--answer-tokens", "4", "--json"]
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "pocketquant.vision/1"
    assert report["images"][0]["image"]["name"] == "first.png"
    assert report["kld_mean"] > 0
    arguments[-2] = "500"
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    assert done.returncode == 2
    assert "do not fit a context of 128" in done.stderr
