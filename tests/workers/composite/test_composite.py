"""The composite of the trained experts: rebuilt, routed, asked and exported."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
)

from mmerge.manifests.errors import DamagedObject, ManifestError, PromptError, StoreError
from mmerge.pipeline import Composite, Part, export, load_composite
from mmerge.workers.composite.routed_linear import RoutedLinear
from mmerge.workers.modalities.media_files import read_audio, read_image, read_video
from mmerge.workers.reconstruction.bitmask import unpack_mask
from mmerge.workers.reconstruction.build_reader import BuildReader

SAMPLES = Path(__file__).resolve().parent.parent.parent.parent / "examples" / "lab" / "samples"
IMAGE, SOUND, FILM = (
    SAMPLES / name for name in ("image_seven_light.png", "sound_three_low.wav", "video_two_up.gif")
)
QUESTIONS = {
    "image": "which digit is in the image ?",
    "audio": "which digit is in the sound ?",
    "video": "which digit is in the video ?",
}
MEDIA = {"image": Part("image", IMAGE), "audio": Part("audio", SOUND), "video": Part("video", FILM)}


@pytest.fixture(scope="module")
def composite(lab_store: str) -> Composite:
    return load_composite(f"{lab_store}#mmer")


def make_inputs(modality: str, folder: Path, text: str, target: Path) -> dict[str, torch.Tensor]:
    """What transformers itself makes of a prompt that holds the placeholder."""
    if modality == "video":  # its processor class needs torchvision
        tokenizer, images = (
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            AutoImageProcessor.from_pretrained(folder, trust_remote_code=False),
        )
        frames = list(read_video(target))
        pixels = images(images=frames, return_tensors="pt", return_legacy_image_output=False)[
            "pixel_values"
        ]
        count = len(frames) * ((pixels.shape[-1] // 8) ** 2 + 1)
        return {
            **tokenizer(text.replace("<video>", "<video>" * count), return_tensors="pt"),
            "pixel_values_videos": pixels[None],
        }
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if modality == "image":
        return dict(processor(text=text, images=read_image(target), return_tensors="pt"))
    return dict(
        processor(
            text=text,
            audio=[read_audio(target, sampling_rate=16000)],
            sampling_rate=16000,
            return_tensors="pt",
        )
    )


def round_to_bfloat16(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_transformers_loads_the_export_and_its_logits_are_those_of_retention_mode(
    lab_store: str, tmp_path: Path, modality: str
) -> None:
    report = export(f"{lab_store}#mmer", tmp_path / "export", expert=modality)
    assert report.num_tensors > 40
    model, info = AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    assert not any(info.values())
    retained = load_composite(
        f"{lab_store}#mmer", mode="retention", expert=modality, dtype=torch.float32
    )
    # An export holds the weights in the build's dtype; in float32 they are formed without rounding.
    for model_part in (retained.language_model, retained.encoders[modality].model):
        round_to_bfloat16(model_part)
    parts = retained.prompt(QUESTIONS[modality], [MEDIA[modality]])
    placeholder = retained.encoders[modality].placeholder
    text = "".join(part.value if part.kind == "text" else placeholder for part in parts)
    inputs = make_inputs(modality, tmp_path / "export", text, MEDIA[modality].value)
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        expected = model(**inputs).logits[0]
    media_only = {"audio": ("<|audio_bos|>", "<|audio_eos|>")}.get(modality, ())
    assert all(edge in text for edge in media_only)
    found = retained.logits(parts)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_large_export_is_split_into_files_that_transformers_joins(
    lab_store: str, tmp_path: Path
) -> None:
    whole = export(f"{lab_store}#mmer", tmp_path / "whole", expert="image")
    split = export(f"{lab_store}#mmer", tmp_path / "split", expert="image", max_file_bytes=400_000)
    assert "model.safetensors.index.json" in split.files
    assert sum(name.startswith("model-") for name in split.files) > 2
    assert split.num_bytes == whole.num_bytes
    one, other = (
        AutoModelForMultimodalLM.from_pretrained(
            tmp_path / name, trust_remote_code=False
        ).state_dict()
        for name in ("whole", "split")
    )
    assert all(one[key].equal(other[key]) for key in one)


def test_the_export_without_an_expert_is_the_text_model(
    lab_store: str, composite: Composite, tmp_path: Path
) -> None:
    export(f"{lab_store}#mmer", tmp_path / "text")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "text", dtype=composite.language_model.dtype, trust_remote_code=False
    )
    parts = composite.prompt("which digit is in the image ?")
    ids = composite.tokenizer("".join(part.value for part in parts), return_tensors="pt")[
        "input_ids"
    ]
    with torch.inference_mode():
        torch.testing.assert_close(
            composite.logits(parts), model(ids).logits[0], rtol=2e-2, atol=2e-2
        )


def test_every_linear_of_the_layers_is_routed_and_equals_formed_weights(lab_store: str) -> None:
    composite = load_composite(f"{lab_store}#mmer", dtype=torch.float32)
    reader = BuildReader(f"{lab_store}#mmer")
    routed = {
        path: module
        for path, module in composite.language_model.named_modules()
        if isinstance(module, RoutedLinear)
    }
    assert len(routed) == 7 * composite.language_model.config.num_hidden_layers
    for path, module in routed.items():
        base, delta = (reader.read(f"{path}.weight", role).float() for role in ("base", "delta"))  # type: ignore[arg-type]
        masks = [
            unpack_mask(reader.read_packed_mask(f"{path}.weight", name), base.shape)
            for name in reader.expert_names
        ]
        torch.testing.assert_close(
            module.weight, base + torch.stack(masks).float().mean(dim=0) * delta
        )
        for index, mask in enumerate(masks):
            torch.testing.assert_close(module.modality_weight(index), base + mask * delta)


def test_expansion_routes_each_part_of_a_prompt_by_its_modality(composite: Composite) -> None:
    parts = composite.prompt(
        "what do these share ?", [MEDIA["image"], MEDIA["audio"], MEDIA["video"]]
    )
    embeds, ids = composite.embed(parts)
    assert len(embeds) == len(ids)
    runs = [int(ids[0])] + [int(now) for before, now in itertools.pairwise(ids) if now != before]
    assert runs == [-1, 0, -1, 1, -1, 2, -1]
    # With the modalities forgotten the same embeddings give other logits: routing has an effect.
    routed = composite.logits(parts)
    plain = composite.language_model(inputs_embeds=embeds[None], use_cache=False).logits[0]
    assert not torch.allclose(routed, plain)


def test_cached_decoding_equals_one_pass_over_the_whole_sequence(lab_store: str) -> None:
    composite = load_composite(f"{lab_store}#mmer", dtype=torch.float32)
    parts = composite.prompt(QUESTIONS["audio"], [MEDIA["image"], MEDIA["audio"]])
    answer = composite.generate(parts, max_new_tokens=4, min_new_tokens=4)
    ids = composite.tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    logits = composite.logits([*parts, Part("ids", ids)])[-5:-1].clone()
    logits[:, composite.tokenizer.eos_token_id] = -torch.inf  # what min_new_tokens does
    assert logits.argmax(-1).tolist() == ids


def test_a_batch_of_different_layouts_answers_as_one_by_one(composite: Composite) -> None:
    prompts = [
        composite.prompt(QUESTIONS["image"], [MEDIA["image"]]),
        composite.prompt(QUESTIONS["audio"], [MEDIA["image"], MEDIA["audio"]]),
        composite.prompt(QUESTIONS["video"], [MEDIA["video"]]),
        composite.prompt("which digit is in the image ?"),
    ]
    alone = [composite.generate(prompt, max_new_tokens=3) for prompt in prompts]
    assert composite.generate_batch(prompts, max_new_tokens=3) == alone


def test_the_samples_are_answered(composite: Composite) -> None:
    truths = {"image": "seven", "audio": "three", "video": "two"}
    for modality, truth in truths.items():
        assert (
            composite.generate(
                composite.prompt(QUESTIONS[modality], [MEDIA[modality]]), max_new_tokens=3
            )
            == truth
        )


def test_media_may_be_given_as_arrays(composite: Composite) -> None:
    image = Image.open(IMAGE)
    film = np.asarray(read_video(FILM))
    sound = read_audio(SOUND, sampling_rate=16000)
    for given, path in (
        (Part("image", image), MEDIA["image"]),
        (Part("audio", sound, 16000), MEDIA["audio"]),
        (Part("video", film), MEDIA["video"]),
    ):
        question = QUESTIONS[given.kind]
        assert composite.logits(composite.prompt(question, [given])).equal(
            composite.logits(composite.prompt(question, [path]))
        )


def test_a_plain_build_loads_and_answers(lab_store: str) -> None:
    composite = load_composite(f"{lab_store}#naive_mc")
    assert not [
        module for module in composite.language_model.modules() if isinstance(module, RoutedLinear)
    ]
    assert isinstance(
        composite.generate(
            composite.prompt(QUESTIONS["image"], [MEDIA["image"]]), max_new_tokens=2
        ),
        str,
    )


def test_what_cannot_be_asked_is_refused_with_the_way_out(
    lab_store: str, composite: Composite
) -> None:
    with pytest.raises(
        PromptError,
        match=r"no expert for modality 'smell'; this composite has image \(image\), audio",
    ):
        composite.generate([Part("smell", "x")])
    with pytest.raises(PromptError, match=r"the prompt has \d+ tokens and 600 are to be generated"):
        composite.generate(composite.prompt("which digit ?"), max_new_tokens=600)
    with pytest.raises(ManifestError, match="name one of image, audio, video"):
        load_composite(f"{lab_store}#mmer", mode="retention")
    with pytest.raises(ManifestError, match="has no expert 'smell'"):
        load_composite(f"{lab_store}#mmer", mode="retention", expert="smell")
    with pytest.raises(ManifestError, match="has no effect in expansion mode"):
        load_composite(f"{lab_store}#mmer", expert="image")
    retained = load_composite(f"{lab_store}#mmer", mode="retention", expert="image")
    with pytest.raises(PromptError, match="Only expert 'image' is loaded"):
        retained.generate(retained.prompt(QUESTIONS["audio"], [MEDIA["audio"]]))


def test_words_of_the_api_that_do_not_exist_are_refused(
    lab_store: str, composite: Composite
) -> None:
    for wrong in ({"mode": "merge"}, {"policy": "some"}):
        with pytest.raises(ManifestError, match=next(iter(wrong.values()))):
            load_composite(f"{lab_store}#mmer", **wrong)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="got 'some'"):
        composite.generate(composite.prompt("x ?"), cache="some")


def test_an_export_never_overwrites(lab_store: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is not empty"):
        export(f"{lab_store}#mmer", tmp_path, expert="image")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_object_is_named_when_it_is_loaded(lab_store: str, tmp_path: Path) -> None:
    shutil.copytree(lab_store, tmp_path / "store")
    reader = BuildReader(f"{tmp_path / 'store'}#mmer")
    entry = next(
        entry
        for entry in reader.manifest.entries
        if entry.shard == "layers.1" and entry.role == "merge"
    )
    path = tmp_path / "store" / entry.key
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        DamagedObject, match=rf"{entry.key}: model\.layers\.1\.\S+ \(mask\) is damaged"
    ):
        load_composite(f"{tmp_path / 'store'}#mmer")


def test_a_shard_is_as_large_as_all_that_is_read_for_its_layer(lab_store: str) -> None:
    reader = BuildReader(f"{lab_store}#mmer")
    layers = {
        row.shard: 0
        for row in reader.rows()
        if row.role != "carried" and not row.shard.startswith("base/")
    }
    for shard in layers:
        names = {row.name for row in reader.rows() if row.shard == shard and row.role == "delta"}
        masks = sum(
            reader.stored_bytes(name, "mask", expert)
            for name in names
            for expert in reader.expert_names
        )
        extra = sum(
            reader.stored_bytes(name, "extra_rows", expert)
            for name in names
            for expert in reader.expert_names
        )
        layers[shard] = (
            masks
            + extra
            + sum(
                reader.stored_bytes(name, "base") + reader.stored_bytes(name, "delta")
                for name in names
            )
        )
    assert len(layers) > 2
    assert reader.largest_shard_bytes() == max(layers.values()) > 0
