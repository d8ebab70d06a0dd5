"""`tasks`, `smoke` and `eval-vision`: what quantization costs on benchmarks, on free answers, and on images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketquant.cli.screen import headed, print_json, print_table, say, step_progress

if TYPE_CHECKING:
    from pocketquant.eval.tasks.compare import TasksReport
    from pocketquant.eval.tasks.paired import Paired
    from pocketquant.eval.tasks.smoke import SmokeReport

Gguf = Annotated[Path, typer.Argument(metavar="GGUF", help="The file to judge.")]
Reference = Annotated[Path, typer.Option("--reference", metavar="GGUF", help="Full precision of the same checkpoint.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="Threads; default: all processors.")]
GpuLayers = Annotated[int, typer.Option("--gpu-layers", metavar="N", help="Layers to run on a GPU; -1 for all.")]
Context = Annotated[
    int | None, typer.Option("--context", min=8, metavar="N", help="Tokens of a prompt and its answer; default: 4096.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the whole report there as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what it will cost and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no talk on stderr.")]


def tasks(
    gguf: Gguf,
    reference: Reference,
    names: Annotated[
        str, typer.Option("--tasks", metavar="NAME,…", help="Tasks of lm-evaluation-harness or of --include-path.")
    ],
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="Folder with YAML task files of your own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N items of each task.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, metavar="K", help="Examples before each question.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    context: Context = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run benchmarks on a file and on full precision, and compare item by item."""
    from pocketquant.eval.tasks.compare import compare_on_tasks, count_cost, write_report
    from pocketquant.eval.tasks.loading import TaskSettings
    from pocketquant.files.replacing import refuse_overwriting

    refuse_overwriting([out] if out else [], [gguf, reference])
    settings = TaskSettings(
        names=tuple(name.strip() for name in names.split(",") if name.strip()),
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        context=context,
        threads=threads,
        gpu_layers=gpu_layers,
        uses_chat_template=chat,
    )
    if dry_run:
        cost = count_cost(reference, settings)
        numbers = {"requests": cost.requests, "decoded_tokens": cost.decoded_tokens, "asked_tokens": cost.asked_tokens}
        say(
            f"{cost.requests} requests; each model decodes at most {cost.decoded_tokens} tokens, "
            f"{cost.asked_tokens} if beginnings were not shared",
            quiet=quiet,
        )
        if json:
            print_json(numbers, of="plan")
        return
    with step_progress(gguf.name, quiet=quiet) as advance:
        report = compare_on_tasks(gguf, reference, settings, progress=advance)
    if out is not None:
        write_report(headed(report.to_json()), out)
    if json:
        print_json(report.to_json())
    else:
        _print_results(report)
    _note_quantized(report, quiet=quiet)
    for name, cost in report.cost.items():
        for count, what in (
            (cost.cut_prompts, "prompts lost their beginning; use a larger --context"),
            (cost.cut_answers, "answers had less room than their task allows; use a larger --context"),
            (cost.sampled, "answers were to be drawn at random and are the most likely ones instead"),
            (cost.non_finite, "rows of logits were no finite numbers; the file is damaged"),
        ):
            if count:
                say(f"note: {name}: {count} {what}", quiet=quiet)
    for task, metrics in report.left_out.items():
        say(f"note: {task}: not item by item, left out: {', '.join(metrics)}", quiet=quiet)


def _note_quantized(report: TasksReport | SmokeReport, *, quiet: bool) -> None:
    from pocketquant.eval.kinship import quantized_reference

    if report.reference_quantized is not None:
        say(f"note: {quantized_reference(report.reference.name, report.reference_quantized)}", quiet=quiet)


def smoke(
    gguf: Gguf,
    reference: Reference,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="N", help="Most tokens of an answer.")
    ] = 256,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    out: Out = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have a file and full precision answer a few chats, and count what went wrong."""
    from pocketquant.eval.tasks.compare import write_report
    from pocketquant.eval.tasks.smoke import PROMPTS, compare_smoke
    from pocketquant.files.replacing import refuse_overwriting

    refuse_overwriting([out] if out else [], [gguf, reference])

    if dry_run:
        say(f"{len(PROMPTS)} prompts; each model writes at most {len(PROMPTS) * max_tokens} tokens", quiet=quiet)
        if json:
            print_json({"prompts": len(PROMPTS), "written_tokens": len(PROMPTS) * max_tokens}, of="plan")
        return
    with step_progress(gguf.name, quiet=quiet) as advance:
        report = compare_smoke(
            gguf, reference, max_tokens=max_tokens, threads=threads, gpu_layers=gpu_layers, progress=advance
        )
    if out is not None:
        write_report(headed(report.to_json()), out)
    _note_quantized(report, quiet=quiet)
    if json:
        print_json(report.to_json())
        return
    count = len(report.answers)
    rows = [
        [
            fault.replace("_", " "),
            f"{paired.model * count:.0f} of {count}",
            f"{paired.reference * count:.0f}",
            f"{paired.gained}",
            f"{paired.lost}",
            f"{paired.p_value:.2g}",
        ]
        for fault, paired in report.faults.items()
    ]
    print_table(["fault", gguf.name, "reference", "only here", "only there", "p"], rows)


def eval_vision(
    gguf: Gguf,
    mmproj: Annotated[Path, typer.Option("--mmproj", metavar="GGUF", help="The vision tower to judge.")],
    reference_mmproj: Annotated[
        Path, typer.Option("--reference-mmproj", metavar="GGUF", help="The vision tower at full precision.")
    ],
    images: Annotated[list[Path], typer.Option("--image", metavar="FILE", help="PNG or JPEG; once for each.")],
    question: Annotated[str, typer.Option("--question", help="Asked about each image.")] = "Describe this image.",
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", min=1, metavar="N", help="Most tokens of an answer to compare.")
    ] = 32,
    context: Context = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show images to a vision tower and to its full precision, and compare embeddings and answers."""
    from pocketquant.eval.tasks.compare import write_report
    from pocketquant.eval.vision import VisionSettings, compare_towers
    from pocketquant.files.replacing import refuse_overwriting

    refuse_overwriting([out] if out else [], [gguf, mmproj, reference_mmproj, *images])
    with step_progress(mmproj.name, quiet=quiet) as advance:
        report = compare_towers(
            gguf,
            mmproj,
            reference_mmproj,
            images,
            VisionSettings(question, answer_tokens, context, threads, gpu_layers),
            progress=advance,
        )
    if out is not None:
        write_report(headed(report.to_json()), out)
    if json:
        print_json(report.to_json())
        return
    rows = [
        [
            each.image.name,
            f"{each.width} x {each.height}",
            f"{each.cosine_mean:.6f}",
            f"{each.cosine_min:.6f}",
            f"{each.kld_mean:.3g}",
            f"{each.kld_max:.3g}",
            f"{100 * each.same_top:.0f} %",
        ]
        for each in report.images
    ]
    print_table(["image", "pixels", "cosine", "worst", "KL, nats a token", "largest", "same word"], rows)


def _print_results(report: Any) -> None:
    rows, others = [], []
    for result in report.results:
        if result.answers is not None:
            rows.append([result.task, result.metric, *_cells(result.answers)])
        else:
            difference, error = result.mean_difference
            others.append([result.task, result.metric, f"{difference:+.4g} ± {error:.2g}"])
    if rows:
        columns = ["task", "measure", "items", "model %", "reference %", "difference", "lost", "gained", "p"]
        print_table([*columns, "could show"], rows)
    if others:
        print_table(["task", "measure", "mean difference"], others)


def _cells(paired: Paired) -> Sequence[str]:
    effect = "nothing" if paired.smallest_effect is None else f"{100 * paired.smallest_effect:.2g} points"
    return (
        f"{paired.items}",
        f"{100 * paired.model:.2f}",
        f"{100 * paired.reference:.2f}",
        f"{100 * paired.difference:+.2f} ± {100 * paired.standard_error:.2f}",
        f"{paired.lost}",
        f"{paired.gained}",
        f"{paired.p_value:.2g}",
        effect,
    )
