"""Renders a chat template with all kinds of conversations, in a process of its own and with limits.

A chat template is a program that came with a download. It runs in jinja2's sandbox, which keeps it from files and
attributes but not from looping or growing without end, so it also runs in a process of its own with a limit on
processor time and memory. Names, filters and flags are those that transformers gives a template; the date is fixed, so
that nothing here depends on the day.

Source: transformers 5.23 `utils/chat_template_utils.py` (`_compile_jinja_template`, `render_jinja_template`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the other process starts in half the time without numpy
    from pocketquant.model import Value

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_OUTPUT_CHARACTERS = 1 << 20
MAX_CPU_SECONDS = 5
MAX_WALL_SECONDS = 120  # only where the system has no limit on processor time, or is far too busy
MAX_MEMORY_BYTES = 1 << 30
_DATE = datetime(2026, 1, 1, 12, 0, 0)
_KEY = "tokenizer.chat_template"
_START = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from pocketquant.texts import chat_template
chat_template._serve()
"""

RENDERED, REFUSED, FAILED, BROKEN, RUNAWAY = "rendered", "refused", "failed", "broken", "runaway"
"""It worked; the template said no (`raise_exception`); it crashed; it is no template; it exceeded a limit."""


@dataclass(frozen=True)
class Case:
    """One conversation.

    Attributes:
        name: what it is called in messages, after "with".
        messages: as chat APIs take them.
        variables: what a runtime passes besides: tools, switches.
        is_required: a template that does not render it is of no use.
        shows: words of the conversation that should turn up in the text.
    """

    name: str
    messages: tuple[Mapping[str, Any], ...]
    variables: Mapping[str, Any]
    is_required: bool
    shows: tuple[str, ...]


@dataclass(frozen=True)
class Rendering:
    """What came of one case: `text` if it was rendered, else the template's line (None if unknown) and the reason."""

    case: str
    outcome: str
    text: str = ""
    line: int | None = None
    message: str = ""


@dataclass(frozen=True)
class TemplateProblem:
    """One finding about a template.

    `level` is "error", or for a case that a template may do without: "crash", "refusal" (it raised on purpose) or
    "silence" (it rendered and left something out).
    """

    level: str
    text: str


_SYSTEM = {"role": "system", "content": "Answer in marigold."}
_USER = {"role": "user", "content": "What is a quokka?"}
_ASSISTANT = {"role": "assistant", "content": "A small wallaby."}
_THOUGHT = {**_ASSISTANT, "reasoning_content": "It lives on Rottnest."}
_AGAIN = {"role": "user", "content": "And a numbat?"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "get_forecast",
        "description": "Tomorrow's weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "A city"}},
            "required": ["city"],
        },
    },
}


def _call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_forecast", "arguments": {"city": city}}}


def _result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "get_forecast", "content": text}


_CALLING = ({"role": "assistant", "content": "", "tool_calls": [_call("Perth")]}, _result("sunny spells"))
_CALLING_TWICE = (
    {"role": "assistant", "content": "", "tool_calls": [_call("Perth"), _call("Hobart")]},
    _result("sunny spells"),
    _result("light drizzle"),
)
_IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Whose burrow is this?"}]}
IMAGES = "an image"
_PROMPT = {"add_generation_prompt": True}
_TOOLS = {"tools": [_TOOL], "add_generation_prompt": True}

CASES = (
    Case("a system message, a question and an answer", (_SYSTEM, _USER, _ASSISTANT), {}, True, ("quokka", "wallaby")),
    Case("several turns", (_SYSTEM, _USER, _ASSISTANT, _AGAIN), _PROMPT, True, ("quokka", "wallaby", "numbat")),
    Case("the generation prompt", (_SYSTEM, _USER), _PROMPT, True, ("marigold", "quokka")),
    Case("no system message", (_USER,), _PROMPT, True, ("quokka",)),
    Case("thinking on", (_USER,), {**_PROMPT, "enable_thinking": True}, True, ("quokka",)),
    Case("thinking off", (_USER,), {**_PROMPT, "enable_thinking": False}, True, ("quokka",)),
    Case("an earlier thought", (_USER, _THOUGHT, _AGAIN), _PROMPT, False, ("wallaby", "numbat")),
    Case("tools", (_SYSTEM, _USER), _TOOLS, False, ("get_forecast", "quokka")),
    Case("a tool call and its result", (_USER, *_CALLING), _TOOLS, False, ("Perth", "sunny spells")),
    Case(
        "two tool calls and their results",
        (_USER, *_CALLING_TWICE, _ASSISTANT, _AGAIN),
        _TOOLS,
        False,
        ("Hobart", "light drizzle", "wallaby"),
    ),
    Case(IMAGES, (_SYSTEM, _IMAGE), _PROMPT, False, ("burrow",)),
)
"""Why these, and which are required: docs/decisions/chat-template-cases.md."""


def find_template_problems(metadata: Mapping[str, Value]) -> tuple[TemplateProblem, ...]:
    """Renders every chat template among a model's metadata; no template, no problem.

    A template that has a syntax error, exceeds a limit, or does not render a plain conversation is an error; what it
    makes of the other cases is said, and may well be meant. A template beside the
    default one (`tool_use`, `rag`) is made for some cases only, so there nothing but syntax and limits is an error.
    """
    problems: list[TemplateProblem] = []
    tokens = special_tokens(metadata)
    for key, value in metadata.items():
        if key != _KEY and not key.startswith(f"{_KEY}."):
            continue
        name = "chat template" + (f" {key[len(_KEY) + 1 :]!r}" if key != _KEY else "")
        if not isinstance(value.value, str):
            problems.append(TemplateProblem("error", f"{name}: no text"))
            continue
        renderings = render_cases(value.value, tuple(sorted(tokens.items())))
        problems += [
            problem
            for case, rendering in zip(CASES, renderings, strict=False)
            if (problem := _problem(name, case, rendering, may_refuse=key != _KEY))
        ]
    return tuple(problems)


def special_tokens(metadata: Mapping[str, Value]) -> dict[str, str]:
    """`bos_token` and the like -> text, for those that the metadata names."""
    listed = metadata.get("tokenizer.ggml.tokens")
    tokens = listed.value if listed is not None and listed.kind == "str[]" else []
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    numbers = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {
        f"{name}_token": tokens[number.value]
        for name, number in numbers.items()
        if number is not None and type(number.value) is int and 0 <= number.value < len(tokens)
    }


def _problem(name: str, case: Case, rendering: Rendering, *, may_refuse: bool) -> TemplateProblem | None:
    line = "" if rendering.line is None else f", line {rendering.line}"
    if rendering.outcome == BROKEN:
        return TemplateProblem("error", f"{name}{line}: {rendering.message}")
    place = f"{name}{line}, with {case.name}: "
    if rendering.outcome == RUNAWAY:
        return TemplateProblem("error", place + rendering.message)
    if rendering.outcome != RENDERED:
        # a template that joins texts crashes over a list of parts; that it reads no images is no fault
        optional = "refusal" if rendering.outcome == REFUSED or case.name == IMAGES else "crash"
        level = "error" if case.is_required and not may_refuse else optional
        return TemplateProblem(level, place + rendering.message)
    absent = [word for word in case.shows if word not in rendering.text]
    if not absent:
        return None
    return TemplateProblem("silence", f"{place}the text leaves out {', '.join(map(repr, absent))}")


@lru_cache(maxsize=64)
def render_cases(template: str, tokens: tuple[tuple[str, str], ...] = ()) -> tuple[Rendering, ...]:
    """Renders `CASES` in a process of its own.

    Args:
        template: jinja2 source.
        tokens: special tokens that the template may name: ("eos_token", "<|im_end|>").

    Returns:
        One per case, in order; fewer if the template is broken or ran away, and then the last one says so.
    """
    return _render_apart(template, tokens, CASES)


def render_conversations(
    template: str,
    tokens: Mapping[str, str],
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    variables: Mapping[str, Any] | None = None,
) -> tuple[Rendering, ...]:
    """Renders whole conversations in a process of its own; without a generation prompt, unless `variables` say so.

    Args:
        template: jinja2 source.
        tokens: special tokens that the template may name.
        conversations: lists of messages, as chat APIs take them.
        variables: what a runtime passes besides: tools, switches.

    Returns:
        As `render_cases`; each is named "conversation N", from 1.
    """
    cases = [
        Case(f"conversation {i}", tuple(each), variables or {}, True, ())
        for i, each in enumerate(conversations, start=1)
    ]
    return _render_apart(template, tuple(tokens.items()), cases)


def _render_apart(template: str, tokens: Sequence[tuple[str, str]], cases: Sequence[Case]) -> tuple[Rendering, ...]:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        return (Rendering(cases[0].name, BROKEN, message=f"{len(template)} characters; no chat template is so long"),)
    command = [sys.executable, "-I", "-c", _START, json.dumps(sys.path)]
    requested = [{"name": case.name, "messages": case.messages, "variables": case.variables} for case in cases]
    request = json.dumps({"template": template, "tokens": dict(tokens), "cases": requested}).encode()
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=MAX_WALL_SECONDS)
        output, status, trouble = done.stdout, done.returncode, done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as expired:
        output, status, trouble = expired.stdout or b"", -1, ""
    lines = [line for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
    renderings = [Rendering(**json.loads(line)) for line in lines]
    if status > 0 and not renderings:  # the process could not even start: this is ours, not the template's
        raise RuntimeError(f"the process that renders chat templates failed:\n{trouble[-2000:]}")
    is_over = len(renderings) == len(cases) or (renderings and renderings[-1].outcome in (BROKEN, RUNAWAY))
    if not is_over:
        message = f"takes more than {MAX_CPU_SECONDS} seconds or {MAX_MEMORY_BYTES >> 20} MiB of memory"
        renderings.append(Rendering(cases[len(renderings)].name, RUNAWAY, message=message))
    return tuple(renderings)


# ---------------------------------------------------------------- inside the other process


def _serve() -> None:
    request = json.load(sys.stdin)
    _limit_this_process()
    for each in request["cases"]:
        case = Case(each["name"], tuple(each["messages"]), each["variables"], True, ())
        rendering = _render(request["template"], case, request["tokens"])
        sys.stdout.write(json.dumps(rendering.__dict__) + "\n")
        sys.stdout.flush()
        if rendering.outcome in (BROKEN, RUNAWAY):
            return


def _limit_this_process() -> None:
    try:
        import resource
    except ImportError:  # no such limits on this system; the wall clock remains
        return
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, MAX_CPU_SECONDS),
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
    ):
        with suppress(ValueError, OSError):  # not every system has each of them
            resource.setrlimit(kind, (limit, limit))


def _render(source: str, case: Case, tokens: Mapping[str, str]) -> Rendering:
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        template = _environment().from_string(source)
        variables = {**tokens, "tools": None, "documents": None, "add_generation_prompt": False, **case.variables}
        pieces, length = [], 0
        for piece in template.generate(messages=[dict(message) for message in case.messages], **variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT_CHARACTERS:
                return Rendering(case.name, RUNAWAY, message=f"writes more than {MAX_OUTPUT_CHARACTERS} characters")
        return Rendering(case.name, RENDERED, "".join(pieces))
    except TemplateSyntaxError as error:
        return Rendering(case.name, BROKEN, line=error.lineno, message=f"syntax error: {error.message}")
    except MemoryError:
        return Rendering(case.name, RUNAWAY, message=f"takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory")
    except Exception as error:  # whatever a foreign program does wrong
        says_no = type(error) is TemplateError
        message = f"refused: {error}" if says_no else f"{type(error).__name__}: {error}"
        return Rendering(case.name, REFUSED if says_no else FAILED, line=_line_of(error), message=message[:500])


def _line_of(error: Exception) -> int | None:
    """The innermost line of the template in the traceback, which jinja2 rewrites to the template's own lines."""
    traceback, line = error.__traceback__, None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import ext, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant wrote, for training; what stands in it is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 jinja2 reads it so

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse_underscore(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")

    class PlainNamespace(Namespace):
        """A namespace without names that reach into Python, as transformers has it."""

        def __init__(*arguments: Any, **names: Any) -> None:
            self, *pairs = arguments  # so that `namespace(self=...)` works
            values = dict(*pairs, **names)
            for name in values:
                refuse_underscore(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_underscore(name)
            super().__setitem__(name, value)

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: _DATE.strftime(format)
    environment.globals["namespace"] = PlainNamespace
    return environment
