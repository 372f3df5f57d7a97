"""Figures of the papers, for side by side. None of them is of this project."""

from __future__ import annotations

MMER = "MMER, arXiv 2505.17110"
RETENTION = {
    "NaiveMC": "97.5 / 88.3",
    "task arithmetic": "98.3 / 91.0",
    "TIES": "98.3 / 90.6",
    "PCB": "99.1 / 92.6",
    "MMER": "99.8 / 99.4",
}
"""Performance retention in per cent, caption scores / accuracy."""
EXPANSION = {
    "NaiveMC": "53.23",
    "task arithmetic": "53.90",
    "TIES": "54.10",
    "PCB": "54.92",
    "MMER": "56.82",
}
"""Average of nine columns."""
ABLATIONS = {
    "MMER": "56.82",
    "without directional congruence": "7.20",
    "without dominant significance": "33.87",
    "λ = 1": "54.02",
}
"""On expansion."""
NUMBER = {"2 experts": "≈ 100", "3 experts": "99.7", "4 experts": "99.4"}
FORGETTING = "new task 57.71 against 57.80 for full fine-tuning, previous tasks 62.20 against 62.23"
MASK_DENSITIES = {"image": "34.1", "audio": "2.2", "video": "15.7", "point": "43.8"}
"""Per cent."""
MEAN_MAGNITUDES = {"image": 5e-4, "point": 5e-4, "video": 2e-4, "audio": 8e-5}
"""Mean |τ|."""
