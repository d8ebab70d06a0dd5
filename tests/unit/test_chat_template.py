"""Chat templates: rendered as transformers would, within limits, and refused with the line and the case."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from checkpoint_maker import make_checkpoint

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.errors import TokenizerError
from pocketquant.model import Value
from pocketquant.texts.chat_template import (
    BROKEN,
    CASES,
    FAILED,
    MAX_CPU_SECONDS,
    REFUSED,
    RENDERED,
    RUNAWAY,
    find_template_problems,
    render_cases,
    special_tokens,
)

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def with_template(folder: Path, template: str) -> Path:
    make_checkpoint(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def outcomes(template: str) -> dict[str, str]:
    return {rendering.case: rendering.outcome for rendering in render_cases(template)}


def test_the_environment_is_transformers() -> None:
    template = (
        "{%- for m in messages %}\n"
        "    {% if m.role == 'system' %}\n"
        "{% continue %}\n"
        "    {% endif %}\n"
        "{% generation %}{{ m.role }}{% endgeneration %}|\n"
        "{% endfor %}\n"
        "{{ {'ä': '<b>'} | tojson }} {{ strftime_now('%Y-%m-%d') }}"
        "{% set n = namespace(x=1) %}{% set n.x = 2 %} {{ n.x }}"
    )
    first = render_cases(template)[0]
    assert first.text == 'user|\nassistant|\n{"ä": "<b>"} 2026-01-01 2'


def test_every_case_gets_its_messages_tools_and_switches() -> None:
    template = "{{ messages | tojson }}{{ tools | tojson }}{{ add_generation_prompt }}{{ enable_thinking }}"
    texts = {rendering.case: rendering.text for rendering in render_cases(template)}
    assert len(texts) == len(CASES)
    assert texts["thinking on"].endswith("nullTrueTrue")
    assert texts["thinking off"].endswith("nullTrueFalse")
    assert '"get_forecast"' in texts["tools"]
    assert "nullTrue" not in texts["tools"]
    assert '"tool_calls"' in texts["two tool calls and their results"]
    assert '{"type": "image"}' in texts["an image"]
    assert '"reasoning_content"' in texts["an earlier thought"]


@pytest.mark.parametrize(
    ("template", "outcome", "line", "message"),
    [
        ("a\nb {% for m in %}", BROKEN, 2, "syntax error"),
        ("{% if %}", BROKEN, 1, "syntax error"),
        ("a\n\n{{ messages.nothing.at_all }}", FAILED, 3, "UndefinedError"),
        ("a\n{{ raise_exception('not today') }}", REFUSED, 2, "refused: not today"),
        ("{{ ''.__class__.__mro__ }}", FAILED, 1, "SecurityError"),
        ("{{ messages.append(1) }}", FAILED, 1, "SecurityError"),
        ("{{ namespace(__init__=1) }}", FAILED, 1, "SecurityError"),
        ("{% include '/etc/passwd' %}", FAILED, 1, "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}\n{{ f() }}", FAILED, 1, "RecursionError"),
        ("{% for i in range(99999999) %}{% endfor %}", FAILED, 1, "OverflowError"),
        ("{{ 'a' * 10 ** 10 }}", RUNAWAY, None, "memory"),
        ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", RUNAWAY, None, "characters"),
    ],
)
def test_what_goes_wrong_is_named_with_its_line(template: str, outcome: str, line: int | None, message: str) -> None:
    first = render_cases(template)[0]
    assert (first.outcome, first.line) == (outcome, line)
    assert message in first.message


def test_an_endless_template_does_not_hang() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    renderings = render_cases("{% if tools %}" + loop + "{% endif %}{{ messages[-1].content }}")
    assert time.monotonic() - started < 12 * MAX_CPU_SECONDS
    assert [rendering.outcome for rendering in renderings[:-1]] == [RENDERED] * 7
    assert (renderings[-1].case, renderings[-1].outcome) == ("tools", RUNAWAY)


def test_special_tokens_reach_the_template() -> None:
    metadata = {
        "tokenizer.ggml.tokens": Value("str[]", ["a", "<|end|>"]),
        "tokenizer.ggml.eos_token_id": Value("u32", 1),
        "tokenizer.ggml.padding_token_id": Value("u32", 7),
    }
    assert special_tokens(metadata) == {"eos_token": "<|end|>"}
    assert render_cases("{{ eos_token }}{{ bos_token }}", (("eos_token", "<|end|>"),))[0].text == "<|end|>"


def test_breaks_today_11_broken_chat_template_is_refused_with_line_and_case(tmp_path: Path) -> None:
    thinking = PLAIN + "\n{% if enable_thinking is false %}\n{{ messages.nothing.at_all }}{% endif %}"
    with pytest.raises(TokenizerError, match=r"chat template, line 5, with thinking off: UndefinedError"):
        open_model(with_template(tmp_path / "a", thinking))
    system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    with pytest.raises(
        TokenizerError, match=r"--chat-template FILE:\n.*line 1, with a system message.*: refused: no system"
    ):
        open_model(with_template(tmp_path / "b", system))
    with pytest.raises(TokenizerError, match=r"chat template, line 1: syntax error"):
        open_model(with_template(tmp_path / "c", "{% if %}"))


def test_cases_a_template_may_do_without_are_notes(tmp_path: Path) -> None:
    template = "{% if tools %}\n{{ raise_exception('no tools here') }}{% endif %}" + PLAIN
    notes = open_model(with_template(tmp_path / "c", template)).notes
    assert [note.split(":")[0] for note in notes] == [
        "chat template, line 2, with tools",
        "chat template, line 2, with a tool call and its result",
        "chat template, line 2, with two tool calls and their results",
    ]
    assert all("no tools here" in note for note in notes)


def test_a_template_that_passes_over_tools_is_no_fault(tmp_path: Path) -> None:
    model = open_model(with_template(tmp_path / "c", PLAIN))
    assert model.notes == ()
    silences = [problem for problem in find_template_problems(model.metadata) if problem.level == "silence"]
    assert "with tools: the text leaves out 'get_forecast'" in silences[0].text


def test_named_templates_may_refuse_a_plain_conversation(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tools_only = "{% if not tools %}{{ raise_exception('tools only') }}{% endif %}" + PLAIN
    settings["chat_template"] = [
        {"name": "default", "template": PLAIN},
        {"name": "tool_use", "template": tools_only},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    notes = open_model(folder).notes
    assert notes
    assert all(note.startswith("chat template 'tool_use', line 1, with ") for note in notes)
    settings["chat_template"][1]["template"] = "{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match="chat template 'tool_use', line 1: syntax error"):
        open_model(folder)


def test_another_template_takes_the_place_of_all(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "c", "{% if %}")
    own = tmp_path / "own.jinja"
    own.write_text(PLAIN + "{# mine #}")
    model = open_model(folder, chat_template=own)
    assert model.metadata["tokenizer.chat_template"].value == PLAIN + "{# mine #}"
    own.write_text("\n\n{{ 1 / 0 }}")
    with pytest.raises(TokenizerError, match=r"line 3, with a system message.*ZeroDivisionError"):
        open_model(folder, chat_template=own)
    own.write_text(" \n")
    with pytest.raises(TokenizerError, match=r"own\.jinja: empty"):
        open_model(folder, chat_template=own)
    with pytest.raises(TokenizerError, match="cannot be read"):
        open_model(folder, chat_template=tmp_path / "missing")


def test_a_broken_template_in_a_gguf_is_a_note_and_can_be_replaced(tmp_path: Path, checkpoint: Path) -> None:
    model = open_model(checkpoint)
    target, own = tmp_path / "m.gguf", tmp_path / "own.jinja"
    write(
        plan(model, open_recipe("bf16"), metadata_extra={"tokenizer.chat_template": Value("str", "{% if %}")}), target
    )
    assert open_model(target).notes == (
        "chat template, line 1: syntax error: Expected an expression, got 'end of statement block'",
    )
    own.write_text(PLAIN)
    opened = open_model(target, chat_template=own)
    assert (opened.notes, opened.metadata["tokenizer.chat_template"].value) == ((), PLAIN)
