"""What the numbers say about each claim, computed from them: a claim that does not hold on the lab is said not to hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from evidence.changes import Changes, Kept
from evidence.rows import Figure, Row, compare, summarise

MASKED = ("MMER", "EMR", "TALL")


def _figures(rows: Sequence[Row], table: str, group: str, value: str) -> dict[str, Figure]:
    own = [row for row in rows if row.table == table and row.group.startswith(group)]
    found = {name: summarise([row for row in own if row.method == name], value=value) for name in dict.fromkeys(row.method for row in own)}
    return {name: figure for name, figure in found.items() if figure is not None}


def _is_static(method: str) -> bool:
    """Whether one merged model serves all modalities."""
    return not method.startswith((*MASKED, "original", "DAMC"))


def _verdict(holds: bool, claim: str, found: str) -> list[str]:
    return [f"- {'**Holds**' if holds else '**Does not hold on the lab**'}: {claim}. Measured: {found}.", ""]


def retention(rows: Sequence[Row]) -> list[str]:
    """At least 99 %, and best of its storage class."""
    found = _figures(rows, "retention", "single/", "performance_retention")
    if "MMER" not in found:
        return []
    lines = _verdict(found["MMER"].mean >= 0.99, "MMER keeps at least 99 %", f"{found['MMER']} %")
    others = {name: found[name] for name in MASKED if name in found and name != "MMER"}
    if others:
        best = max(others, key=lambda name: others[name].mean)
        lines += _verdict(
            found["MMER"].mean >= others[best].mean, "MMER is the best of those that store one task vector and masks",
            f"MMER {found['MMER']}, {best} {others[best]}",
        )  # fmt: skip
    static = {name: figure for name, figure in found.items() if _is_static(name)}
    if static:
        best = max(static, key=lambda name: static[name].mean)
        lines += _verdict(
            found["MMER"].mean > static[best].mean, "MMER keeps more than every static merge", f"best static merge {best} {static[best]}"
        )
    return lines


def expansion(rows: Sequence[Row]) -> list[str]:
    """Better than every single expert and static merge with two, three and four modalities."""
    lines = []
    for count, words in ((2, "two"), (3, "three"), (4, "four")):
        own = [row for row in rows if row.table == "expansion" and row.group.startswith("mix/") and row.group.count("+") == count - 1]
        names = dict.fromkeys(row.method for row in own)
        found = {name: f for name in names if (f := summarise([row for row in own if row.method == name])) is not None}
        if "MMER" not in found or len(found) < 2:
            continue
        single = [name for name in found if name.endswith("alone")]
        static = [name for name in found if _is_static(name) and name not in single]
        for label, others in (("single expert", single), ("static merge", static)):
            if others:
                best = max(others, key=lambda name: found[name].mean)
                gap = 100 * (found["MMER"].mean - found[best].mean)
                lines += _verdict(
                    gap > 0,
                    f"with {words} modalities MMER beats every {label}",
                    f"MMER {found['MMER']}, {best} {found[best]}: {gap:+.1f} points",
                )
    if any("Does not hold" in line for line in lines):
        lines += [
            "The reason is in the weights of text tokens, and with them of the answer: θ₀ + m̄∘τ⋆, where what one expert alone wants counts 1/n. The "
            "column *one medium* shows what that costs by itself: the same prompts that the rebuilt experts answer above, with all masks at work. "
            "*Why: media tokens and text tokens* below gives MMER the text weights of static merges.",
            "",
        ]  # fmt: skip
    return lines


def ablations(rows: Sequence[Row]) -> list[str]:
    """The published order: MMER, λ = 1, without significance, without congruence."""
    found = _figures(rows, "ablations", "mix/", "value")
    order = ["MMER", "λ = 1", "without dominant significance", "without directional congruence"]
    if not all(name in found for name in order):
        return []
    values = [found[name].mean for name in order]
    holds = all(first >= second for first, second in pairwise(values))
    lines = _verdict(holds, "the published order, " + " ≥ ".join(order), ", ".join(f"{name} {found[name]}" for name in order))
    lines += [
        "Entry by entry, (τ⋆ − τ)² ≤ τ² and |τ⋆ − τ| ≤ |τ| say the same, and with equal signs both mean |τ| ≥ 0.5·|τ⋆|: masks by Euclidean distance "
        "are those of λ = 1 (with opposite signs the distance never shrinks). Both were built and measured by themselves.",
        "",
    ]  # fmt: skip
    return lines


def text_tokens(rows: Sequence[Row], changes: Changes, simulated: Sequence[Mapping[str, Kept]]) -> list[str]:
    """Why static merges are ahead in mixes, and why directional congruence costs so little: whose weights decide."""
    found = _figures(rows, "text tokens", "mix/", "value")
    static = _figures(rows, "expansion", "mix/", "value")
    lines: list[str] = []
    mmer = found.get("MMER")
    for name in ("TIES", "SWUDI"):
        swapped = found.get(f"MMER, text tokens of {name}")
        if mmer is not None and swapped is not None and name in static:
            lines += _verdict(
                swapped.mean >= static[name].mean - 0.005 and swapped.mean > mmer.mean,
                f"with the text weights of {name}, MMER answers mixes at least as well as {name} (half a point aside): what MMER lacks is in its text weights",
                f"MMER {mmer}, {name} {static[name]}, MMER with the text weights of {name} {swapped}",
            )
    congruence, significance = "without directional congruence", "without dominant significance"
    names = [f"{each}, text tokens of MMER" for each in (congruence, significance)] + [
        f"MMER, text tokens {each}" for each in (congruence, significance)
    ]
    if mmer is None or not all(name in found for name in names):
        return lines
    media, text = [[100 * (found[name].mean - mmer.mean) for name in part] for part in (names[:2], names[2:])]
    lines += _verdict(
        max(map(abs, media)) < abs(text[1]),
        "in mixes on the lab, what a test of the masks is worth, it is worth through text tokens",
        f"against MMER, points without congruence / without significance: in media tokens alone {media[0]:+.1f} / {media[1]:+.1f}, in text tokens alone "
        f"{text[0]:+.1f} / {text[1]:+.1f}",
    )
    ours = {rule: max(change.kept[rule].distance for change in changes.experts) for rule in (congruence, significance)}
    theirs = {rule: max(each[rule].distance for each in simulated) for rule in (congruence, significance)}
    lines += [
        "So directional congruence costs little here because text tokens do not need it: each entry of m̄ is 0 to 1, so m̄∘τ⋆ has the elected sign with the "
        "test and without it. Entries of the wrong sign reach media tokens and rebuilt experts alone. There, too, they do less than what dominant "
        f"significance keeps out: a mask's result is at most {ours[congruence]:.1f} times the task vector's norm away without congruence, "
        f"{ours[significance]:.1f} times without significance. With the published magnitudes, simulated, it is {theirs[congruence]:.1f} and "
        f"{theirs[significance]:.1f} times, the same order. The published fall to 7.20 does not follow from the masks' definition alone; we do not know what "
        "else that ablation leaves out.",
        "",
    ]  # fmt: skip
    return lines


def forgetting(rows: Sequence[Row], table: str) -> list[str]:
    """New task as after tuning, previous tasks as before."""
    lines = []
    for m in ("image", "audio"):
        old = _figures(rows, table, f"single/{m}", "value")
        new = _figures(rows, table, f"new/{m}", "value")
        before, tuned = "before tuning on the new task", "tuned on the new task"
        previous, later = old.get("MMER, previous tasks"), new.get("MMER, new task")
        if previous is None or later is None or before not in old or tuned not in new:
            continue
        lost = 100 * (old[before].mean - old[tuned].mean)
        lines += [
            f"- {m}: tuning on the new task cost {lost:.1f} points on previous tasks and brought the new one from {new[before]} to {new[tuned]}. "
            f"Rebuilt from one composite, MMER has previous tasks {previous} ({100 * (previous.mean - old[before].mean):+.1f} points to before), "
            f"new task {later} ({100 * (later.mean - new[tuned].mean):+.1f} points to after).",
            "",
        ]  # fmt: skip
    return lines


def number(rows: Sequence[Row]) -> list[str]:
    """More experts cost as little as published."""
    found = _figures(rows, "number of experts", "single/", "performance_retention")
    names = [name for name in ("2 experts", "3 experts", "4 experts") if name in found]
    if len(names) < 2:
        return []
    cost = 100 * (found[names[0]].mean - found[names[-1]].mean)
    return _verdict(cost <= 1.0, "from two to four experts at most one point is lost (published: about 0.6)", f"{cost:.1f} points")


def variants(rows: Sequence[Row]) -> list[str]:
    """Which choice was best."""
    found = _figures(rows, "variants", "single/", "performance_retention")
    if len(found) < 2:
        return []
    ordered = sorted(found, key=lambda name: -found[name].mean)
    return ["By performance retention: " + ", ".join(f"{name} {found[name]}" for name in ordered) + ".", ""]


def language(rows: Sequence[Row]) -> list[str]:
    """Language against the expert's own ability."""
    lines = []
    for m in ("image", "audio"):
        text = _figures(rows, "language", "single/text", "value")
        own = _figures(rows, "language", f"single/{m}", "value")
        prefix = f"{m}: "
        expert, base = text.get(f"{m}: expert"), text.get("base")
        both = {
            name.removeprefix(prefix): (text[name].mean + own[name].mean) / 2 for name in own if name.startswith(prefix) and name in text
        }
        if expert is None or base is None or len(both) < 2:
            continue
        if expert.mean >= base.mean - 0.01:
            lines += [
                f"- {m}: tuning took no language ({base} before, {expert} after), so there is none to give back, and no order to see.",
                "",
            ]
            continue
        best = max((name for name in both if name != "expert"), key=lambda name: both[name])
        lines += [
            f"- {m}: tuning took the text tasks from {base} (base) to {expert}. By the mean of both columns the best is {best} ({100 * both[best]:.1f}; "
            f"the expert itself {100 * both['expert']:.1f}).",
            "",
        ]  # fmt: skip
    return lines


def calibration(rows: Sequence[Row], scales: Mapping[str, float]) -> list[str]:
    """Within half a point, and within the published range."""
    listed = ", ".join(f"{name} {scale:g}" for name, scale in scales.items())
    inside = all(0.6 <= scale <= 0.9 for scale in scales.values())
    lines = _verdict(inside, "the mask scales lie in the published range of 0.6 to 0.9", listed)
    if not inside:
        lines += [
            "With a larger λ an entry of τ⋆ is left out sooner where other experts pushed it far beyond the expert's own value. A small model that "
            "was tuned as a whole has larger, less alike task vectors than 7B models have (see *What the experts changed*), so what others added is "
            "less likely to do no harm.",
            "",
        ]  # fmt: skip
    for group, value, words in (
        ("many single/", "performance_retention", "performance retention"),
        ("many mix/", "value", "accuracy on mixes"),
    ):
        own = [row for row in rows if row.table == "calibration" and row.group.startswith(group)]
        found = compare(own, "without labels", "with labels", value=value)
        if found is None:
            continue
        low, high = (100 * edge for edge in found.interval)
        sure = (
            "the interval lies on one side of half a point"
            if (low >= -0.5 or high < -0.5)
            else "the interval reaches across half a point, so these prompts do not settle it"
        )
        lines += _verdict(
            found.mean >= -0.005,
            f"without labels within half a point of with labels, {words}",
            f"{100 * found.mean:+.2f} ± {100 * found.standard_error:.2f} points, 95 % interval {low:+.2f} to {high:+.2f}: {sure}",
        )
    return lines
