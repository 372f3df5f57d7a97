"""The page: tables, plots, the papers' figures beside ours, and what the numbers say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from evidence import papers, plots, readings, reasons
from evidence.calibration import Scales, count_prompts
from evidence.changes import Changes, simulate
from evidence.introduction import describe_experts, introduce
from evidence.measure import Effort, Place
from evidence.rows import Figure, Row, summarise
from evidence.tables import DENSITIES, MASK_SCALES
from evidence.wrapping import wrap_page

MODALITIES = ("image", "audio", "video", "point")
NOT_MEASURED = "–"
Column = tuple[str, Callable[[Row], bool], str]
"""Heading, which rows, and which of their values."""


def write_page(
    docs: Path,
    rows: Sequence[Row],
    *,
    missing: Sequence[str],
    place: Place,
    scales: Scales,
    changes: Changes,
    effort: Effort,
) -> None:
    """Write reproduction.md, reproduction.json and the plots."""
    docs.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda row: (row.table, row.method, row.group, row.task, row.seed))
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in ordered)
    (docs / "reproduction.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    drawn = plots.draw_all(docs / "reproduction", rows, scales)
    text = _Page(rows, place, scales, changes, drawn).write(missing, effort)
    (docs / "reproduction.md").write_text(wrap_page(text), encoding="utf-8")


class _Page:
    def __init__(
        self,
        rows: Sequence[Row],
        place: Place,
        scales: Scales,
        changes: Changes,
        drawn: Sequence[str],
    ) -> None:
        self.rows, self.place, self.scales, self.changes, self.drawn = (
            rows,
            place,
            scales,
            changes,
            drawn,
        )
        self.lines: list[str] = []

    def write(self, missing: Sequence[str], effort: Effort) -> str:
        self._say(*introduce(self.place, effort), *describe_experts(self.changes))
        self._retention()
        self._expansion()
        self._ablations()
        self._forgetting()
        self._number()
        self._variants()
        self._density()
        self._language()
        self._calibrate()
        if missing:
            self._say(
                "## Not measured in this run",
                "",
                f"{len(missing)} entries, for want of time or of their checkpoints:",
                "",
            )
            self._say(*(f"- {name}" for name in missing), "")
        return "\n".join(self.lines).rstrip() + "\n"

    def _say(self, *lines: str) -> None:
        self.lines += lines

    def _plot(self, name: str) -> None:
        if name in self.drawn:
            self._say(f"![{name}](reproduction/{name}.png)", "")

    def _table(
        self,
        table: str,
        columns: Sequence[Column],
        *,
        theirs: tuple[str, dict[str, str]] | None = None,
    ) -> None:
        methods = list(dict.fromkeys(row.method for row in self.rows if row.table == table))
        headings = [heading for heading, _, _ in columns] + ([theirs[0]] if theirs else [])
        self._say(f"| method | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|")
        for method in methods:
            method_rows = [row for row in self.rows if row.table == table and row.method == method]
            cells = [
                _cell(summarise(method_rows, choose=choose, value=value))
                for _, choose, value in columns
            ]
            cells += [theirs[1].get(method, "")] if theirs else []
            self._say(f"| {method} | {' | '.join(cells)} |")
        self._say("")

    def _has(self, table: str, heading: str) -> bool:
        self._say(f"## {heading}", "")
        if any(row.table == table for row in self.rows):
            return True
        self._say("Not measured in this run.", "")
        return False

    def _retention(self) -> None:
        if not self._has("retention", "Retention: each expert reconstructed"):
            return
        columns: list[Column] = [(m, _in(f"single/{m}"), "value") for m in self._modalities()]
        columns.append(("**performance retention**", lambda row: True, "performance_retention"))
        self._table(
            "retention",
            columns,
            theirs=("theirs: retention, captions / accuracy", papers.RETENTION),
        )
        self._say(
            "EMR, TALL and MMER store the base, one task vector and a mask per expert, and "
            "reconstruct each expert; the other methods give one model for all modalities. "
            "DAMC stores adapters; its original is the LoRA twin, and all default adapters apply "
            "to text tokens.",
            "",
            *readings.retention(self.rows),
        )
        self._plot("retention")

    def _expansion(self) -> None:
        if not self._has("expansion", "Expansion: several modalities in one prompt"):
            return
        counts = {2: "pairs", 3: "triples", 4: "all four"}
        columns: list[Column] = [
            ("one modality", lambda row: row.group.startswith("single/"), "value")
        ]
        columns += [(label, _mix(count), "value") for count, label in counts.items()]
        columns += [(f"share, {count}", _share(count), "value") for count in (3, 4)]
        columns.append(("**mean of mixes**", lambda row: row.group.startswith("mix/"), "value"))
        self._table(
            "expansion", columns, theirs=("theirs: average of nine columns", papers.EXPANSION)
        )
        self._say(
            "A single expert sees its own modality alone, in the mixes that contain it. *One "
            "modality*: prompts of one modality, answered with the weights of all experts.",
            "",
            *readings.expansion(self.rows),
        )
        self._plot("expansion")

    def _ablations(self) -> None:
        if not self._has("ablations", "Ablations of MMER"):
            return
        columns: list[Column] = [
            ("expansion, mixes", lambda row: row.group.startswith("mix/"), "value"),
            ("expansion, share", lambda row: row.group.startswith("share/"), "value"),
            (
                "performance retention",
                lambda row: row.group.startswith("single/"),
                "performance_retention",
            ),
        ]
        self._table("ablations", columns, theirs=("theirs: expansion", papers.ABLATIONS))
        self._say(*readings.ablations(self.rows))
        self._explain_ablations()

    def _explain_ablations(self) -> None:
        if not self.changes.experts or not self._has(
            "text tokens", "Why: modality tokens and text tokens"
        ):
            return
        columns: list[Column] = [
            ("expansion, mixes", lambda row: row.group.startswith("mix/"), "value"),
            ("expansion, share", lambda row: row.group.startswith("share/"), "value"),
        ]
        self._table("text tokens", columns)
        self._say(
            "Modality tokens use the weights of the first model, text and generated tokens those "
            "of the second.",
            "",
        )
        simulated = simulate(papers.MEAN_MAGNITUDES)
        self._say(
            *reasons.mask_table(self.changes, simulated),
            *reasons.text_tokens(self.rows, self.changes, simulated),
        )

    def _forgetting(self) -> None:
        for count, words in ((1, "one new task"), (2, "two new tasks")):
            table = f"forgetting, {count} new"
            if not self._has(table, f"Forgetting reversed: {words}"):
                continue
            columns: list[Column] = []
            for m in ("image", "audio"):
                if any(row.table == table and row.group == f"new/{m}" for row in self.rows):
                    columns += [
                        (f"{m}: previous tasks", _in(f"single/{m}"), "value"),
                        (f"{m}: new task", _in(f"new/{m}"), "value"),
                    ]
            self._table(table, columns)
            self._say(
                "The mask scales are those of the four experts above, not calibrated again; a "
                "new expert has the scale of its original.",
                "",
            )
            self._say(
                f"Theirs ({papers.MMER}): {papers.FORGETTING}.",
                "",
                *readings.forgetting(self.rows, table),
            )

    def _number(self) -> None:
        if not self._has("number of experts", "Number of experts"):
            return
        columns: list[Column] = [
            (m, _in(f"single/{m}"), "performance_retention") for m in self._modalities()
        ]
        columns.append(("**performance retention**", lambda row: True, "performance_retention"))
        self._table("number of experts", columns, theirs=("theirs", papers.NUMBER))
        self._say(
            "Means over all composite models of that number of experts.",
            "",
            *readings.number(self.rows),
        )

    def _variants(self) -> None:
        if not self._has("variants", "Reduction, scope and merged tensors"):
            return
        columns: list[Column] = [
            (
                "performance retention",
                lambda row: row.group.startswith("single/"),
                "performance_retention",
            ),
            ("all four", lambda row: row.group.startswith("mix/"), "value"),
            ("share, all four", lambda row: row.group.startswith("share/"), "value"),
        ]
        self._table("variants", columns)
        self._say(*readings.variants(self.rows))

    def _density(self) -> None:
        table = "density × mask scale"
        if not self._has(table, "Density × mask scale"):
            return
        for heading, group, value in (
            ("Performance retention", "single/", "performance_retention"),
            ("All four modalities", "mix/", "value"),
        ):
            self._say(
                f"{heading}:",
                "",
                f"| density | {' | '.join(f'λ {scale:g}' for scale in MASK_SCALES)} |",
            )
            self._say("|---" * (len(MASK_SCALES) + 1) + "|")
            for density in DENSITIES:
                cells = []
                for scale in MASK_SCALES:
                    label = f"density {density:g}, λ {scale:g}"
                    cell_rows = [
                        row
                        for row in self.rows
                        if row.table == table
                        and row.method == label
                        and row.group.startswith(group)
                    ]
                    cells.append(_cell(summarise(cell_rows, value=value)))
                self._say(f"| {density:g} | {' | '.join(cells)} |")
            self._say("")
        self._plot("density")

    def _language(self) -> None:
        if not self._has("language", "Language ability restored to one expert"):
            return
        columns: list[Column] = [("text tasks", _in("single/text"), "value")]
        columns.append(("the expert's own tasks", lambda row: row.group != "single/text", "value"))
        self._table("language", columns)
        self._say(
            "One expert and its base (arXiv 2505.16703). **Neuron-Fusion is a reconstruction**: "
            "the paper's formulas were not available, and these are not figures of the paper. "
            "The paper reports that Neuron-Fusion keeps more "
            "language than the others at equal visual ability.",
            "",
            *readings.language(self.rows),
        )

    def _calibrate(self) -> None:
        if not self._has("calibration", "Calibration without labels"):
            return
        scales = self.scales
        assert scales.without_labels is not None  # the jobs of this table follow from it
        chosen = {
            "without labels": scales.without_labels.mask_scales,
            "with labels": scales.with_labels,
        }
        for label, mask_scales in chosen.items():
            self._say(
                f"- {label}: "
                + ", ".join(f"{name} {scale:g}" for name, scale in mask_scales.items())
            )
        self._say("")
        columns: list[Column] = [
            (
                "performance retention",
                lambda row: row.group.startswith("many single/"),
                "performance_retention",
            ),
            ("accuracy, one modality", lambda row: row.group.startswith("many single/"), "value"),
            ("accuracy, mixes", lambda row: row.group.startswith("many mix/"), "value"),
        ]
        self._table("calibration", columns)
        sizes, (num_single, num_mixed) = self.place.sizes, count_prompts(self.place, scales.mmer)
        self._say(
            f"Both see the same {num_single} validation prompts of one modality and {num_mixed} "
            "of several, "
            "the same grid, and weigh retention, expansion and mixed "
            "prompts alike. Without labels: `mmerge calibrate`, by the probability of the "
            "experts' own answers. With labels: by right answers. Both "
            "are then measured on test prompts, more than for the other tables: per seed "
            f"{sizes.many_single} per modality, {sizes.many_mixed} per mix. "
            "Differences are paired by task and seed, ± is their standard error.",
            "",
            *readings.calibration(self.rows, scales.without_labels),
        )
        self._plot("calibration")

    def _modalities(self) -> list[str]:
        return [m for m in MODALITIES if any(row.group == f"single/{m}" for row in self.rows)]


def _cell(figure: Figure | None) -> str:
    return NOT_MEASURED if figure is None else str(figure)


def _in(group: str) -> Callable[[Row], bool]:
    return lambda row: row.group == group


def _mix(count: int) -> Callable[[Row], bool]:
    return lambda row: row.group.startswith("mix/") and row.group.count("+") == count - 1


def _share(count: int) -> Callable[[Row], bool]:
    return lambda row: row.group.startswith("share/") and row.group.count("+") == count - 1
