"""Benchmark tasks of one's own for lm-evaluation-harness, made from the embedded evaluation text, as YAML and JSONL.

The embedded model gets many of them right, unlike a random one: it was trained on such text, not on this one.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from pocketquant.demo import text_path

CHOICE = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
fewshot_config:
  sampler: first_n
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""

WORD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{word}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
filter_list:
  - name: first-word
    filter:
      - function: regex
        regex_pattern: "^ ?([^ ]+)"
      - function: take_first
metric_list:
  - metric: exact_match
metadata:
  version: 1.0
"""

ROLLING = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
metadata:
  version: 1.0
"""


def passages(count: int, seed: int) -> list[tuple[str, str]]:
    """(100 to 200 characters, the five words after them), `count` pieces of paragraphs that do not overlap."""
    rng = random.Random(seed)
    text = text_path("evaluation").read_text(encoding="utf-8")
    found = []
    for paragraph in re.split(r"\n+|<\|[a-z_]+\|>|</?think>", text):
        words = paragraph.split()
        while True:
            length, at = rng.randint(100, 200), 0
            while at < len(words) and len(" ".join(words[:at])) < length:
                at += 1
            if len(words) < at + 5:
                break
            found.append((" ".join(words[:at]), " ".join(words[at : at + 5])))
            words = words[at + 5 :]
    return rng.sample(found, min(count, len(found)))


def write_tasks(folder: Path, *, items: int, seed: int = 3) -> Path:
    """Tasks `cloze` (four choices), `next_word` (written) and `whole_text` (rolling) with their data."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, found = random.Random(seed), passages(items, seed)
    choices: list[dict[str, Any]] = []
    for i, (context, right) in enumerate(found):
        others = [found[(i + step) % len(found)][1] for step in rng.sample(range(1, len(found)), 3)]
        label = rng.randrange(4)
        listed = [*others[:label], right, *others[label:]]
        choices.append({"context": context, "choices": listed, "label": label})
    words = [{"context": context, "word": right.split(" ")[0]} for context, right in found]
    texts = [{"text": f"{context} {right}"} for context, right in found]
    for name, template, rows in (
        ("cloze", CHOICE, choices),
        ("next_word", WORD, words),
        ("whole_text", ROLLING, texts),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(template.format(name=name, data=data), encoding="utf-8")
    return folder
