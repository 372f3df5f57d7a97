"""Options of generation that a composite can honour, checked by name and value.

transformers takes many more. Some need a second forward pass without media (guidance), another
model (assistants) or code from the Hub (custom decoding): routing by modality cannot follow them,
and they would be ignored or answer wrongly.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from mmerge.manifests.errors import PromptError

_MAX_SEED = (1 << 64) - 1
_MAX_BEAMS = 64
_FLAGS = ("do_sample", "early_stopping", "renormalize_logits", "remove_invalid_values")
_NEVER = "never"
"""The value of `early_stopping` that is no flag."""
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (1e-4, 1e4),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (1e-6, 1.0),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "length_penalty": (-100.0, 100.0),
    "max_time": (1e-3, 1e9),
}
"""Smallest and largest value of each."""
_COUNTS: Mapping[str, tuple[int, int]] = {
    "top_k": (0, 1 << 31),
    "num_beams": (1, _MAX_BEAMS),
    "min_new_tokens": (0, 1 << 31),
    "no_repeat_ngram_size": (0, 1 << 20),
}
_OBJECTS = (
    "eos_token_id",
    "pad_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "logits_processor",
    "stopping_criteria",
    "streamer",
)
"""Checked by transformers."""
SUPPORTED_OPTIONS = (*_FLAGS, *_NUMBERS, *_COUNTS, *_OBJECTS)


def check_request(*, max_new_tokens: Any, seed: Any) -> None:
    """Raise PromptError for a length of the answer, or a seed, that is no number in its range."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral):
        raise PromptError(f"max_new_tokens: expected a whole number, got {max_new_tokens!r}")
    if max_new_tokens < 1:
        raise PromptError(f"{max_new_tokens} tokens are to be generated; ask for at least one")
    _check_seed(seed)


def check_options(options: Mapping[str, Any]) -> None:
    """Check options of `generate` of transformers.

    Raises:
        PromptError: a composite does not honour one of them, or its value is out of range.
    """
    for name, value in options.items():
        if name not in SUPPORTED_OPTIONS:
            similar = difflib.get_close_matches(name, SUPPORTED_OPTIONS, n=1)
            hint = f" Did you mean {similar[0]!r}?" if similar else ""
            raise PromptError(
                f"{name}: is no option that a composite honours.{hint} Supported are"
                f" {', '.join(sorted(SUPPORTED_OPTIONS))}"
            )
        if value is None:
            continue
        is_never = name == "early_stopping" and value == _NEVER
        if name in _FLAGS and not isinstance(value, bool) and not is_never:
            raise PromptError(f"{name}: expected true or false, got {value!r}")
        if name in _NUMBERS:
            _check_range(name, value, Real, _NUMBERS[name])
        if name in _COUNTS:
            _check_range(name, value, Integral, _COUNTS[name])


def _check_range(name: str, value: Any, kind: type, bounds: tuple[float, float]) -> None:
    lowest, highest = bounds
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= highest:  # NaN is in no range
        noun = "a whole number" if kind is Integral else "a number"
        raise PromptError(f"{name}: expected {noun} from {lowest:,} to {highest:,}, got {value!r}")


def _check_seed(seed: Any) -> None:
    """Raise PromptError for a seed that the generator of random numbers does not take."""
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) <= _MAX_SEED:
        raise PromptError(f"seed: expected a whole number from 0 to 2⁶⁴ − 1, got {seed!r}")
