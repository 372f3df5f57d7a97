"""Answers while they are generated: rows that end by themselves, and text of unfinished tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from architectures import build_masks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmerge.manifests.errors import PromptError
from mmerge.pipeline import Composite, Part, load_composite
from mmerge.workers.generation.answer_stream import TokenRelay, stream_text
from mmerge.workers.generation.token_text import TokenText

PROMPTS = [[Part.text("w5 w6")], [Part.text("w7 w8 w9 w10")], [Part.text("w11")]]


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Composite:
    folder: Path = tmp_path_factory.mktemp("rows")
    return load_composite(build_masks(folder, "llama"))


def generate_rows(composite: Composite, lengths: list[int]) -> list[list[int]]:
    """Return the tokens of each row, which ends after the given length."""
    rows: list[list[int]] = [[] for _ in PROMPTS]

    def receive(row: int, token: int) -> bool:
        rows[row].append(token)
        return len(rows[row]) < lengths[row]

    receivers = [lambda token, row=row: receive(row, token) for row in range(len(rows))]
    with composite.turn:
        embedded = [composite.embed(prompt) for prompt in PROMPTS]
        composite.generate_rows(embedded, receivers, max_new_tokens=9, min_new_tokens=9)
    return rows


def test_each_row_ends_when_its_receiver_says_so_and_the_others_go_on(composite: Composite) -> None:
    whole = generate_rows(composite, [9, 9, 9])
    assert [len(row) for row in whole] == [9, 9, 9]
    assert generate_rows(composite, [2, 9, 5]) == [whole[0][:2], whole[1], whole[2][:5]]


def test_a_generation_ends_with_its_last_row(composite: Composite) -> None:
    passes = []
    hook = composite.language_model.register_forward_pre_hook(lambda *_: passes.append(1))
    generate_rows(composite, [1, 3, 2])
    hook.remove()
    assert len(passes) == 3


def test_beams_cannot_be_streamed(composite: Composite) -> None:
    with pytest.raises(PromptError, match="num_beams: an answer of several beams"):
        list(composite.stream(PROMPTS[0], num_beams=2))


def test_a_row_is_not_told_of_the_padding_behind_its_end_token() -> None:
    import torch

    received: list[int] = []

    def receive(token: int) -> bool:
        received.append(token)
        return True

    relay = TokenRelay([receive], end_tokens=[2, 3], can_stop=True)
    ended = [bool(relay(torch.tensor([[9, token]]), None)[0]) for token in (5, 3, 0, 0)]
    assert received == [5, 3]
    assert ended == [False, True, True, True]


def make_tokenizer(*, spaces: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, so that most characters of other scripts take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaces)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cat sat on the mat. "] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


TEXTS = [
    "the cat sat",
    "  two spaces  inside  ",
    "naïve café — 東京 🎈🎈 end\n",
    "\n\n",
    "",
    "🎈",
    "a�b",
]


@pytest.mark.parametrize("spaces", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_of_a_text_joined_are_the_stripped_text(text: str, spaces: bool) -> None:
    tokenizer = make_tokenizer(spaces=spaces)
    tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    stream = TokenText(tokenizer)
    pieces = [stream.push(token) for token in tokens]
    pieces.append(stream.finish())
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert stream.num_tokens == len(tokens)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1] if "�" not in text)


def test_a_text_of_any_tokens_is_told_whole() -> None:
    tokenizer = make_tokenizer(spaces=False)
    draw = random.Random(1)
    for _ in range(50):
        tokens = [draw.randrange(len(tokenizer)) for _ in range(30)]
        stream = TokenText(tokenizer)
        told = "".join(stream.push(token) for token in tokens) + stream.finish()
        assert told == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_an_error_of_the_generation_reaches_the_reader_after_its_pieces() -> None:
    tokenizer = make_tokenizer(spaces=False)

    def generate(receive: object) -> None:
        assert callable(receive)
        for token in tokenizer("the cat")["input_ids"]:
            receive(token)
        raise PromptError("no more")

    pieces = stream_text(generate, tokenizer=tokenizer)
    assert next(pieces) + next(pieces) == "the cat"
    with pytest.raises(PromptError, match="no more"):
        next(pieces)
