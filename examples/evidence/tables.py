"""Which jobs each table is made of, the most important tables first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from evidence.measure import Job
from evidence.sets import set_names

PLAIN = {
    "NaiveMC": {"method": "naive_mc"},
    "task arithmetic": {"method": "task_arithmetic"},
    "TIES": {"method": "ties"},
    "DARE": {"method": "dare_ties"},
    "PCB": {"method": "pcb"},
    "consensus": {"method": "consensus"},
    "OptMerge": {"method": "optmerge"},
    "SWUDI": {"method": "swudi"},
}
"""Static merges: one model for all."""
MASKS = {"EMR": {"method": "emr"}, "TALL": {"method": "tall_masks"}, "MMER": {"method": "mmer"}}
"""What stores base, one merged task vector and a mask per expert."""
ABLATIONS = {
    "MMER": {"method": "mmer"},
    "without directional congruence": {"method": "mmer_without_congruence"},
    "without dominant significance": {"method": "mmer_without_significance"},
    "λ = 1": {"method": "mmer", "mask_scale": 1.0},
    "Euclidean distance": {"method": "mmer_euclidean"},
}
VARIANTS = {
    "sum, scope model, merge all (default)": {"method": "mmer"},
    "mean": {"method": "mmer", "reduction": "mean"},
    "scope tensor": {"method": "mmer", "scope": "tensor"},
    "merge linear": {"method": "mmer", "merge": "linear"},
}
DENSITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
MASK_SCALES = (0.5, 0.6, 0.75, 0.9, 1.0, 1.25)
LANGUAGE = {
    "TIES": {"method": "ties"},
    "DARE": {"method": "dare_linear"},
    "Breadcrumbs": {"method": "breadcrumbs"},
    "DELLA": {"method": "della"},
    "Neuron-Fusion (reconstruction), keep 10 %": {"method": "neuron_fusion"},
    "Neuron-Fusion (reconstruction), keep 50 %": {"method": "neuron_fusion", "keep_ratio": 0.5},
    "Neuron-Fusion (reconstruction), keep 50 %, restore": {"method": "neuron_fusion", "keep_ratio": 0.5, "restore": True},
    "Neuron-Fusion (reconstruction), keep 10 %, suppress to 0.5": {"method": "neuron_fusion", "suppress": 0.5},
}


def experts_of(names: Mapping[str, str] | tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The experts of a recipe: folder and modality by name (`image_new` reads images, `twins/image` too)."""
    found = {}
    for name in names:
        modality = name.removesuffix("_new").removeprefix("twin_")
        folder = f"twins/{modality}" if name.startswith("twin_") else name
        found[name] = {"path": folder, "modality": modality}
    return found


def original(name: str) -> dict[str, Any]:
    """One expert as it is."""
    return {"method": "linear", "experts": experts_of((name,))}


def make_jobs(available: set[str]) -> list[Job]:
    """All jobs of the experts that there are, in the order in which they matter."""
    modalities = tuple(m for m in ("image", "audio", "video", "point") if m in available)
    all_experts = experts_of(modalities)
    sets = set_names(modalities)
    mixed = (*sets["mix"], *sets["share"])
    jobs = [Job("retention", "original", original(m), (f"single/{m}",), m) for m in modalities]

    def of_experts(table: str, label: str, numbers: dict[str, Any]) -> list[Job]:
        recipe = {**numbers, "experts": all_experts}
        return [Job(table, label, recipe, (f"single/{m}",), m) for m in modalities]

    def expanded(table: str, label: str, numbers: dict[str, Any], chosen: tuple[str, ...] = mixed) -> list[Job]:
        return [Job(table, label, {**numbers, "experts": all_experts}, chosen)]

    for label, numbers in (MASKS | PLAIN).items():
        jobs += of_experts("retention", label, numbers)
    for label, numbers in {"MMER": MASKS["MMER"], **PLAIN, **MASKS}.items():
        jobs += expanded("expansion", label, numbers)
    for m in modalities:
        own = tuple(name for name in mixed if m in name.partition("/")[2].split("+"))
        jobs.append(Job("expansion", f"{m} expert alone", original(m), own, m, m))
    for label, numbers in ABLATIONS.items():
        jobs += expanded("ablations", label, numbers) + of_experts("ablations", label, numbers)
    jobs += _damc(available, modalities, mixed)
    jobs += _forgetting(available, modalities)
    jobs += _numbers_of_experts(modalities)
    for label, numbers in VARIANTS.items():
        jobs += of_experts("variants", label, numbers) + expanded("variants", label, numbers, tuple(sets["mix"][-1:] + sets["share"][-1:]))
    jobs += _language(modalities)
    for density in DENSITIES:
        for scale in MASK_SCALES:
            numbers = {"method": "mmer", "density": density, "mask_scale": scale}
            label = f"density {density:g}, λ {scale:g}"
            jobs += of_experts("density × mask scale", label, numbers) + expanded(
                "density × mask scale", label, numbers, tuple(sets["mix"][-1:])
            )
    return jobs


def _damc(available: set[str], modalities: tuple[str, ...], mixed: tuple[str, ...]) -> list[Job]:
    if not all(f"twins/{m}" in available for m in modalities):
        return []
    twins = tuple(f"twin_{m}" for m in modalities)
    recipe = {"method": "damc", "experts": experts_of(twins)}
    jobs = [Job("retention", "original (LoRA twin)", recipe, (f"single/{m}",), f"twin_{m}") for m in modalities]
    jobs += [Job("retention", "DAMC (all adapters at work)", recipe, (f"single/{m}",)) for m in modalities]
    return [*jobs, Job("expansion", "DAMC", recipe, mixed)]


def _forgetting(available: set[str], modalities: tuple[str, ...]) -> list[Job]:
    new = [f"{m}_new" for m in ("image", "audio") if f"{m}_new" in available and m in modalities]
    jobs = []
    for count in range(1, len(new) + 1):
        chosen = tuple(new[:count])
        table = f"forgetting, {count} new"
        for name in chosen:
            m = name.removesuffix("_new")
            both = (f"single/{m}", f"new/{m}")
            jobs.append(Job(table, "before tuning on the new task", original(m), both, m))
            jobs.append(Job(table, "tuned on the new task", original(name), both, name))
        for label, numbers in {
            "NaiveMC": PLAIN["NaiveMC"],
            "task arithmetic": PLAIN["task arithmetic"],
            "TIES": PLAIN["TIES"],
            **MASKS,
        }.items():
            recipe = {**numbers, "experts": experts_of((*modalities, *chosen))}
            for name in chosen:
                m = name.removesuffix("_new")
                jobs.append(Job(table, f"{label}, previous tasks", recipe, (f"single/{m}",), m))
                jobs.append(Job(table, f"{label}, new task", recipe, (f"new/{m}",), name))
    return jobs


def _numbers_of_experts(modalities: tuple[str, ...]) -> list[Job]:
    jobs = []
    for count in range(2, len(modalities) + 1):
        for chosen in combinations(modalities, count):
            recipe = {"method": "mmer", "experts": experts_of(chosen)}
            jobs += [Job("number of experts", f"{count} experts", recipe, (f"single/{m}",), m) for m in chosen]
    return jobs


def _language(modalities: tuple[str, ...]) -> list[Job]:
    jobs = []
    for m in [m for m in ("image", "audio") if m in modalities]:
        sets = ("single/text", f"single/{m}")
        jobs.append(Job("language", f"{m}: expert", original(m), sets, m))
        for label, numbers in LANGUAGE.items():
            jobs.append(Job("language", f"{m}: {label}", {**numbers, "experts": experts_of((m,))}, sets, m))
    if jobs:
        # The base itself: an expert merged with coefficient 0.
        recipe = {"method": "task_arithmetic", "scale": 0.0, "experts": experts_of((modalities[0],))}
        jobs.append(Job("language", "base", recipe, ("single/text",), modalities[0]))
    return jobs
