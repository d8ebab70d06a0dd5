"""Chat templates render to the text that transformers renders, in every case."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from pocketquant.texts.chat_template import CASES, render_cases

# Most of what Qwen's own templates do: trimmed blocks, macros, namespaces, slices, filters, tool calls, thoughts.
TEMPLATE = """
{%- macro body(content) %}
    {%- if content is string %}{{ content }}{% else %}
        {%- for part in content %}
            {%- if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set state = namespace(last=messages|length - 1, tools=false) %}
{% if tools %}
    <tools>
    {% for tool in tools %}
{{ tool | tojson }}
    {% endfor %}
    {{ tools | tojson(indent=2) }}
    </tools>
{% endif %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and state.last == messages|length - 1 %}
        {%- set state.last = index %}{% break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}
    {%- if message.role == 'tool' %}{% set state.tools = true %}
<|im_start|>user
<tool_response>{{ body(message.content) }}</tool_response><|im_end|>
        {%- continue %}
    {%- endif %}
<|im_start|>{{ message.role }}
    {%- if message.reasoning_content is defined and loop.index0 != state.last %}
<think>{{ message.reasoning_content }}</think>
    {% endif %}
    {% generation %}{{ body(message.content) | trim }}{% endgeneration %}
    {%- for call in message.tool_calls or [] %}
<call>{{ call.function.name }} {{ call.function.arguments | tojson }}
{% for key, value in call.function.arguments|items %}{{ key }}={{ value }}{% endfor %}</call>
    {%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
SCRIPT = """
import json, sys
from transformers.utils.chat_template_utils import render_jinja_template
request = json.load(sys.stdin)
texts = []
for messages, variables in request["cases"]:
    tools = variables.pop("tools", None)
    rendered, _ = render_jinja_template([messages], tools=tools, chat_template=request["template"], **variables)
    texts.append(rendered[0])
json.dump(texts, sys.stdout)
"""


def test_every_case_renders_as_in_transformers(oracle_python: Path) -> None:
    cases = [(list(case.messages), dict(case.variables)) for case in CASES]
    request = json.dumps({"template": TEMPLATE, "cases": cases})
    done = subprocess.run([oracle_python, "-c", SCRIPT], input=request, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = render_cases(TEMPLATE)
    assert [rendering.message for rendering in ours] == [""] * len(CASES)
    for rendering, theirs in zip(ours, json.loads(done.stdout), strict=True):
        assert rendering.text == theirs, rendering.case
