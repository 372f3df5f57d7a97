"""The first part of the page: what was measured, how to read it, and the experts' task vectors."""

from __future__ import annotations

from pathlib import Path

from evidence import papers
from evidence.changes import Changes
from evidence.measure import Effort, Place, revision


def introduce(place: Place, effort: Effort) -> list[str]:
    """Return the title, what was measured and how to read the tables."""
    sizes, seeds = place.sizes, place.seeds
    revisions = ", ".join(f"{name} {digest[:12]}" for name, digest in _revisions(place))
    return [
        "# The papers' tables on the lab's experts",
        "",
        "Every figure on this page was measured by `make reproduce` from the experts in "
        "`examples/lab/checkpoints` "
        f"({effort.describe()}). "
        "The same figures are in [reproduction.json](reproduction.json).",
        "",
        "**How to read it.** Accuracy in per cent: greedy decoding must give the whole "
        "answer and then end. Mean ± standard deviation over "
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}). A seed selects a set of held-out "
        "prompts with digits and voices that were never trained on; **the experts come from "
        "one training run**, so the spread does not include variation between training runs.",
        "",
        f"Per seed {sizes.single} prompts per modality, {sizes.mixed} per mix of modalities, "
        f"{sizes.share} per mix for *share* "
        f"(what do all digits share, the lab's MCUB-like task), {sizes.new} per new task. "
        "Performance retention is the mean over tasks of "
        "accuracy / accuracy of the original expert on the same prompts. Composites are "
        "loaded in float32.",
        "",
        "Methods have their defaults ([methods.md](methods.md)) unless a row says otherwise. "
        "The mask scales of MMER and TALL are calibrated "
        "without labels on validation prompts (last section), as the paper calibrates them "
        "per modality; rows with a fixed λ are shown for comparison. "
        "No hyper-parameter was chosen on the prompts that are measured here.",
        "",
        f"Experts measured (digest of the weights): {revisions}.",
        "",
        "**The papers' figures** are theirs: 7B models, other tasks, other data. They serve "
        "to compare the order of methods and the gaps between them, not values. "
        "A cell is empty where no published figure is known.",
        "",
    ]


def describe_experts(changes: Changes) -> list[str]:
    """Return the table of the experts' task vectors."""
    lines = [
        "## What the experts changed",
        "",
        "| expert | ‖τ‖ / ‖θ₀‖ | mean \\|τ\\| | mask density | theirs: mask density | sign"
        " agreement |",
        "|---|---|---|---|---|---|",
    ]
    for change in changes.experts:
        theirs = papers.MASK_DENSITIES.get(change.expert, "")
        lines.append(
            f"| {change.expert} | {change.relative_norm:.3f} | {change.mean_magnitude:.1e} |"
            f" {100 * change.mask_density:.1f} | {theirs} | {100 * change.sign_agreement:.1f} |"
        )
    magnitudes = ", ".join(f"{name} {value:.0e}" for name, value in papers.MEAN_MAGNITUDES.items())
    return [
        *lines,
        "",
        "Task vectors of the merged language-model tensors; masks of MMER with the "
        "calibrated scales; densities and agreement in per cent. Sign "
        "agreement: share of the expert's trimmed entries whose sign is the elected one. "
        f"Theirs, mean |τ|: {magnitudes}.",
        "",
    ]


def _revisions(place: Place) -> list[tuple[str, str]]:
    root = Path(place.checkpoints)
    folders = sorted({str(path.parent.relative_to(root)) for path in root.rglob("*.safetensors")})
    return [(folder, revision(str(root / folder))) for folder in folders if folder.count("/") < 2]
