"""Regular expressions of checkpoints take bounded time."""

from __future__ import annotations

import re
import time

import pytest

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.adapters.module_patterns import ModulePatterns
from mmerge.workers.checkpoints.pattern_checks import find_costly_part

MODULE = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a*)*b",
        "(?:a|a)*b",
        "(a|aa)+$",
        "((ab)*)*",
        "(x+x+)+y",
        "([a-z]+)*!",
        "(a+){2,}",
        "(a?){5000}",
        r"(\w+\s?)*$",
        "((a)|b)+",
        "(?i:a+)+",
        "(a{1,9})*",
        "(]*)+",
    ],
)
def test_a_repeat_of_repeats_or_branches_is_found(pattern: str) -> None:
    assert find_costly_part(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n]*",
        r" ?[^(\s|[.,!?…。，、।۔،])]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}]+(?i:'s|'t|'re)?",
        r"model\.layers\.(0|1|2[0-9])\..*q_proj",
        r"(abc)+",
        r"(a\+)+",
        r"([+*])+",
        r"(?=a+)",
        "a{,3}x{",
    ],
)
def test_patterns_of_real_tokenizers_and_adapters_pass(pattern: str) -> None:
    assert find_costly_part(pattern) == ""


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", True),
        (r"self_attn\.q_proj", True),
        (r".*\.(q|k)_proj", True),
        ("proj", False),
        ("q", False),
        ("(", False),
        (r"layers\.1\.self_attn\.q_proj", False),
    ],
)
def test_a_pattern_matches_as_in_peft(pattern: str, matches: bool) -> None:
    value = ModulePatterns(where="x").find({"k": {pattern: 4}}, "k", module=MODULE, default=None)
    assert (value == 4) == matches
    if pattern != "(":
        assert bool(re.match(rf"(.*\.)?({pattern})$", MODULE)) == matches


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        ({"(a+)+b": 1}, "itself repeats or branches"),
        ({"x" * 1001: 1}, "has 1,001 characters, at most 1,000"),
        ({f"p{index}": 1 for index in range(1001)}, "has 1,001 patterns, at most 1,000"),
    ],
)
def test_costly_patterns_of_an_adapter_are_refused(patterns: dict[str, int], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        ModulePatterns(where="x").find({"k": patterns}, "k", module=MODULE, default=None)


def test_patterns_that_are_slow_all_the_same_run_out_of_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmerge.workers.adapters.module_patterns.MATCH_SECONDS", 0.01)
    patterns = {".*[ab]" * 8 + "[xy]" * (index + 1): 1 for index in range(20)}
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"take more than 0\.01 s"):
        ModulePatterns(where="x").find({"k": patterns}, "k", module="a" * 900 + "z", default=None)
    assert time.monotonic() - began < 20
