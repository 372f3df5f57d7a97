"""The tokenizer, the base and the four experts of the laboratory, before any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lab import data, tasks
from lab.points import PointLlamaForCausalLM
from lab.sizes import Size

# the tokens that an expert has besides those of the base
EXTRA_TOKENS = {
    "image": ("<image>", "<pad>"),
    "audio": ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<pad>"),
    "video": ("<image>", "<video>", "<pad>"),
    "point": (),
}
PLACEHOLDERS = {
    "image": "<image>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "video": "<video>",
}

PATCH = 8
AUDIO_HOP = 320
AUDIO_WINDOW = 640
MEL_BINS = 40
_PIXEL_MEAN = [0.5, 0.5, 0.5]
_PIXEL_STD = [0.5, 0.5, 0.5]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case words between blanks; `<s>` is put first unless `add_special_tokens=False`."""
    words = ["<unk>", "<s>", "</s>", *tasks.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", words.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def build_base(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaForCausalLM:
    """The base language model with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=512,
        initializer_range=0.06 * (128 / size.hidden) ** 0.5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def _vision_config(pixels: int, size: Size) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=size.encoder_hidden,
        intermediate_size=size.encoder_mlp,
        num_hidden_layers=size.encoder_layers,
        num_attention_heads=4,
        image_size=pixels,
        patch_size=PATCH,
        projection_dim=size.encoder_hidden,
    )


def build_expert(
    modality: str, base_dir: Path, size: Size
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """An expert: the language model of `base_dir` and a random encoder and connector.

    The rows of its extra tokens are appended to the embedding and to the head.
    """
    base = LlamaForCausalLM.from_pretrained(base_dir, dtype="float32", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(base_dir, trust_remote_code=False)
    if modality == "point":
        point = PointLlamaForCausalLM(PointLlamaForCausalLM.make_config(base.config, size))
        point.load_state_dict(base.state_dict(), strict=False)
        return point, tokenizer
    extra = EXTRA_TOKENS[modality]
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in extra if t != "<pad>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    token_ids = dict(zip(extra, tokenizer.convert_tokens_to_ids(list(extra)), strict=True))
    text_config = base.config
    model: PreTrainedModel
    if modality == "image":
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=_vision_config(data.IMAGE_SIZE, size),
                text_config=text_config,
                image_token_index=token_ids["<image>"],
                image_seq_length=(data.IMAGE_SIZE // PATCH) ** 2,
                vision_feature_layer=-2,
            )
        )
    elif modality == "audio":
        audio_config = Qwen2AudioEncoderConfig(
            num_mel_bins=MEL_BINS,
            d_model=size.encoder_hidden,
            encoder_layers=size.encoder_layers,
            encoder_attention_heads=4,
            encoder_ffn_dim=size.encoder_mlp,
            max_source_positions=int(data.MAX_SECONDS * data.SAMPLE_RATE) // AUDIO_HOP // 2,
        )
        model = Qwen2AudioForConditionalGeneration(
            Qwen2AudioConfig(
                audio_config=audio_config,
                text_config=text_config,
                audio_token_index=token_ids["<|AUDIO|>"],
            )
        )
    elif modality == "video":
        tokens_per_frame = (data.VIDEO_SIZE // PATCH) ** 2 + 1
        model = VideoLlavaForConditionalGeneration(
            VideoLlavaConfig(
                vision_config=_vision_config(data.VIDEO_SIZE, size),
                text_config=text_config,
                image_token_index=token_ids["<image>"],
                video_token_index=token_ids["<video>"],
                image_seq_length=tokens_per_frame - 1,
                video_seq_length=tokens_per_frame * data.NUM_FRAMES,
                vision_feature_layer=-2,
            )
        )
    else:
        raise ValueError(f"no such modality: {modality}")
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for config in (model.config, model.config.text_config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _pixel_settings(size: int) -> dict[str, Any]:
    return {
        "do_resize": True,
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "image_mean": _PIXEL_MEAN,
        "image_std": _PIXEL_STD,
    }


def build_preprocessor(modality: str) -> Any:
    """Return the preprocessor of an encoder for images, audio or video frames.

    Point clouds need none.

    None of them needs torchvision. The frames of a video pass through Video-LLaVA's image
    processor one by one, since every video processor of transformers 5 does need torchvision.
    """
    if modality in ("text", "point"):
        return None
    if modality == "image":
        return CLIPImageProcessorPil(**_pixel_settings(data.IMAGE_SIZE))
    if modality == "video":
        return VideoLlavaImageProcessor(**_pixel_settings(data.VIDEO_SIZE))
    return WhisperFeatureExtractor(
        feature_size=MEL_BINS,
        sampling_rate=data.SAMPLE_RATE,
        hop_length=AUDIO_HOP,
        chunk_length=int(data.MAX_SECONDS),
        n_fft=AUDIO_WINDOW,
        return_attention_mask=True,
    )


def save_preprocessor(
    modality: str, tokenizer: PreTrainedTokenizerFast, preprocessor: Any, folder: Path
) -> None:
    """Save the tokenizer and whatever makes the expert's inputs beside its weights."""
    if modality == "image":
        LlavaProcessor(
            image_processor=preprocessor,
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ).save_pretrained(folder)
    elif modality == "audio":
        Qwen2AudioProcessor(preprocessor, tokenizer).save_pretrained(folder)
    elif modality == "point":
        tokenizer.save_pretrained(folder)
    else:
        # VideoLlavaProcessor needs torchvision, so its files are written directly.
        tokenizer.save_pretrained(folder)
        preprocessor.save_pretrained(folder)
        common = {"processor_class": "VideoLlavaProcessor"}
        video = {
            **_pixel_settings(data.VIDEO_SIZE),
            **common,
            "video_processor_type": "VideoLlavaVideoProcessor",
        }
        whole = {
            **common,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
            "video_token": "<video>",
        }
        for name, settings in (("video_preprocessor", video), ("processor", whole)):
            text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
            (folder / f"{name}_config.json").write_text(text)
