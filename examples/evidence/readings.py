"""Verdicts on each claim, computed from the measured rows.

A claim that does not hold on the lab is reported as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from evidence.rows import Figure, Row, compare, summarise
from mmerge.pipeline.evaluation.calibrate import Calibration

MASKED = ("MMER", "EMR", "TALL")


def figures_of(rows: Sequence[Row], table: str, group: str, value: str) -> dict[str, Figure]:
    """Figures of a table's methods on the sets whose names begin so."""
    group_rows = [row for row in rows if row.table == table and row.group.startswith(group)]
    figures = {
        name: summarise([row for row in group_rows if row.method == name], value=value)
        for name in dict.fromkeys(row.method for row in group_rows)
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _is_static(method: str) -> bool:
    """Whether one merged model serves all modalities."""
    return not method.startswith((*MASKED, "original", "DAMC"))


def verdict(holds: bool, claim: str, evidence: str) -> list[str]:
    """Whether a claim holds, and by which figures."""
    return [
        (
            f"- {'**Holds**' if holds else '**Does not hold on the lab**'}: {claim}. Measured:"
            f" {evidence}."
        ),
        "",
    ]


def retention(rows: Sequence[Row]) -> list[str]:
    """At least 99 %, and best of its storage class."""
    figures = figures_of(rows, "retention", "single/", "performance_retention")
    if "MMER" not in figures:
        return []
    lines = verdict(
        figures["MMER"].mean >= 0.99, "MMER keeps at least 99 %", f"{figures['MMER']} %"
    )
    others = {name: figures[name] for name in MASKED if name in figures and name != "MMER"}
    if others:
        best = max(others, key=lambda name: others[name].mean)
        lines += verdict(
            figures["MMER"].mean >= others[best].mean,
            "MMER is the best of those that store one task vector and masks",
            f"MMER {figures['MMER']}, {best} {others[best]}",
        )
    static = {name: figure for name, figure in figures.items() if _is_static(name)}
    if static:
        best = max(static, key=lambda name: static[name].mean)
        lines += verdict(
            figures["MMER"].mean > static[best].mean,
            "MMER keeps more than every static merge",
            f"best static merge {best} {static[best]}",
        )
    return lines


def expansion(rows: Sequence[Row]) -> list[str]:
    """Better than every single expert and static merge with two, three and four modalities."""
    lines = []
    for count, words in ((2, "two"), (3, "three"), (4, "four")):
        mix_rows = [
            row
            for row in rows
            if row.table == "expansion"
            and row.group.startswith("mix/")
            and row.group.count("+") == count - 1
        ]
        names = dict.fromkeys(row.method for row in mix_rows)
        figures = {
            name: f
            for name in names
            if (f := summarise([row for row in mix_rows if row.method == name])) is not None
        }
        if "MMER" not in figures or len(figures) < 2:
            continue
        single = [name for name in figures if name.endswith("alone")]
        static = [name for name in figures if _is_static(name) and name not in single]
        for label, others in (("single expert", single), ("static merge", static)):
            if others:
                best = max(others, key=lambda name: figures[name].mean)
                gap = 100 * (figures["MMER"].mean - figures[best].mean)
                lines += verdict(
                    gap > 0,
                    f"with {words} modalities MMER beats every {label}",
                    f"MMER {figures['MMER']}, {best} {figures[best]}: {gap:+.1f} points",
                )
    if any("Does not hold" in line for line in lines):
        lines += [
            "The reason is in the weights of text tokens, and so of the answer: in θ₀ + m̄∘τ⋆ a "
            "weight that only one mask keeps counts 1/n. The "
            "column *one modality* shows the cost of that alone: the prompts that the "
            "reconstructed experts answer above, with all masks active. "
            "*Why: modality tokens and text tokens* below gives MMER the text weights of static "
            "merges.",
            "",
        ]
    return lines


def ablations(rows: Sequence[Row]) -> list[str]:
    """The published order: MMER, λ = 1, without significance, without congruence."""
    figures = figures_of(rows, "ablations", "mix/", "value")
    order = ["MMER", "λ = 1", "without dominant significance", "without directional congruence"]
    if not all(name in figures for name in order):
        return []
    values = [figures[name].mean for name in order]
    holds = all(first >= second for first, second in pairwise(values))
    lines = verdict(
        holds,
        "the published order, " + " ≥ ".join(order),
        ", ".join(f"{name} {figures[name]}" for name in order),
    )
    lines += [
        "Entry by entry, (τ⋆ − τ)² ≤ τ² and |τ⋆ − τ| ≤ |τ| say the same, and with equal signs "
        "both mean |τ| ≥ 0.5·|τ⋆|: masks by Euclidean distance "
        "are those of λ = 1 (with opposite signs the distance never shrinks). Both were built "
        "and measured separately.",
        "",
    ]
    return lines


def forgetting(rows: Sequence[Row], table: str) -> list[str]:
    """New task as after tuning, previous tasks as before."""
    lines = []
    for m in ("image", "audio"):
        old = figures_of(rows, table, f"single/{m}", "value")
        new = figures_of(rows, table, f"new/{m}", "value")
        before, tuned = "before tuning on the new task", "tuned on the new task"
        previous, later = old.get("MMER, previous tasks"), new.get("MMER, new task")
        if previous is None or later is None or before not in old or tuned not in new:
            continue
        lost = 100 * (old[before].mean - old[tuned].mean)
        lines += [
            f"- {m}: tuning on the new task cost {lost:.1f} points on previous tasks and brought "
            f"the new one from {new[before]} to {new[tuned]}. "
            f"Reconstructed from one composite model, MMER has previous tasks {previous} "
            f"({100 * (previous.mean - old[before].mean):+.1f} points against before), "
            f"new task {later} ({100 * (later.mean - new[tuned].mean):+.1f} points against after).",
            "",
        ]
    return lines


def number(rows: Sequence[Row]) -> list[str]:
    """More experts cost as little as published."""
    figures = figures_of(rows, "number of experts", "single/", "performance_retention")
    names = [name for name in ("2 experts", "3 experts", "4 experts") if name in figures]
    if len(names) < 2:
        return []
    cost = 100 * (figures[names[0]].mean - figures[names[-1]].mean)
    return verdict(
        cost <= 1.0,
        "from two to four experts at most one point is lost (published: about 0.6)",
        f"{cost:.1f} points",
    )


def variants(rows: Sequence[Row]) -> list[str]:
    """Which choice was best."""
    figures = figures_of(rows, "variants", "single/", "performance_retention")
    if len(figures) < 2:
        return []
    ordered = sorted(figures, key=lambda name: -figures[name].mean)
    return [
        "By performance retention: "
        + ", ".join(f"{name} {figures[name]}" for name in ordered)
        + ".",
        "",
    ]


def language(rows: Sequence[Row]) -> list[str]:
    """Language against the expert's own ability."""
    lines = []
    for m in ("image", "audio"):
        text = figures_of(rows, "language", "single/text", "value")
        expert_figures = figures_of(rows, "language", f"single/{m}", "value")
        prefix = f"{m}: "
        expert, base = text.get(f"{m}: expert"), text.get("base")
        both = {
            name.removeprefix(prefix): (text[name].mean + expert_figures[name].mean) / 2
            for name in expert_figures
            if name.startswith(prefix) and name in text
        }
        if expert is None or base is None or len(both) < 2:
            continue
        if expert.mean >= base.mean - 0.01:
            lines += [
                (
                    f"- {m}: tuning cost no language ability ({base} before, {expert} after), so "
                    "there is none to restore, and the methods cannot be ranked."
                ),
                "",
            ]
            continue
        best = max((name for name in both if name != "expert"), key=lambda name: both[name])
        lines += [
            f"- {m}: tuning took the text tasks from {base} (base) to {expert}. By the mean of "
            f"both columns the best is {best} ({100 * both[best]:.1f}; "
            f"the expert itself {100 * both['expert']:.1f}).",
            "",
        ]
    return lines


def _cost_of_range(chosen: Calibration, expert: str) -> float:
    curve = [
        point
        for point in chosen.points
        if point.expert == expert and point.density == chosen.density
    ]
    return max(p.objective for p in curve) - max(
        p.objective for p in curve if 0.6 <= p.mask_scale <= 0.9
    )


def calibration(rows: Sequence[Row], chosen: Calibration) -> list[str]:
    """Within half a point, and within the published range."""
    listed = ", ".join(f"{name} {scale:g}" for name, scale in chosen.mask_scales.items())
    inside = all(0.6 <= scale <= 0.9 for scale in chosen.mask_scales.values())
    lines = verdict(inside, "the mask scales lie in the published range of 0.6 to 0.9", listed)
    if not inside:
        outside = {
            name: scale for name, scale in chosen.mask_scales.items() if not 0.6 <= scale <= 0.9
        }
        costs = ", ".join(f"{name} {_cost_of_range(chosen, name):.4f}" for name in outside)
        lines += [
            (
                "At the best scale within that range, the objective (0 to 1) would be smaller "
                f"by: {costs}."
            ),
            "",
        ]
    for group, value, words in (
        ("many single/", "performance_retention", "performance retention"),
        ("many mix/", "value", "accuracy on mixes"),
    ):
        group_rows = [
            row for row in rows if row.table == "calibration" and row.group.startswith(group)
        ]
        difference = compare(group_rows, "without labels", "with labels", value=value)
        if difference is None:
            continue
        low, high = (100 * edge for edge in difference.interval)
        sure = (
            "which excludes a larger loss"
            if low >= -0.5
            else (
                "which excludes a smaller loss"
                if high < -0.5
                else "so a larger loss is not excluded"
            )
        )
        lines += verdict(
            difference.mean >= -0.005,
            f"without labels within half a point of with labels, {words}",
            f"{100 * difference.mean:+.2f} ± {100 * difference.standard_error:.2f} points, 95 %"
            f" interval {low:+.2f} to {high:+.2f}, {sure}",
        )
    return lines
