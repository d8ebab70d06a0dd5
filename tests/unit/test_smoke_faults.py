"""What counts as a fault of a written answer, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoint_maker import make_checkpoint, mtp_weights_for, text_config, weights_for

import pocketquant
from pocketquant.convert.checkpoint import open_mtp
from pocketquant.errors import EvalError
from pocketquant.eval.tasks.smoke import (
    FAULTS,
    PROMPTS,
    Prompt,
    compare_smoke,
    find_faults,
    has_loop,
    is_json,
    wrong_script_share,
)


def test_both_files_are_looked_at_before_one_answers(tmp_path: Path) -> None:
    """A model writes for minutes; a reference that cannot be run is known from its header."""
    config = text_config()
    folder = make_checkpoint(tmp_path / "m", weights=weights_for(config) | mtp_weights_for(config))
    good, sidecar = tmp_path / "m.gguf", tmp_path / "mtp-m.gguf"
    recipe = pocketquant.open_recipe("q8_0")
    pocketquant.write(pocketquant.plan(pocketquant.open_model(folder), recipe), good)
    pocketquant.write(pocketquant.plan(open_mtp(folder), recipe), sidecar)
    answered = []
    with pytest.raises(EvalError, match=r"mtp-m\.gguf: only a multi-token-prediction block"):
        compare_smoke(good, sidecar, progress=lambda done, total: answered.append(done))
    assert answered == []


ASKED = Prompt("What is a quokka?")
JSON = Prompt("Answer in JSON.", is_json=True)
CLOSED, OPEN = "<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>assistant\n<think>\n"


@pytest.mark.parametrize(
    "text",
    [
        "It is small. " * 9,
        "A list: " + "one two three four five six seven " * 4 + "one two thr",
        "no " * 24,
        "很" * 60,
        "因为天空是蓝色的。" * 7 + "因为",
    ],
)
def test_repetition_without_end_is_a_loop(text: str) -> None:
    assert has_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No. No. No.",
        "It is small. " * 3,
        "no " * 24 + "but then it goes on in other words and ends",
        "1. a cat\n2. a dog\n3. a cow\n4. a hen\n5. a pig\n6. a bee\n7. an ant\n8. an owl\n9. a fox\n10. an elk",
        "x = [0, 0, 0, 0, 0, 0]\n" + "-" * 40,
    ],
)
def test_lists_and_emphasis_are_no_loop(text: str) -> None:
    assert not has_loop(text)


def test_thinking_must_end_wherever_it_began() -> None:
    assert find_faults(ASKED, OPEN, "Let me see. It is", has_ended=False) == ("unclosed_thinking",)
    assert find_faults(ASKED, CLOSED, "<think>Let me see", has_ended=True) == ("unclosed_thinking",)
    assert find_faults(ASKED, OPEN, "Let me see.</think>A small wallaby.", has_ended=True) == ()
    assert find_faults(ASKED, CLOSED, "A small wallaby.", has_ended=True) == ()


def test_empty_means_nothing_was_said() -> None:
    assert find_faults(ASKED, CLOSED, " \n", has_ended=True) == ("empty",)
    assert find_faults(ASKED, OPEN, "I know.</think>\n", has_ended=True) == ("empty",)
    assert find_faults(ASKED, CLOSED, "", has_ended=False) == ()


def test_json_is_looked_for_behind_the_thinking_and_in_a_fence() -> None:
    assert find_faults(JSON, OPEN, 'A list.</think>\n{"name": "Ada"}', has_ended=True) == ()
    assert find_faults(JSON, CLOSED, 'Here:\n```json\n{"name": "Ada"}\n```', has_ended=True) == ()
    assert find_faults(JSON, CLOSED, '{"name": "Ada",}', has_ended=True) == ("invalid_json",)
    assert find_faults(ASKED, CLOSED, '{"name": "Ada",}', has_ended=True) == ()
    assert not is_json("[" * 100_000)


def test_scripts_are_those_of_the_question_and_latin() -> None:
    assert wrong_script_share("Le livre est sur la table, né à 5 µm.", ()) == 0
    assert wrong_script_share("天空是蓝色的", ("CJK",)) == 0
    assert wrong_script_share("天空是蓝色的", ()) == 1
    assert wrong_script_share("12 + 5 = 17", ()) == 0
    assert find_faults(ASKED, CLOSED, "A small 袋鼠 that lives 在澳大利亚的一个岛上", has_ended=True) == (
        "wrong_script",
    )
    assert find_faults(ASKED, CLOSED, "ok\ufffd\ufffd", has_ended=True) == ("wrong_script",)


def test_prompts_cover_every_fault() -> None:
    assert len(PROMPTS) == len({prompt.text for prompt in PROMPTS}) == 24
    assert sum(prompt.is_json for prompt in PROMPTS) >= 4
    assert {script for prompt in PROMPTS for script in prompt.scripts} >= {"CJK", "CYRILLIC"}
    assert len(FAULTS) == 5
