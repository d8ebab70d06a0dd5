"""Every reader of foreign files, with a good file for each: what `make test` and `make fuzz` drive with damaged inputs.

A reader is given one file that was changed, all others being good, and may do two things: read it, or raise a
`PocketquantError`. The expensive ones get a smaller share of the inputs.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from adapter_maker import make_adapter
from checkpoint_maker import make_checkpoint, text_config, weights_for, write_safetensors
from pack_maker import write_pack
from quantized_schemes import SCHEMES, make_quantized_checkpoints
from report_maker import make_evaluation, make_tasks
from statistics_maker import make_statistics
from vision_maker import make_vision_checkpoint

import pocketquant
from pocketquant.calibration.importance import ImportanceSums, read_importance, write_sums
from pocketquant.calibration.statistics import INPUT, open_statistics
from pocketquant.check import check_gguf
from pocketquant.convert.adapter import open_adapter
from pocketquant.convert.chat_template import with_chat_template
from pocketquant.convert.checkpoint import open_checkpoint
from pocketquant.convert.modelscope import _entries
from pocketquant.convert.vision import open_vision
from pocketquant.eval.gate.decide import decide, read_report
from pocketquant.eval.gate.limits import read_limits
from pocketquant.eval.gate.output import table, to_json, to_junit, verdict_to_markdown
from pocketquant.eval.gate.report_diff import find_moved
from pocketquant.eval.packs.pack import read_pack
from pocketquant.eval.report.html import read_sheet, to_card, to_html
from pocketquant.gguf_file.header import encode_header
from pocketquant.gguf_file.reading import read_shards
from pocketquant.llama.vision import check_image
from pocketquant.model import Model
from pocketquant.quant.loss_table import LossTable, read_figures, write_losses
from pocketquant.quant.recipe_text import open_recipe
from pocketquant.texts.conversations import read_conversations
from pocketquant.texts.corpus import read_text

JSON, TEXT, BINARY, JSON_HEADER, PACK, GGUF = "json", "text", "binary", "json header", "pack", "gguf"
"""How a file is damaged besides at random: as a tree, by words, not at all, its header as a tree or a table."""


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        make: writes good files into an empty folder and returns the one to damage.
        read: reads it.
        share: of the inputs, compared with the others'.
    """

    name: str
    kind: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    share: float = 1.0


# ---------------------------------------------------------------- checkpoints

_TINY = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "hidden_size": 64} | {
    "intermediate_size": 64,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": {"mrope_section": [1, 1, 0], "rope_theta": 1e7, "rope_type": "default"},
}
_CARD = """---
license: apache-2.0
license_link: https://example.org/licence
language: [en, "no"]
tags:
- chat
- 'tiny'
base_model: org/Tiny-1M
datasets:
- org/words
- name: other
  url: https://example.org
model_name: Tiny
version: 1.5
---
# Tiny
"""
_SMALL = {
    "README.md": _CARD,
    "special_tokens_map.json": '{"eos_token": {"content": "<|im_end|>", "lstrip": false}, '
    '"pad_token": "<|endoftext|>"}',
    "added_tokens.json": '{"<think>": 260}',
    "chat_template.jinja": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "chat_template.json": '{"chat_template": "{{ messages[0].content }}"}',
    "additional_chat_templates/rag.jinja": "{{ documents }}",
    "hf_quant_config.json": '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}',
    "quantize_config.json": '{"bits": 4, "group_size": 64, "desc_act": true, "sym": false}',
}


def _text_file(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        make_checkpoint(folder, n_shards=2 if name.endswith(".index.json") else 1, **_TINY)
        if name in _SMALL:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(_SMALL[name])
        if "/" in name:
            (folder / "chat_template.jinja").write_text(_SMALL["chat_template.jinja"])
        return folder / name

    return make


def _read_checkpoint(path: Path) -> object:
    folder = path.parent.parent if path.parent.name == "additional_chat_templates" else path.parent
    return _header_of(open_checkpoint(folder, mtp="sidecar"))


def _header_of(model: Model | None) -> object:
    return None if model is None else encode_header(model.metadata, ())


def _vision(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return make_vision_checkpoint(folder) / name

    return make


def _quantized(scheme: str, name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        config = text_config(**_TINY)
        return make_quantized_checkpoints(folder, SCHEMES[scheme], model=(config, weights_for(config)))[0] / name

    return make


def _adapter(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        base = make_checkpoint(folder / "base", **_TINY)
        return make_adapter(folder / "lora", base, ranks={"q_proj": 2}) / name

    return make


def _mlx_adapter(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        make_checkpoint(folder / "base", **_TINY)
        (folder / "lora").mkdir()
        settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 1.5}}
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
        pair = {"lora_a": np.ones((64, 2), np.float32), "lora_b": np.ones((2, 64), np.float32)}
        tensors = {f"model.layers.0.mlp.up_proj.{side}": values for side, values in pair.items()}
        write_safetensors(folder / "lora" / "adapters.safetensors", tensors)
        return folder / "lora" / name

    return make


def _read_adapter(path: Path) -> object:
    return _header_of(open_checkpoint(path.parent.parent / "base", adapter=open_adapter(path.parent)))


# ---------------------------------------------------------------- GGUF and what is measured


def _make_gguf(folder: Path) -> Path:
    model = pocketquant.open_model(make_checkpoint(folder / "source", **_TINY))
    pocketquant.write(pocketquant.plan(model, pocketquant.open_recipe("q8_0")), folder / "model.gguf")
    return folder / "model.gguf"


def _read_gguf(path: Path) -> object:
    check_gguf(path)
    for _, header in read_shards(path):
        encode_header(header.metadata, ())
    return pocketquant.open_model(path)


def _make_matrix(folder: Path) -> Path:
    names = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
    sums = {name: np.full((1, 8), 3.0) for name in names}
    write_sums(ImportanceSums(sums, {name: np.array([2]) for name in names}, 512, ("text",)), folder / "m.gguf")
    return folder / "m.gguf"


def _make_statistics(folder: Path) -> Path:
    model = pocketquant.open_model(make_checkpoint(folder / "source", **_TINY))
    return make_statistics(model, folder / "model.stats", n_group=2, outputs=["embed/output"])


def _read_statistics(path: Path) -> object:
    statistics = open_statistics(path)
    _ = statistics.n_unseen_experts
    for name in statistics.entries:
        if name.endswith(INPUT):
            statistics.input(name.removesuffix(INPUT), 0)
    head = statistics.head()
    return None if head is None else head.hessians


def _make_report(folder: Path) -> Path:
    report = make_evaluation("Tiny-Q4_K", kld=0.01, texts=2, n_layer=2)
    columns = ("tokens", "bytes", "kld", "top1", "top5", "tv", "nll_model", "nll_reference")
    report["sums"] = [
        {"domain": f"domain {i}", "stream": f"s{i}"} | {name: [3 + i, 4, 5.5, 6] for name in columns} for i in range(2)
    ]
    report |= {"clusters": 8, "cluster_unit": "window", "non_finite_model": 0, "non_finite_reference": 0}
    report["provenance"] |= {"vocabulary": "v", "model_metadata": {"a": "b"}, "reference_pack": {"kind": "states"}}
    for name in ("report.json", "baseline.json"):
        (folder / name).write_text(json.dumps(report))
    (folder / "limits.toml").write_text(_LIMITS)
    return folder / "report.json"


_LIMITS = """confidence = 0.99
undecided = "warn"
[absolute]
kld_mean = 0.02
top1 = 0.95
domain_kld_mean = 0.5
tensor_rmse = 0.5
[baseline]
kld_mean_ratio = 1.05
kld_p99_ratio = 1.5
top1_drop = 0.005
domain_kld_mean_ratio = 1.2
tensor_rmse_ratio = 1.5
allow_metadata = ["general.name"]
"""


def _judge(path: Path) -> object:
    report, baseline = (read_report(path.parent / name) for name in ("report.json", "baseline.json"))
    verdict = decide(report, read_limits(path.parent / "limits.toml"), baseline)
    moved = find_moved(report, baseline)
    ElementTree.fromstring(to_junit(verdict, moved).encode())
    verdict_to_markdown(verdict, moved).encode()
    return json.dumps(to_json(verdict, moved)), table(verdict)


def _show(path: Path) -> object:
    sheet = read_sheet([path])
    return to_html(sheet).encode(), to_card(sheet).encode()


def _make_release(folder: Path) -> Path:
    variants = [
        {"file": f"{name}.gguf", "file_bytes": 9, "recipe": name, "evaluation": make_evaluation(name, kld=k, size=s)}
        for name, k, s in (("q4_k", 0.01, 9), ("q8_0", 0.001, 20))
    ]
    source = {"name": "Tiny", "given": "Tiny", "n_weights": 1000, "notes": ["a note"]}
    release = {"schema": "pocketquant.make/1", "source": source, "variants": variants, "command": ["make", "Tiny"]}
    release |= {"importance": {"file": "m.gguf", "datasets": ["text"]}, "sidecars": [{"file": "x", "file_bytes": 3}]}
    return _written(folder / "release.json", json.dumps(release))


def _make_tasks(folder: Path) -> Path:
    (folder / "report.json").write_text(json.dumps(make_evaluation("Tiny", kld=0.01)))
    return _written(folder / "tasks.json", json.dumps(make_tasks()))


def _make_losses(folder: Path) -> Path:
    write_losses(LossTable("x", "0" * 64, {"blk.0.attn_q.weight": {"Q4_K": 0.1, "Q8_0": 0.01}}, {}), folder / "l.json")
    return folder / "l.json"


def _written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _png() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b"")


_JPEG = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffc0000b080001000201011100ffd9")
_MESSAGES = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": [{"id": 1}]}]'
_LISTING = {"Data": {"Files": [{"Path": "config.json", "Size": 9, "Sha256": "0" * 64, "Type": "blob"}]}}


def _package_file(name: str) -> Callable[[Path], Path]:
    source = Path(pocketquant.__file__).parent / "quant" / name
    return lambda folder: _written(folder / "table.toml", source.read_bytes())


def _render(path: Path) -> object:
    return with_chat_template(Model("qwen35", {}, (), {}), path)


READERS = (
    *(
        Reader(f"checkpoint {name}", JSON, _text_file(name), _read_checkpoint, 1.5)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    ),
    *(
        Reader(f"checkpoint {name}", TEXT if name.endswith((".md", ".jinja")) else JSON, _text_file(name), read)
        for name, read in (
            *((name, _read_checkpoint) for name in _SMALL),
            ("model.safetensors.index.json", _read_checkpoint),
        )
    ),
    Reader("safetensors", JSON_HEADER, _text_file("model.safetensors"), _read_checkpoint, 1.5),
    Reader("vision config.json", JSON, _vision("config.json"), lambda path: _header_of(open_vision(path.parent))),
    Reader(
        "preprocessor_config.json",
        JSON,
        _vision("preprocessor_config.json"),
        lambda path: _header_of(open_vision(path.parent)),
    ),
    Reader("quantized config.json", JSON, _quantized("gptq", "config.json"), _read_checkpoint, 0.5),
    Reader("bitsandbytes", JSON_HEADER, _quantized("bitsandbytes nf4", "model.safetensors"), _read_checkpoint, 0.5),
    Reader("adapter_config.json", JSON, _adapter("adapter_config.json"), _read_adapter),
    Reader("adapter_model.safetensors", JSON_HEADER, _adapter("adapter_model.safetensors"), _read_adapter),
    Reader("adapter_config.json, mlx-lm's", JSON, _mlx_adapter("adapter_config.json"), _read_adapter),
    Reader("adapters.safetensors", JSON_HEADER, _mlx_adapter("adapters.safetensors"), _read_adapter),
    Reader("GGUF", GGUF, _make_gguf, _read_gguf, 1.5),
    Reader("importance matrix", GGUF, _make_matrix, read_importance),
    Reader(
        "importance matrix, old", BINARY, lambda folder: _written(folder / "m.dat", bytes(16)), read_importance, 0.1
    ),
    Reader("statistics", JSON_HEADER, _make_statistics, _read_statistics),
    Reader("reference pack", PACK, lambda folder: write_pack(folder / "a.pqref"), read_pack),
    Reader("report, judged", JSON, _make_report, _judge, 1.5),
    Reader("report, shown", JSON, _make_report, _show),
    Reader("release, shown", JSON, _make_release, _show),
    Reader("release, one file", JSON, _make_release, lambda path: read_report(path, "q4_k.gguf"), 0.5),
    Reader("tasks", JSON, _make_tasks, lambda path: read_sheet([path.parent / "report.json", path])),
    Reader("limits", TEXT, lambda folder: _make_report(folder).parent / "limits.toml", _judge),
    Reader("recipe", TEXT, _package_file("recipes/pocket_4bit.toml"), open_recipe),
    Reader("sensitivity", TEXT, _package_file("sensitivity.toml"), read_figures),
    Reader("losses", JSON, _make_losses, read_figures),
    Reader(
        "conversations", TEXT, lambda folder: _written(folder / "c.jsonl", f"{_MESSAGES}\n" * 3), read_conversations
    ),
    Reader("text", TEXT, lambda folder: _written(folder / "t.txt", "some words\nand more"), read_text, 0.2),
    Reader("image", BINARY, lambda folder: _written(folder / "i.png", _png()), check_image),
    Reader("image, JPEG", BINARY, lambda folder: _written(folder / "i.jpg", _JPEG), check_image),
    Reader(
        "hub's answer",
        JSON,
        lambda folder: _written(folder / "answer", json.dumps(_LISTING)),
        lambda path: _entries(path.read_bytes(), "ms://org/name"),
    ),
    Reader(
        "chat template, rendered",
        TEXT,
        lambda folder: _written(folder / "t.jinja", _SMALL["chat_template.jinja"]),
        _render,
        0.02,
    ),
)
