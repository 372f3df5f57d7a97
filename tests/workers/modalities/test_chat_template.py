"""Chat templates: rendered apart, within bounds, with texts and inputs in their places."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from mmerge.manifests.errors import CheckpointError, PromptError
from mmerge.workers.modalities.chat_template import ChatPart, ChatTemplate, find_chat_template
from mmerge.workers.modalities.prompt import Part

IMAGE = Part("image", "a.png")
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return a tokenizer of single characters, with some words of templates."""
    words = ["?", *map(chr, range(32, 127)), "\n", "SENTENCE"]
    inner = Tokenizer(
        WordLevel({word: index for index, word in enumerate(dict.fromkeys(words))}, unk_token="?")
    )
    inner.pre_tokenizer = Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        unk_token="?",
        additional_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
    )


@pytest.fixture(scope="module")
def make(tokenizer: Any) -> Callable[[str], ChatTemplate]:
    return lambda text: ChatTemplate(text, owner="expert 'one'", load_tokenizer=lambda: tokenizer)


def text(value: str) -> ChatPart:
    return ChatPart(Part.text(value))


def image(*placeholders: str) -> ChatPart:
    return ChatPart(IMAGE, placeholders or ("<image>",), "image")


def as_transformers(tokenizer: Any, template: str, content: Any) -> str:
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    return rendered


def flatten(segments: list[str | Part]) -> str:
    return "".join(
        item if isinstance(item, str) else str(item.placeholder or item.kind) for item in segments
    )


def test_a_question_with_an_image_is_what_transformers_makes_of_it(
    tokenizer: Any, make: Callable[[str], ChatTemplate]
) -> None:
    question = "what is <image>? "
    chat = make(LLAVA)
    segments = chat.format([image(), text(question)])
    content = [{"type": "image"}, {"type": "text", "text": question}]
    assert flatten(segments) == as_transformers(tokenizer, LLAVA, content)
    assert [item.value for item in segments if isinstance(item, Part)] == ["a.png"]
    # The placeholder in the user's text stays text.
    assert segments[2] == f"\n{question} ASSISTANT:"
    prompt = chat.tokenise(segments)
    expected = tokenizer(flatten(segments), add_special_tokens=False)["input_ids"]
    found = [
        token
        for part in prompt
        for token in (part.value if part.kind == "ids" else [expected[len("USER: ")]])
    ]
    assert found == expected


def test_a_language_models_template_gets_text_and_trims_it(
    tokenizer: Any, make: Callable[[str], ChatTemplate]
) -> None:
    segments = make(CHATML).format([text("  what now?\n ")])
    assert segments == [as_transformers(tokenizer, CHATML, "  what now?\n ")]
    mixed = make(CHATML).format(
        [ChatPart(IMAGE), text("\n"), ChatPart(Part("audio", "b")), text("?")]
    )
    assert flatten(mixed) == "<|im_start|>user\nimage\naudio?<|im_end|>\n<|im_start|>assistant\n"
    # An expert's language model without a multimodal template: placeholders within the text.
    segments = make(CHATML).format([image(), text("what?")])
    assert flatten(segments) == as_transformers(tokenizer, CHATML, "<image>\nwhat?")


def test_the_placeholder_that_a_template_writes_is_the_one_that_is_encoded(
    make: Callable[[str], ChatTemplate],
) -> None:
    segments = make(LLAVA).format([image("<a><image><b>", "<image>"), text("what?")])
    assert [item.placeholder for item in segments if isinstance(item, Part)] == ["<image>"]
    wrapped = LLAVA.replace("<image>", "<a><image><b>")
    segments = make(wrapped).format([image("<a><image><b>", "<image>"), text("what?")])
    assert [item.placeholder for item in segments if isinstance(item, Part)] == ["<a><image><b>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages }}", "does not write every text"),
        ("{{ 'x' * 100000000000 }}", "too much memory"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "2 s"),
    ],
)
def test_a_template_that_fails_or_outgrows_its_bounds_is_refused(
    template: str, reason: str, make: Callable[[str], ChatTemplate]
) -> None:
    with pytest.raises(PromptError, match=reason) as error:
        make(template).format([text("what?")])
    assert "chat_template_from: none" in str(error.value)


def test_a_template_of_too_many_characters_is_refused(
    make: Callable[[str], ChatTemplate],
) -> None:
    with pytest.raises(CheckpointError, match="MMERGE_MAX_CHAT_TEMPLATE_CHARACTERS"):
        make("x" * 200_001)


def test_the_template_is_found_where_transformers_looks_for_it() -> None:
    def files(**contents: Any) -> dict[str, bytes]:
        return {
            f"{name}.json": json.dumps({"chat_template": value}).encode()
            for name, value in contents.items()
        }

    assert find_chat_template({}, owner="x") is None
    assert find_chat_template(files(tokenizer_config="a"), owner="x") == "a"
    both = files(chat_template="b", tokenizer_config="a")
    assert find_chat_template(both, owner="x") == "b"
    assert find_chat_template({**both, "chat_template.jinja": b"c"}, owner="x") == "c"
    named = [{"name": "tool_use", "template": "d"}, {"name": "default", "template": "e"}]
    assert find_chat_template(files(tokenizer_config=named), owner="x") == "e"
    with pytest.raises(CheckpointError, match="which one is the default"):
        find_chat_template(files(tokenizer_config={"a": "1", "b": "2"}), owner="x")
