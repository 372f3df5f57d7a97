"""Prompts of composites whose experts have chat templates, against the experts' own classes."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmerge.manifests.errors import CheckpointError, PromptError, RecipeError
from mmerge.pipeline import Part, export, load_composite, make_plan, read_recipe, run
from mmerge.workers.modalities.prompt import make_prompt
from tests.model_configs import MULTIMODAL
from tests.model_families import give_language_model, make_base, make_multimodal
from tests.workers.modalities.test_chat_template import LLAVA

BASE_CHAT = (
    "{% for message in messages %}w9 {{ message.content | trim }} w10{% endfor %}"
    "{% if add_generation_prompt %} w11{% endif %}"
)
QUESTION = "w20 w21 w22"


def make_tokenizer(chat: str | None = None, *, image: bool = False) -> Any:
    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{index}" for index in range(4, 110))]
    words += ["USER:", "ASSISTANT:"]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"} if image else {},
    )
    tokenizer.chat_template = chat
    return tokenizer


def write_expert(base: Any, folder: Path, *, seed: int, chat: str | None) -> None:
    expert = make_multimodal(MULTIMODAL["LLaVA 1.5"], seed=seed)
    give_language_model(base, expert, seed=100 + seed)
    expert.save_pretrained(folder)
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    transformers.LlavaProcessor(
        image_processor=pixels,
        tokenizer=make_tokenizer(image=True),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two image experts over a language model, one of them with a chat template."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("chats")
    base = make_base(MULTIMODAL["LLaVA 1.5"])
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    write_expert(base, folder / "photo", seed=11, chat=LLAVA)
    write_expert(base, folder / "scan", seed=12, chat=None)
    values = np.random.default_rng(3).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(values).save(folder / "a.png")
    return folder


def build(folder: Path, name: str, **keys: Any) -> str:
    recipe = {
        "name": name,
        "base": "base",
        "method": "mmer",
        "density": 0.6,
        "output": "store",
        "experts": {
            "photo": {"path": "photo", "modality": "image"},
            "scan": {"path": "scan", "modality": "image"},
        },
        **keys,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return run(make_plan(read_recipe(folder / f"{name}.yaml"))).uri


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    return build(folder, "mmer")


@torch.inference_mode()
def test_the_experts_own_chat_template_gives_the_logits_of_its_class(
    folder: Path, uri: str
) -> None:
    composite = load_composite(uri, mode="retention", expert="photo")
    logits = composite.logits(composite.prompt(QUESTION, [Part("image", folder / "a.png")]))
    export(uri, folder / "export", expert="photo")
    own = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder / "export", trust_remote_code=False
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(
        folder / "export", trust_remote_code=False
    )
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=Image.open(folder / "a.png"), return_tensors="pt")
    expected = own(**inputs).logits[0]
    torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)


def shown(composite: Any, parts: list[Part]) -> str:
    """Return a prompt as text, inputs by their kind in brackets."""
    decode = composite.tokenizer.decode
    texts = []
    for part in parts:
        if part.kind == "ids":
            texts.append(decode(part.value))
        else:
            texts.append(part.value.strip() if part.kind == "text" else f"[{part.kind}]")
    return " ".join(texts)


def test_the_template_of_the_only_expert_of_a_prompt_forms_it(folder: Path, uri: str) -> None:
    composite = load_composite(uri)
    image, scan = Part("image", folder / "a.png"), Part("scan", folder / "a.png")
    form = lambda *media: shown(composite, composite.prompt(QUESTION, media))  # noqa: E731
    assert form(image) == f"USER: [image] {QUESTION} ASSISTANT:"
    assert form(scan) == f"[scan] {QUESTION}"  # an expert without a template
    assert form() == QUESTION  # a base without one
    # Of several experts: the first one with a template, as the base has none.
    assert form(image, scan) == f"USER: [image] [scan] {QUESTION} ASSISTANT:"
    assert composite.generate_tokens([composite.prompt(QUESTION, [image, scan])])
    placed = composite.prompt("w30 {scan} w31", [scan])
    assert shown(composite, placed) == "w30 [scan] w31"


def test_the_bases_template_forms_texts_and_prompts_of_several_experts(folder: Path) -> None:
    chat = folder / "base" / "chat_template.jinja"
    chat.write_text(BASE_CHAT)
    try:
        composite = load_composite(build(folder, "chatting"))
        chosen = load_composite(build(folder, "chosen", chat_template_from="base"))
    finally:
        chat.unlink()
    image, scan = Part("image", folder / "a.png"), Part("scan", folder / "a.png")
    assert shown(composite, composite.prompt(QUESTION)) == f"w9 {QUESTION} w10 w11"
    mixed = shown(composite, composite.prompt(QUESTION, [image, scan]))
    assert " ".join(mixed.split()) == f"w9 [image] [scan] {QUESTION} w10 w11"
    own = shown(composite, composite.prompt(QUESTION, [image]))
    assert own == f"USER: [image] {QUESTION} ASSISTANT:"
    always = shown(chosen, chosen.prompt(QUESTION, [image]))
    assert " ".join(always.split()) == f"w9 [image] {QUESTION} w10 w11"


def test_a_recipe_overrides_chat_templates(folder: Path) -> None:
    image = Part("image", folder / "a.png")
    composite = load_composite(build(folder, "own", template="w40 {media} {text} w41"))
    parts = composite.prompt(QUESTION, [image])
    assert shown(composite, parts) == f"w40 [image] {QUESTION} w41"
    plain = load_composite(build(folder, "none", chat_template_from="none"))
    assert shown(plain, plain.prompt(QUESTION, [image])) == f"[image] {QUESTION}"
    photo = {"path": "photo", "modality": "image", "template": "w42 {media}"}
    around = load_composite(build(folder, "around", experts={"photo": photo}))
    assert shown(around, around.prompt(QUESTION, [image])) == f"w42 [image] {QUESTION}"


def test_a_chat_template_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"chat_template_from: base .* has no chat template"):
        build(folder, "x", chat_template_from="base")
    with pytest.raises(RecipeError, match="'base', 'none' or an expert"):
        build(folder, "x", chat_template_from="other")
    with pytest.raises(RecipeError, match="no effect beside 'template'"):
        build(folder, "x", chat_template_from="none", template="{text}")


def test_the_choice_of_a_template_is_part_of_a_builds_digest(folder: Path, uri: str) -> None:
    chosen = load_composite(build(folder, "digest", chat_template_from="photo")).manifest
    assert chosen.chat_template_from == "photo"
    assert chosen.build != load_composite(uri).manifest.build


def test_a_token_of_a_template_that_the_vocabulary_lacks_is_refused(
    folder: Path, uri: str, tmp_path: Path
) -> None:
    composite = load_composite(uri)
    photo = composite._prompts.chats["photo"]
    photo._template = LLAVA.replace("USER", "<image> <image>").replace("<image>\n", "")
    with pytest.raises(PromptError, match="once for each input"):
        composite.prompt(QUESTION, [Part("image", folder / "a.png")])
    photo._template = "<image> {{ messages[0].content }}"
    lay_out = functools.partial(make_prompt, QUESTION, [])
    with pytest.raises(PromptError, match=r"the token '<image>' of id 112, .* has 112 rows"):
        composite._prompts._make_chat("photo", lay_out, [], bos=None, num_rows=112)


def test_the_first_of_two_experts_of_one_modality_reads_its_inputs(
    folder: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    composite = load_composite(uri)
    with caplog.at_level(logging.WARNING, logger="mmerge.composite"):
        for _ in range(2):
            assert composite.find_expert("image") == "photo"
    assert [record.getMessage() for record in caplog.records] == [
        "image: 2 experts read this modality; its inputs go to the first one, 'photo', unless their"
        " kind names another: scan"
    ]
    path = folder / "a.png"
    default, ids = composite.embed([Part("image", path), Part("scan", path)])
    half = (len(ids) + 1) // 2  # the first token is that of the beginning
    assert ids[1:half].unique().tolist() == [0]
    assert ids[half:].unique().tolist() == [1]
    assert not torch.allclose(default[1:half], default[half:])


def test_a_malformed_template_file_is_refused_when_it_is_loaded(folder: Path) -> None:
    named = {"a": "x", "b": "y"}
    (folder / "scan" / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    try:
        with pytest.raises(CheckpointError, match="expert 'scan': has chat templates, and which"):
            load_composite(build(folder, "named"))
    finally:
        (folder / "scan" / "chat_template.json").unlink()
