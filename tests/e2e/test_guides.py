"""Every command of the guides and explanations: understood by the command line, and run, on a small model.

Names and sizes are the guides' own, but for sizes that a small model cannot have. What needs a network, torch, a
cluster or another program is only checked for its options, with the reason in `NOT_RUN`.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer.main
from adapter_maker import make_adapter
from check_maker import make_trained_checkpoint
from typer.testing import CliRunner

from pocketquant import open_model, open_recipe, plan, write
from pocketquant.cli.app import app
from pocketquant.demo import text_path
from pocketquant.eval.gate.decide import decide, read_report
from pocketquant.eval.gate.limits import parse_limits

try:
    import tomllib
except ImportError:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs/guide").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "docs/fit.md", *sorted((ROOT / "docs/explain").glob("*.md"))]
NOT_RUN = {
    "Qwen/Qwen3.5-4B": "asks a hub",
    "arc_easy": "asks a hub for the tasks' data",
    "--tasks mine": "needs lm-evaluation-harness and a task of one's own; tests/e2e/test_tasks.py runs one",
    "dask://HOST": "needs a cluster; tests/e2e/test_cluster.py starts one",
    "--curvature": "needs torch",
    "pocketquant tune": "needs torch",
    "my.stats": "needs the statistics of a run with torch",
    "0.8b.stats": "the same",
    "with-gradients.stats": "the same",
    "--image": "needs pictures; tests/e2e/test_eval_vision.py draws some",
    "--sensitivity --text other.txt --groups 6 --out": "minutes; tests/e2e/test_sensitivity_cli.py runs it",
    "--sensitivity my.toml": "needs the file of that run",
    "pocketquant doctor": "examines the machine; tests of its own run it",
    "--chats": "writes long answers; tests/e2e/test_tasks.py runs it",
}
"""Part of a command -> why it is not run here."""
SHORTER = {
    "calibrate": ["--chunks", "1"],
    "make": ["--chunks", "2", "--calibrate-chunks", "1"],
    "sweep": ["--chunks", "1", "--imatrix", "none"],
}
"""Options that only save time."""

SENTENCES = "The river is wide here, and slow. Boats pass under the bridge; nobody looks up.\n"


def commands_of(page: Path) -> list[str]:
    """The commands of a page that are spelled out: no `[options]` in brackets, no list of several commands."""
    found, is_fenced = [], False
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        is_fenced ^= line.startswith("```")
        match = re.match(r" *(?:\.pq/bin/)?(pocketquant [a-z].*?)(?:\s+#.*)?$", line)
        if match and (is_fenced or line.startswith("    ")) and " | " not in match[1]:
            found.append(re.sub(r" \[--[^\]]*\]", "", match[1]))
    return found


def words_of(command: str) -> tuple[list[str], str | None]:
    """Words of a command after the program's name, and the file that its output goes to."""
    words = shlex.split(command)[1:]
    if ">" in words:
        at = words.index(">")
        return words[:at], words[at + 1]
    return words, None


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint, and GGUFs and texts of every kind that the guides name."""
    folder = tmp_path_factory.mktemp("files")
    found = {"checkpoint": make_trained_checkpoint(folder / "c")}
    model = open_model(found["checkpoint"])
    for recipe in ("f32", "bf16", "q8_0", "q4_k_m"):
        write(plan(model, open_recipe(recipe)), folder / f"{recipe}.gguf")
        found[recipe] = folder / f"{recipe}.gguf"
    found["lora"] = make_adapter(folder / "lora", found["checkpoint"])
    return found


@pytest.fixture
def world(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the guides take for granted."""
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen3.5-4B", "my-model", "my-finetune", "SRC"):
        (tmp_path / name).symlink_to(files["checkpoint"])
    shutil.copytree(files["lora"], tmp_path / "my-lora")
    kinds = {"BF16": "bf16", "F32": "f32", "Q4_K_M": "q4_k_m", "Q4": "q4_k_m"}
    for name, kind in kinds.items():
        for model in ("model", "Qwen3.5-4B"):
            shutil.copy(files[kind], tmp_path / f"{model}-{name}.gguf")
    shutil.copy(files["q8_0"], tmp_path / "Qwen3.5-4B.gguf")
    for name, kind in {"ref": "f32", "a": "q4_k_m", "b": "q8_0", "candidate": "q4_k_m", "model": "q8_0"}.items():
        shutil.copy(files[kind], tmp_path / f"{name}.gguf")
    for i, name in enumerate(("text", "broad", "book", "prose", "code", "calibration", "some-text", "other", "notes")):
        (tmp_path / f"{name}.txt").write_text(f"{name} {i}\n" + SENTENCES * (16 + i))
    turns = '{"messages": [{"role": "user", "content": "%s"}]}\n' % ("hello there " * 60)
    (tmp_path / "chat.jsonl").write_text(turns * 4)
    return tmp_path


def fitting(words: list[str], size: int) -> list[str]:
    """The words with sizes that the small model can have in place of the large one's, each a little smaller."""
    sizes = {"--target-size": size, "--split-max-size": size // 3}
    return [
        str(sizes[before] - 4096 * i) if before in sizes else word
        for i, (before, word) in enumerate(zip(["", *words], words, strict=False))
    ]


def shortened(words: list[str]) -> list[str]:
    extra = SHORTER.get(words[0], [])
    if "domains" in words and words[0] == "eval":
        extra = ["--chunks", "1"]
    return words + [word for word in extra if word not in words]


def test_a_command_is_one_that_is_set_apart(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "pocketquant is prose\n\n    pocketquant inspect a  # why\n\n```sh\npocketquant check b \\\n  --json\n```\n"
    )
    assert commands_of(page) == ["pocketquant inspect a", "pocketquant check b    --json"]


def test_the_guides_have_commands() -> None:
    assert {page.stem for page in GUIDES if len(commands_of(page)) > 4} >= {
        "README",
        "gate-in-ci",
        "least-loss",
        "make-my-file",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_understood(page: Path, world: Path) -> None:
    root = typer.main.get_command(app)
    for command in commands_of(page):
        words, _ = words_of(command)
        context: Any = root.make_context("pocketquant", list(words), resilient_parsing=False)
        name, inner, rest = root.resolve_command(context, [*context._protected_args, *context.args])  # type: ignore[attr-defined]
        if hasattr(inner, "commands"):
            context = inner.make_context(name, rest, parent=context)
            name, inner, rest = inner.resolve_command(context, [*context._protected_args, *context.args])
        inner.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, world: Path, files: dict[str, Path]) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    size = plan(open_model(files["checkpoint"]), open_recipe("q5_k_m")).file_bytes
    if page.stem == "README":
        (world / "limits.toml").write_text("[absolute]\nkld_mean = 10\n[baseline]\nkld_mean_ratio = 1.05\n")
    ran = 0
    for command in commands_of(page):
        if any(part in command for part in NOT_RUN):
            continue
        words, target = words_of(command)
        if "--baseline" in words and not (world / "accepted.json").exists():
            shutil.copy(world / words[1], world / "accepted.json")  # `cp report.json accepted.json`, in the guide
        words = [_existing(word, world) for word in shortened(fitting(words, size))]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{command}\n{' '.join(words)}\n{result.output}\n{result.exception!r}"
        if target is not None:
            (world / target).write_text(result.stdout, encoding="utf-8")
        ran += 1
    assert ran or all(any(part in command for part in NOT_RUN) for command in commands_of(page))


def _existing(word: str, world: Path) -> str:
    """The first shard under whatever number of shards there is."""
    match = re.fullmatch(r"(.+-00001-of-)\d{5}\.gguf", word)
    return next((path.name for path in world.glob(f"{match[1]}*.gguf")), word) if match else word


def test_the_limits_of_the_guide_can_be_held_against_its_own_pack(world: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    page = ROOT / "docs/guide/gate-in-ci.md"
    for command in commands_of(page)[:2]:
        words, target = words_of(command)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        if target:
            (world / target).write_text(result.stdout, encoding="utf-8")
    [block] = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    limits = parse_limits(tomllib.loads(block), page.name)
    report = read_report(world / "report.json")
    assert len(decide(report, limits, report).decisions) >= len(limits.absolute) + len(limits.baseline)


def test_how_to_run_it_again_runs(world: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a page of `make`, in the folder of its files."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    words = [
        "make",
        "Qwen3.5-4B",
        "--out",
        "out",
        "-r",
        "q8_0",
        "--chunks",
        "2",
        "--imatrix",
        "none",
        "--context",
        "64",
    ]
    monkeypatch.setattr("sys.argv", ["pocketquant", *words])
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    card = (world / "out/report.md").read_text(encoding="utf-8")
    steps = [
        line for line in card.partition("## How to run it again")[2].splitlines() if line.startswith("pocketquant ")
    ]
    assert [step.split()[1] for step in steps] == ["make", "convert", "eval"]
    monkeypatch.chdir(world / "out")
    (world / "out/Qwen3.5-4B").symlink_to(files["checkpoint"])
    for step in steps:
        words, target = words_of(step)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{step}\n{result.output}\n{result.exception!r}"
        if target is not None:
            Path(target).write_text(result.stdout, encoding="utf-8")
    assert (world / "out/again/Qwen3.5-4B-Q8_0.gguf").exists() or list((world / "out/again").glob("*.gguf"))
    reports = [read_report(world / "out" / name) for name in ("report.json", "q8_0.json")]
    assert reports[0].number("metrics", "kld", "mean") == reports[1].number("metrics", "kld", "mean")
    assert text_path("evaluation").exists()
