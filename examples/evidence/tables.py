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
UNCALIBRATED = {
    "MMER, λ = 0.75": {"method": "mmer"},
    "TALL, λ = 0.4": {"method": "tall_masks"},
    "task arithmetic, scale 0.4": {"method": "task_arithmetic", "scale": 0.4},
}
ABLATIONS = {
    "MMER": {"method": "mmer"},
    "without directional congruence": {"method": "mmer_without_congruence"},
    "without dominant significance": {"method": "mmer_without_significance"},
    "Euclidean distance": {"method": "mmer_euclidean"},
}
TEXT_TOKENS = {
    "MMER": ("MMER", "MMER"),
    "MMER, text tokens without directional congruence": ("MMER", "without directional congruence"),
    "MMER, text tokens without dominant significance": ("MMER", "without dominant significance"),
    "MMER, text tokens of TIES": ("MMER", "TIES"),
    "MMER, text tokens of SWUDI": ("MMER", "SWUDI"),
    "without directional congruence, text tokens of MMER": (
        "without directional congruence",
        "MMER",
    ),
    "without dominant significance, text tokens of MMER": ("without dominant significance", "MMER"),
}
"""Whose weights media tokens run through, and whose text tokens run through."""
VARIANTS = {
    "sum, scope model, merge all (default)": {"method": "mmer"},
    "mean": {"method": "mmer", "reduction": "mean"},
    "scope tensor": {"method": "mmer", "scope": "tensor"},
    "merge linear": {"method": "mmer", "merge": "linear"},
}
DENSITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
MASK_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
LANGUAGE = {
    "TIES": {"method": "ties"},
    "DARE": {"method": "dare_linear"},
    "Breadcrumbs": {"method": "breadcrumbs"},
    "DELLA": {"method": "della"},
    "Neuron-Fusion (reconstruction), keep 10 %": {"method": "neuron_fusion"},
    "Neuron-Fusion (reconstruction), keep 50 %": {"method": "neuron_fusion", "keep_ratio": 0.5},
    "Neuron-Fusion (reconstruction), keep 50 %, restore": {
        "method": "neuron_fusion",
        "keep_ratio": 0.5,
        "restore": True,
    },
    "Neuron-Fusion (reconstruction), keep 10 %, suppress to 0.5": {
        "method": "neuron_fusion",
        "suppress": 0.5,
    },
}


def experts_of(names: Mapping[str, str] | tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Return the experts of a recipe: folder and modality by name.

    `image_new` and `twins/image` have modality image.
    """
    experts = {}
    for name in names:
        modality = name.removesuffix("_new").removeprefix("twin_")
        folder = f"twins/{modality}" if name.startswith("twin_") else name
        experts[name] = {"path": folder, "modality": modality}
    return experts


def original(name: str) -> dict[str, Any]:
    """One expert as it is."""
    return {"method": "linear", "experts": experts_of((name,))}


def scaled(names: tuple[str, ...], scales: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return the experts of a recipe with their mask scales.

    An expert that learned a new task has the scale of its original.
    """
    return {
        name: {**expert, **({"mask_scale": scales[expert["modality"]]} if scales else {})}
        for name, expert in experts_of(names).items()
    }


class Jobs:
    """All jobs of the experts that there are, in the order in which they matter."""

    def __init__(
        self,
        available: set[str],
        *,
        mmer: Mapping[str, float],
        tall: Mapping[str, float],
        labelled: Mapping[str, float],
    ) -> None:
        """Take mask scales by expert.

        `mmer` and `tall` are chosen without labels, `labelled` (for MMER) with labels.
        """
        self.available, self.mmer, self.tall, self.labelled = available, mmer, tall, labelled
        self.modalities = tuple(m for m in ("image", "audio", "video", "point") if m in available)
        self.sets = set_names(self.modalities)
        self.mixed = (*self.sets["mix"], *self.sets["share"])
        self.largest = (self.sets["mix"][-1], *self.sets["share"][-1:])

    def make(self) -> list[Job]:
        """The jobs."""
        masks = {
            "EMR": self._recipe({"method": "emr"}),
            "TALL": self._tall(),
            "MMER": self._mmer({"method": "mmer"}),
        }
        others = {label: self._recipe(numbers) for label, numbers in (PLAIN | UNCALIBRATED).items()}
        jobs = [
            Job("retention", "original", original(m), (f"single/{m}",), m) for m in self.modalities
        ]
        for label, recipe in (masks | others).items():
            jobs += self._rebuilt("retention", label, recipe)
        for label, recipe in {"MMER": masks["MMER"], **others, **masks}.items():
            jobs += [
                Job("expansion", label, recipe, self.mixed),
                Job("expansion", label, recipe, tuple(self.sets["single"])),
            ]
        for m in self.modalities:
            mixes_with = tuple(
                name for name in self.mixed if m in name.partition("/")[2].split("+")
            )
            jobs.append(Job("expansion", f"{m} expert alone", original(m), mixes_with, m, m))
        for label, numbers in ABLATIONS.items():
            recipe = self._mmer(numbers)
            jobs += [
                Job("ablations", label, recipe, self.mixed),
                *self._rebuilt("ablations", label, recipe),
            ]
        recipe = self._recipe({"method": "mmer", "mask_scale": 1.0})
        jobs += [
            Job("ablations", "λ = 1", recipe, self.mixed),
            *self._rebuilt("ablations", "λ = 1", recipe),
        ]
        jobs += (
            self._text_tokens()
            + self._damc()
            + self._calibration()
            + self._forgetting()
            + self._numbers_of_experts()
        )
        for label, numbers in VARIANTS.items():
            recipe = self._mmer(numbers)
            jobs += [
                *self._rebuilt("variants", label, recipe),
                Job("variants", label, recipe, self.largest),
            ]
        return jobs + self._language() + self._density()

    def _recipe(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        return {**numbers, "experts": experts_of(self.modalities)}

    def _mmer(self, numbers: Mapping[str, Any], names: tuple[str, ...] = ()) -> dict[str, Any]:
        return {**numbers, "experts": scaled(names or self.modalities, self.mmer)}

    def _tall(self, names: tuple[str, ...] = ()) -> dict[str, Any]:
        return {"method": "tall_masks", "experts": scaled(names or self.modalities, self.tall)}

    def _rebuilt(self, table: str, label: str, recipe: dict[str, Any]) -> list[Job]:
        return [Job(table, label, recipe, (f"single/{m}",), m) for m in self.modalities]

    def _text_tokens(self) -> list[Job]:
        jobs = []
        for label, (media, text) in TEXT_TOKENS.items():
            recipes = [
                self._mmer(ABLATIONS[method])
                if method in ABLATIONS
                else self._recipe(PLAIN[method])
                for method in (media, text)
            ]
            jobs.append(
                Job(
                    "text tokens",
                    label,
                    recipes[0],
                    self.mixed,
                    text=None if media == text else recipes[1],
                )
            )
        return jobs

    def _damc(self) -> list[Job]:
        if not all(f"twins/{m}" in self.available for m in self.modalities):
            return []
        recipe = {
            "method": "damc",
            "experts": experts_of(tuple(f"twin_{m}" for m in self.modalities)),
        }
        jobs = [
            Job("retention", "original (LoRA twin)", recipe, (f"single/{m}",), f"twin_{m}")
            for m in self.modalities
        ]
        jobs += [
            Job("retention", "DAMC (all adapters at work)", recipe, (f"single/{m}",))
            for m in self.modalities
        ]
        return [
            *jobs,
            Job("expansion", "DAMC", recipe, self.mixed),
            Job("expansion", "DAMC", recipe, tuple(self.sets["single"])),
        ]

    def _calibration(self) -> list[Job]:
        mixes = tuple(name for name in self.sets["many"] if "+" in name)
        jobs = [
            Job("calibration", "original", original(m), (f"many single/{m}",), m)
            for m in self.modalities
        ]
        for label, scales in (
            ("λ = 0.75 for all", {}),
            ("without labels", self.mmer),
            ("with labels", self.labelled),
        ):
            recipe = {"method": "mmer", "experts": scaled(self.modalities, scales)}
            jobs += [
                Job("calibration", label, recipe, (f"many single/{m}",), m) for m in self.modalities
            ]
            jobs.append(Job("calibration", label, recipe, mixes))
        return jobs

    def _forgetting(self) -> list[Job]:
        new = [
            f"{m}_new"
            for m in ("image", "audio")
            if f"{m}_new" in self.available and m in self.modalities
        ]
        jobs = []
        for count in range(1, len(new) + 1):
            table, chosen = f"forgetting, {count} new", tuple(new[:count])
            names = (*self.modalities, *chosen)
            recipes = {
                label: {**PLAIN[label], "experts": experts_of(names)}
                for label in ("NaiveMC", "task arithmetic", "TIES")
            }
            recipes["EMR"] = {"method": "emr", "experts": experts_of(names)}
            recipes |= {"TALL": self._tall(names), "MMER": self._mmer({"method": "mmer"}, names)}
            pairs = [(name, name.removesuffix("_new")) for name in chosen]
            for name, m in pairs:
                both = (f"single/{m}", f"new/{m}")
                jobs.append(Job(table, "before tuning on the new task", original(m), both, m))
                jobs.append(Job(table, "tuned on the new task", original(name), both, name))
            for label, recipe in recipes.items():
                for name, m in pairs:
                    jobs.append(Job(table, f"{label}, previous tasks", recipe, (f"single/{m}",), m))
                    jobs.append(Job(table, f"{label}, new task", recipe, (f"new/{m}",), name))
        return jobs

    def _numbers_of_experts(self) -> list[Job]:
        jobs = []
        for count in range(2, len(self.modalities) + 1):
            for chosen in combinations(self.modalities, count):
                recipe = self._mmer({"method": "mmer"}, chosen)
                jobs += [
                    Job("number of experts", f"{count} experts", recipe, (f"single/{m}",), m)
                    for m in chosen
                ]
        return jobs

    def _density(self) -> list[Job]:
        jobs = []
        for density in DENSITIES:
            for scale in MASK_SCALES:
                recipe = self._recipe({"method": "mmer", "density": density, "mask_scale": scale})
                label = f"density {density:g}, λ {scale:g}"
                jobs += [*self._rebuilt("density × mask scale", label, recipe)]
                jobs.append(Job("density × mask scale", label, recipe, self.largest[:1]))
        return jobs

    def _language(self) -> list[Job]:
        chosen = [m for m in ("image", "audio") if m in self.modalities]
        jobs = []
        if chosen:
            # The base itself: an expert merged with coefficient 0.
            recipe = {
                "method": "task_arithmetic",
                "scale": 0.0,
                "experts": experts_of((chosen[0],)),
            }
            jobs.append(Job("language", "base", recipe, ("single/text",), chosen[0]))
        for m in chosen:
            sets = ("single/text", f"single/{m}")
            jobs.append(Job("language", f"{m}: expert", original(m), sets, m))
            for label, numbers in LANGUAGE.items():
                jobs.append(
                    Job(
                        "language",
                        f"{m}: {label}",
                        {**numbers, "experts": experts_of((m,))},
                        sets,
                        m,
                    )
                )
        return jobs
