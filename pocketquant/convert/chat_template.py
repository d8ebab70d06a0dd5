"""A model's chat template: replaced if the user says so, rendered, and refused if it does not work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pocketquant.errors import TokenizerError, listing
from pocketquant.files.small import read_text
from pocketquant.model import Model, Value
from pocketquant.texts.chat_template import IMAGES, MAX_TEMPLATE_CHARACTERS, TemplateProblem, find_template_problems

_KEY = "tokenizer.chat_template"


def with_chat_template(model: Model, template: Path | str | None = None, *, refuse: bool = True) -> Model:
    """The model with its chat templates rendered and what they cannot do among its notes.

    Args:
        model: from a checkpoint or a GGUF.
        template: a file to take in place of the model's own templates, all of them; None to keep them.
        refuse: whether a template that does not render a plain conversation is an error or only a note. A template
            given as a file is always refused.

    Raises:
        TokenizerError: the file cannot be read, or a template is broken; the line and the case are named.
    """
    if template is not None:
        model = replace(model, metadata=_with_own(model, _read(Path(template))))
    problems = find_template_problems(model.metadata)
    errors = [problem.text for problem in problems if problem.level == "error"]
    if errors and (refuse or template is not None):
        raise TokenizerError(
            "the chat template does not work; mend it, or give another with --chat-template FILE:\n" + listing(errors)
        )
    notes = tuple(problem.text for problem in problems if problem.level != "silence" and not _is_text_only(problem))
    return replace(model, notes=(*model.notes, *notes))


def _is_text_only(problem: TemplateProblem) -> bool:
    """Whether the template only says that it reads no images, as every text model's may."""
    return problem.level == "refusal" and f"with {IMAGES}" in problem.text


def _with_own(model: Model, text: str) -> dict[str, Value]:
    kept = {key: value for key, value in model.metadata.items() if not key.startswith(_KEY)}
    return {**kept, _KEY: Value("str", text)}


def _read(path: Path) -> str:
    text = read_text(path, 4 * MAX_TEMPLATE_CHARACTERS, TokenizerError)
    if not text.strip():
        raise TokenizerError(f"{path}: empty, and no chat template; without --chat-template the source's own is kept")
    return text
