from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmerge.pipeline import make_plan, read_recipe
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.tokenizer import read_vocabulary

WORDS = {f"w{number}": number for number in range(5)}


def write_tokens(folder: Path, vocabulary: Any, **added: int) -> None:
    tokens = [{"content": token, "id": number} for token, number in added.items()]
    raw = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": tokens}
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def warnings_of(lab: Any, raw: dict[str, Any]) -> str:
    return "\n".join(make_plan(read_recipe(lab.write_recipe(raw))).warnings)


def test_an_id_that_is_another_token_in_an_expert_is_a_warning(lab: Any) -> None:
    raw = lab.make_all()
    for name in ("base", "image", "audio", "video"):
        write_tokens(lab.folder / name, WORDS)
    assert warnings_of(lab, raw) == ""
    write_tokens(lab.folder / "audio", WORDS | {"w3": 4, "w4": 3})
    assert (
        "expert 'audio': tokenizers differ, id 3 is 'w4', in the base 'w3'; id 4 is 'w3'"
        in warnings_of(lab, raw)
    )


def test_a_padding_row_that_is_another_token_in_two_experts_is_a_warning(lab: Any) -> None:
    raw = lab.make_all()
    rows = lab.base["model.embed_tokens.weight"].shape[0]
    for name in ("base", "video"):
        write_tokens(lab.folder / name, WORDS)
    write_tokens(lab.folder / "image", WORDS, **{"<image>": 5, "<box>": 6, "<far>": rows})
    write_tokens(lab.folder / "audio", WORDS, **{"<audio>": 5, "<box>": 6, "<wide>": rows})
    text = warnings_of(lab, raw)
    assert text.startswith(
        "expert 'audio': tokenizers differ, id 5 is '<audio>', in expert 'image'"
    )
    assert "<box>" not in text  # the same in both
    assert "<wide>" not in text  # a row that each expert keeps for itself


def test_a_chat_template_that_differs_is_a_warning(lab: Any) -> None:
    raw = lab.make_all()
    (lab.folder / "base" / "chat_template.jinja").write_text("one")
    (lab.folder / "image" / "tokenizer_config.json").write_text('{"chat_template": "two"}')
    (lab.folder / "audio" / "chat_template.json").write_text('{"chat_template": "one"}')
    text = warnings_of(lab, raw)
    assert text.startswith("expert 'image': has a chat template, the base has another")
    assert "\n" not in text


@pytest.mark.parametrize(
    "content",
    ["[1]", "{", '{"model": 3}', '{"model": {"vocab": {"a": "b"}}}', '{"model": {"vocab": [3]}}'],
)
def test_a_tokenizer_that_cannot_be_read_is_a_warning(lab: Any, content: str) -> None:
    raw = lab.make_all()
    write_tokens(lab.folder / "base", WORDS)
    (lab.folder / "image" / "tokenizer.json").write_text(content)
    text = warnings_of(lab, raw)
    assert "expert 'image'" in text
    assert "Its tokens were not compared" in text


def test_every_form_of_a_vocabulary_is_read(lab: Any) -> None:
    folder = lab.make_base()
    base = Checkpoint(str(folder), owner="base")
    assert read_vocabulary(base) is None
    (folder / "vocab.json").write_text(json.dumps(WORDS))
    (folder / "added_tokens.json").write_text('{"<a>": 5}')
    (folder / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"6": {"content": "<b>"}}}'
    )
    assert read_vocabulary(base) == WORDS | {"<a>": 5, "<b>": 6}
    write_tokens(folder, [["x", -1.0], ["y", -2.0]], **{"<c>": 2})
    assert read_vocabulary(base) == {"x": 0, "y": 1, "<c>": 2}
