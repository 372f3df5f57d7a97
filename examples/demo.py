"""The main job on real experts: merge, verify, load, ask, and measure what each expert keeps.

    python examples/demo.py [--examples 300]

Everything is written below build/: the store, exported checkpoints, demo.json (the retention table:
a list of rows with method, task, accuracy and performance_retention), expansion.json and
retention.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import transformers
from lab import evaluate, points, tasks
from rich.console import Console
from rich.table import Table

from mmerge.pipeline import (
    Composite,
    Part,
    export,
    load_composite,
    make_plan,
    read_recipe,
    run,
    verify,
)
from mmerge.pipeline.execution.open import open_executor
from mmerge.pipeline.monitoring.progress import BarProgress, LogProgress, to_size
from mmerge.pipeline.views.build_report import print_build, print_run
from mmerge.pipeline.views.build_summary import read_build

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "examples" / "lab"
BUILD = ROOT / "build"
STORE = BUILD / "demo" / "store"
METHODS = ("naive_mc", "task_arithmetic", "ties", "mmer")
MIXES = (
    ("image", "audio"),
    ("image", "video"),
    ("audio", "video"),
    ("image", "audio", "video", "point"),
)
SEED = 7
console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Score:
    """One cell of the retention table: accuracy on one task, and its ratio to the expert's."""

    method: str
    task: str
    accuracy: float
    performance_retention: float


def merge_all() -> None:
    """Build the composites of all four recipes in one store; base and encoders are stored once."""
    executor = open_executor("ray")
    try:
        for method in METHODS:
            plan = make_plan(read_recipe(LAB / "recipes" / f"{method}.yaml"))
            if console.is_terminal:
                with BarProgress(console) as progress:
                    report = run(plan, executor=executor, progress=progress)
            else:
                report = run(plan, executor=executor, progress=LogProgress())
            print_run(report, console)
    finally:
        executor.close()
    report = verify(f"{STORE}#mmer")
    report.check()
    console.print(
        f"[green]verified[/] {report.num_objects} objects, {to_size(report.num_bytes)}, all digests"
        " equal\n"
    )
    print_build(read_build(f"{STORE}#mmer"), console, layers=False)


def ask(composite: Composite) -> None:
    """Print the composite's answers to a few real prompts."""
    samples = LAB / "samples"
    table = Table(
        "media",
        "question",
        "answer",
        "truth",
        box=None,
        show_lines=False,
        header_style="bold",
        pad_edge=False,
    )
    for media, question, truth in (
        ([("image", "image_seven_light.png")], "which digit is in the image ?", "seven"),
        ([("image", "image_four_dark.png")], "which ink is in the image ?", "dark"),
        (
            [("audio", "sound_three_low.wav")],
            "which digit comes after the digit in the sound ?",
            "four",
        ),
        ([("audio", "sound_nine_high.wav")], "which voice is in the sound ?", "high"),
        ([("video", "video_two_up.gif")], "which direction is in the video ?", "up"),
        ([("video", "video_two_up.gif")], "what does the video show ?", "two moving up"),
        ([("point", "cloud_eight_deep.npy")], "how many loops has the digit in the cloud ?", "two"),
        (
            [("image", "image_seven_light.png"), ("audio", "sound_three_low.wav")],
            "which digit is in the sound ?",
            "three",
        ),
        (
            [("image", "image_three_light.png"), ("audio", "sound_three_low.wav")],
            "do the image and the sound have the same digit ?",
            "yes",
        ),
        (
            [("image", "image_zero_dark.png"), ("audio", "sound_eight_low.wav")],
            "which digit is larger , the image or the sound ?",
            "sound",
        ),
        (
            [("audio", "sound_nine_high.wav"), ("video", "video_two_up.gif")],
            "is the digit in the video odd or even ?",
            "even",
        ),
        (
            [
                ("image", "image_zero_dark.png"),
                ("audio", "sound_eight_low.wav"),
                ("video", "video_two_up.gif"),
                ("point", "cloud_eight_deep.npy"),
            ],
            "what do all digits share ?",
            "even",
        ),
    ):
        parts = [Part(kind, samples / name) for kind, name in media]
        answer = composite.generate(
            composite.prompt(question, parts), max_new_tokens=evaluate.MAX_NEW_TOKENS
        )
        names = " ".join(name for _, name in media)
        table.add_row(
            names, question, f"[{'green' if answer == truth else 'red'}]{answer}[/]", truth
        )
    console.print(table)


def score_experts(num_examples: int) -> list[Score]:
    """Return the accuracies of the original experts and of every method's export.

    All checkpoints are loaded by transformers alone.
    """
    scores: list[Score] = []
    for modality in tasks.MODALITIES:
        examples = tasks.make_examples(modality, split="test", num_examples=num_examples, seed=SEED)
        original = evaluate.score_checkpoint(modality, LAB / "checkpoints" / modality, examples)
        scores += [Score("original", task, value, 1.0) for task, value in original.items()]
        for method in METHODS:
            folder = BUILD / "demo" / "exports" / method / modality
            shutil.rmtree(folder, ignore_errors=True)
            export(f"{STORE}#{method}", folder, expert=modality)
            accuracies = evaluate.score_checkpoint(modality, folder, examples)
            scores += [
                Score(method, task, value, value / original[task])
                for task, value in accuracies.items()
            ]
    return scores


def print_retention(scores: list[Score]) -> None:
    """Print accuracy and performance retention per method and modality."""
    methods = ("original", *METHODS)
    console.print("accuracy (performance retention: accuracy / accuracy of the original expert)")
    table = Table("modality", box=None, header_style="bold", pad_edge=False)
    for method in methods:
        table.add_column(method, justify="right")
    for modality in (*tasks.MODALITIES, "all tasks"):
        cells = []
        for method in methods:
            chosen = [
                s
                for s in scores
                if s.method == method and (s.task.startswith(f"{modality}/") or " " in modality)
            ]
            accuracy, kept = (
                np.mean([getattr(s, key) for s in chosen])
                for key in ("accuracy", "performance_retention")
            )
            cells.append(
                f"{accuracy:.1%} ({kept:.0%})"
                if method == "original"
                else f"{accuracy:.1%} ({kept:.1%})"
            )
        table.add_row(modality, *cells)
    console.print(table)


def draw_retention(scores: list[Score], path: Path) -> None:
    """Draw performance retention per modality and method."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    width = 0.8 / len(METHODS)
    for position, method in enumerate(METHODS):
        means = [
            np.mean(
                [
                    s.performance_retention
                    for s in scores
                    if s.method == method and s.task.startswith(f"{modality}/")
                ]
            )
            for modality in tasks.MODALITIES
        ]
        bars = axes.bar(
            np.arange(len(means)) + (position - (len(METHODS) - 1) / 2) * width,
            means,
            width,
            label=method,
        )
        axes.bar_label(bars, [f"{100 * mean:.0f}" for mean in means], fontsize=8)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(tasks.MODALITIES)), tasks.MODALITIES)
    axes.set_ylabel("accuracy / accuracy of the original expert")
    axes.set_title("What each expert keeps after merging")
    axes.set_ylim(0, 1.18)
    axes.legend(ncols=len(METHODS), fontsize=8, loc="upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def score_mixed(composite: Composite, num_examples: int) -> list[dict[str, Any]]:
    """Return accuracies on prompts with two to four real inputs.

    Those of the composite model, and of each single expert, which sees only its own modality.
    """
    rows = []
    experts = {
        modality: load_composite(f"{STORE}#mmer", mode="retention", expert=modality)
        for modality in tasks.MODALITIES
    }
    for mix in MIXES:
        for kinds, name in (((), "+".join(mix)), ((tasks.SHARE,), "+".join(mix) + "/share")):
            if kinds and len(mix) == 2:
                continue
            examples = tasks.make_mixed_examples(
                mix, split="test", num_examples=num_examples, seed=SEED, kinds=kinds
            )
            chance = float(np.mean([tasks.chance(example.task) for example in examples]))
            row = {
                "task": name,
                "chance": chance,
                "expansion": evaluate.mixed_accuracy(composite, examples),
            }
            for modality in mix:
                row[f"{modality} expert alone"] = evaluate.mixed_accuracy(
                    experts[modality], examples, only=modality
                )
            rows.append(row)
    return rows


def print_mixed(rows: list[dict[str, Any]]) -> None:
    """Print the accuracies on prompts with several media."""
    table = Table(
        "media in one prompt",
        "blind guess",
        "expansion",
        "single experts",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for row in rows:
        alone = ", ".join(
            f"{key.split()[0]} {value:.1%}" for key, value in row.items() if key.endswith("alone")
        )
        table.add_row(row["task"], f"{row['chance']:.1%}", f"{row['expansion']:.1%}", alone)
    console.print(table)


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--examples", type=int, default=300, help="held-out examples per modality")
    num_examples: int = parser.parse_args().examples
    transformers.logging.disable_progress_bar()
    points.register()  # the point-cloud encoder is defined by the user
    torch.set_num_threads(1)  # more threads slow tiny models down
    began = time.monotonic()
    console.rule("merge")
    merge_all()
    console.rule("ask the composite (expansion: every token through its own modality's weights)")
    composite = load_composite(f"{STORE}#mmer")
    ask(composite)
    console.rule(f"retention, {num_examples} held-out examples per modality")
    scores = score_experts(num_examples)
    print_retention(scores)
    draw_retention(scores, BUILD / "retention.png")
    console.rule("expansion")
    mixed = score_mixed(composite, num_examples)
    print_mixed(mixed)
    (BUILD / "demo.json").write_text(
        json.dumps([asdict(score) for score in scores], indent=2) + "\n"
    )
    (BUILD / "expansion.json").write_text(json.dumps(mixed, indent=2) + "\n")
    console.print(
        "\nwrote build/demo.json, build/expansion.json and build/retention.png;"
        f" {time.monotonic() - began:.0f} s"
    )
    console.print(
        'next: .venv/bin/mmerge generate "build/demo/store#mmer" --image'
        ' examples/lab/samples/image_seven_light.png "which digit is in the image ?"'
    )


if __name__ == "__main__":
    main()
