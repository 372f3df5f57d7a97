"""Configuration, tokenizer and processor files: no code is run, no size or pattern is unbounded."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.modalities.expert_model import make_config, make_model
from mmerge.workers.modalities.processor_encoder import load_tokenizer
from mmerge.workers.modalities.processor_inputs import open_inputs
from mmerge.workers.modalities.small_files import read_config, to_loadable_files

LAB = Path(__file__).resolve().parents[3] / "examples" / "lab" / "checkpoints"


def read_files(expert: str) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (LAB / expert).iterdir()
        if path.suffix in (".json", ".jinja")
    }


def change(files: dict[str, bytes], name: str, **values: Any) -> dict[str, bytes]:
    return files | {name: json.dumps(json.loads(files[name]) | values).encode()}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code that leaves a trace; questions on the terminal are answered yes."""
    (tmp_path / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'TRACE')!r}).touch()\nclass T: pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    return tmp_path


@pytest.mark.parametrize("target", ["evil.T", "FOLDER--evil.T", "other/repo--evil.T"])
@pytest.mark.parametrize(
    ("name", "key", "kind"),
    [
        ("processor_config.json", "AutoProcessor", "processor_class"),
        ("tokenizer_config.json", "AutoTokenizer", "tokenizer_class"),
    ],
)
def test_code_of_a_checkpoint_is_neither_run_nor_asked_for(
    name: str, key: str, kind: str, target: str, evil: Path
) -> None:
    reference: Any = target.replace("FOLDER", str(evil))
    reference = [reference, None] if key == "AutoTokenizer" else reference
    files = change(read_files("image"), name, auto_map={key: reference}, **{kind: "EvilClass"})
    files["evil.py"] = (evil / "evil.py").read_bytes()
    with suppress(CheckpointError):  # or a class of transformers is taken
        if key == "AutoTokenizer":
            load_tokenizer(files, config=make_config(files, owner="x"), owner="x")
        else:
            open_inputs("llava", files, owner="x")
    assert not (evil / "TRACE").exists()


def test_auto_map_is_removed_at_any_depth_and_the_rest_is_kept() -> None:
    files = {
        "a.json": b'{"x": [{"auto_map": {"A": "b"}, "y": 1}], "z": "\\u00e9"}',
        "b.json": b"{}",
    }
    loadable = to_loadable_files(files, owner="x")
    assert json.loads(loadable["a.json"]) == {"x": [{"y": 1}], "z": "é"}
    assert loadable["b.json"] == files["b.json"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"attn_implementation": "kernels-community/evil"}, "names code outside transformers"),
        ({"text_config": {"_attn_implementation": "a/b"}}, "names code outside transformers"),
        ({"num_hidden_layers": 10**8}, "100,000,000 layers, at most 2,000"),
        ({"vision_config": {"num_hidden_layers": 10**7}}, "10,000,000 layers"),
        ({"depths": [2, 10**6]}, "1,000,000 layers"),
    ],
)
def test_a_hostile_configuration_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_config(json.dumps(values).encode(), owner="x")


@pytest.mark.parametrize(
    "values",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["PreTrainedModel"]},
        {"architectures": [5]},
        {"architectures": "LlavaForConditionalGeneration"},
        {"model_type": ["llava"]},
        {"model_type": "evil"},
        {
            "vision_config": {
                "image_size": 10**6,
                "patch_size": 8,
                "model_type": "clip_vision_model",
            }
        },
        {"text_config": {"rms_norm_eps": "x", "model_type": "llama"}},
        {"text_config": {"hidden_act": "__import__('os')", "model_type": "llama"}},
    ],
)
def test_a_configuration_of_no_such_model_is_refused(values: dict[str, Any]) -> None:
    import torch

    files = change(read_files("image"), "config.json", **values)
    with pytest.raises(CheckpointError):
        make_model(
            make_config(files, owner="x"),
            {"a": torch.zeros(1)},
            dtype=torch.float32,
            owner="x",
            may_lack=lambda _: False,
        )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("processor_config.json", '{"size": {"shortest_edge": 1000000}}', "1,000,000 pixels on a"),
        ("preprocessor_config.json", '{"crop_size": {"height": 5000}}', "5,000 pixels on a side"),
        ("preprocessor_config.json", '{"size": 99999}', "99,999 pixels on a side"),
        ("preprocessor_config.json", '{"n_samples": 1000000000000}', "at most 67,108,864"),
        ("tokenizer.json", '{"pre_tokenizer": {"pattern": {"Regex": "(a+)+$"}}}', "itself repeats"),
        ("tokenizer.json", '{"a": {"Regex": "' + "x" * 1001 + '"}}', "1,001 characters"),
        ("tokenizer.json", "[" * 100_000, "no valid JSON"),
        ("special_tokens_map.json", '{"a": "\\ud800"}', "surrogate"),
    ],
)
def test_hostile_sizes_and_patterns_are_refused(name: str, content: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        to_loadable_files({name: content.encode()}, owner="x")


def test_sizes_of_real_processors_pass() -> None:
    qwen = b'{"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "max_pixels": 12845056}'
    to_loadable_files({"preprocessor_config.json": qwen}, owner="x")
    for expert in ("image", "audio", "video"):
        to_loadable_files(read_files(expert), owner="x")
