"""Domains, positions, the noise floor and conversations, on the embedded model through the real runtime."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketquant.errors import EvalError
from pocketquant.eval import compare
from pocketquant.eval.report.markdown import to_markdown
from pocketquant.gguf_file.opening import open_gguf
from pocketquant.llama.runtime import open_runtime
from pocketquant.texts.conversations import TEMPLATE, read_conversations, render_chat
from pocketquant.texts.corpus import Text, cut_corpus
from pocketquant.texts.embedded import domain_texts, read_texts

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
Recipe = Callable[[str], Path]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("pocketquant")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_domains_are_reported_one_by_one_and_together(demo_gguf: Recipe) -> None:
    arguments = ["eval", demo_gguf("q4_0"), "--reference", demo_gguf("f32"), "--text", "domains", "--context", 128]
    done = run(*arguments, "--chunks", 4, "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    domains = {each["domain"]: each for each in report["by_domain"]}
    assert set(domains) == {"chinese", "code", "dialogue", "german", "prose", "spanish"}
    assert report["tokens"] == sum(each["tokens"] for each in domains.values()) == 6 * 4 * 63
    klds = [each["metrics"]["kld"]["mean"] for each in domains.values()]
    assert report["metrics"]["kld"]["mean"] == pytest.approx(sum(klds) / 6)
    assert len(set(klds)) == 6
    for text in domain_texts():
        assert domains[text.domain]["file"]["sha256"] == hashlib.sha256(text.path.read_bytes()).hexdigest()
    # the embedded model has seen English conversations and no German
    losses = {name: each["metrics"]["bpb"]["reference"] for name, each in domains.items()}
    assert losses["dialogue"] < losses["german"]
    digests = report["provenance"]["chat_templates"]
    assert digests["model"] == digests["reference"] is not None
    shown = run(*arguments, "--chunks", 1).stdout
    assert "| domain | tokens |" in shown
    assert "| spanish | 63 |" in shown


def test_a_chat_file_is_rendered_with_the_models_template(demo_gguf: Recipe, tmp_path: Path) -> None:
    path, model = tmp_path / "talk.jsonl", demo_gguf("f32")
    talk = [{"role": "user", "content": "Where is Chad?"}, {"role": "assistant", "content": "In <b>Africa</b>."}]
    path.write_text(json.dumps({"messages": talk}) + "\n\n" + json.dumps(talk[:1]) + "\n", encoding="utf-8")
    text = render_chat(path, model)
    assert text.count("<|im_start|>user\nWhere is Chad?<|im_end|>") == 2
    assert text.count("<|im_start|>assistant") == 1
    with open_runtime(model, context=16, threads=1) as runtime:
        corpus = cut_corpus(path, runtime, context=16, chat=text)
        (start,) = runtime.tokenize("<|im_start|>", special=True)
        assert corpus.windows[0, 0] == start
        # as text it is several tokens
        assert len(runtime.tokenize("<|im_start|>")) > 1
        assert runtime.token_bytes([start, *runtime.tokenize("é€")]) == [12, *_lengths("é€", runtime)]


def _lengths(text: str, runtime: Any) -> list[int]:
    tokens = runtime.tokenize(text)
    lengths = runtime.token_bytes(tokens)
    assert sum(lengths) == len(text.encode())
    return lengths


def test_bits_per_byte_count_the_bytes_of_the_text(demo_gguf: Recipe, demo_text: Path, tmp_path: Path) -> None:
    with open_runtime(demo_gguf("f32"), context=64, threads=1) as runtime:
        text = demo_text.read_text(encoding="utf-8")[:3000]
        assert sum(runtime.token_bytes(runtime.tokenize(text))) == len(text.encode())
        path = tmp_path / "cut.txt"
        path.write_text(text, encoding="utf-8")
        windows = cut_corpus(path, runtime, context=64, chunks=8).windows
        n_bytes = sum(runtime.token_bytes(windows[:, 33:].ravel().tolist()))
    ppl, bpb = (
        getattr(compare(demo_gguf("q8_0"), demo_gguf("f32"), path, context=64, chunks=8).metrics, name)
        for name in ("ppl", "bpb")
    )
    assert bpb.reference == pytest.approx(math.log2(ppl.reference) * 8 * 31 / n_bytes)


def test_files_that_are_no_conversations_are_refused(demo_gguf: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text('{"messages": []}\nnot json\n[{"content": "x"}]\n{"messages": [{"role": "user"}]}\n')
    with pytest.raises(EvalError, match=r"(?s)line 1: not a list.*line 2: broken JSON.*line 3: not a list") as caught:
        read_conversations(path)
    assert "line 4" not in str(caught.value)
    path.write_text("\n")
    with pytest.raises(EvalError, match="0 conversations"):
        read_conversations(path)
    path.write_text('[{"role": "user", "content": 7}, {"role": "stranger", "content": "x"}]\n')
    assert TEMPLATE in open_gguf(demo_gguf("f32")).metadata
    with pytest.raises(EvalError, match="does not render every conversation"):
        render_chat(path, demo_gguf("f32"))


def test_positions_add_a_curve_and_change_no_other_number(demo_gguf: Recipe, demo_text: Path) -> None:
    files = demo_gguf("q4_0"), demo_gguf("f32")
    plain = compare(*files, demo_text, context=256, chunks=6, threads=2)
    curved = compare(*files, demo_text, context=256, chunks=6, threads=2, positions=True)
    assert plain.by_position is None
    assert [(bucket.low, bucket.high) for bucket in curved.by_position] == [
        (0, 16),
        (16, 32),
        (32, 64),
        (64, 128),
        (128, 255),
    ]
    assert [bucket.tokens for bucket in curved.by_position] == [6 * 16, 6 * 16, 6 * 32, 6 * 64, 6 * 127]
    assert curved.tokens == plain.tokens
    # other batches: equal but for the order of sums
    assert curved.metrics.kld.mean == pytest.approx(plain.metrics.kld.mean, rel=0.02)
    assert curved.by_position[-1].kld == pytest.approx(curved.metrics.kld.mean)
    assert all(0 < bucket.kld_se < bucket.kld for bucket in curved.by_position)
    assert sum(bucket.tokens for bucket in curved.by_confidence) == curved.tokens


def test_the_noise_floor_is_far_below_the_loss(demo_gguf: Recipe, demo_text: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = compare(
        demo_gguf("q4_0"),
        demo_gguf("f32"),
        demo_text,
        context=128,
        chunks=6,
        threads=2,
        noise_floor=True,
        progress=lambda done, total: steps.append((done, total)),
    )
    floor = report.noise_floor
    assert floor is not None
    assert (floor.rows, floor.windows, floor.tokens) == (21, 6, 6 * 63)
    assert 0 <= floor.metrics.kld.mean < report.metrics.kld.mean / 5
    assert floor.metrics.bpb is not None
    assert steps == [(i + 1, 12) for i in range(12)]
    assert "| noise floor |" in to_markdown(report)
    fused = compare(
        demo_gguf("q4_0"),
        demo_gguf("f32"),
        demo_text,
        context=128,
        chunks=6,
        threads=2,
        noise_floor=True,
        like="llama-perplexity",
    )
    assert fused.noise_floor is not None
    assert floor.metrics.kld.mean < fused.noise_floor.metrics.kld.mean < report.metrics.kld.mean / 5
    assert report.provenance.versions["llama_cpp_flash_attention"] == "off"
    assert fused.provenance.versions["llama_cpp_flash_attention"] == "auto"


def test_texts_are_named_by_stem_or_on_request(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.txt"
    odd.write_text("x")
    assert read_texts(["x/prose.txt", "german=y/z.txt", str(odd)]) == [
        Text("prose", Path("x/prose.txt")),
        Text("german", Path("y/z.txt")),
        Text("a=b", odd),
    ]
    with pytest.raises(EvalError, match="several texts are called a=b"):
        compare("m.gguf", "r.gguf", read_texts([str(odd), str(odd)]))
    with pytest.raises(EvalError, match="'perplex' are not known"):
        compare("m.gguf", "r.gguf", odd, like="perplex")


def test_the_texts_of_the_package_are_small_and_clean() -> None:
    texts = domain_texts()
    assert sum(text.path.stat().st_size for text in texts) < 60_000
    for text in texts:
        data = text.path.read_bytes()
        assert data.endswith(b"\n")
        assert b"\r" not in data
