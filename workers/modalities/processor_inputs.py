"""Inputs of an expert's class, made by its own processor."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from mmerge.manifests.errors import CheckpointError, PromptError
from mmerge.workers.modalities.image_files import describe_error
from mmerge.workers.modalities.media_files import read_audio, read_image
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.modalities.small_files import read_config, to_loadable_files, write_files
from mmerge.workers.modalities.video_files import (
    DEFAULT_FRAMES,
    FilmInfo,
    Video,
    choose_evenly,
    load_video,
)


class ProcessorInputs:
    """Inputs made by the expert's own processor."""

    def __init__(self, folder: str, *, owner: str) -> None:
        self.processor: Any = transformers.AutoProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        self.tokenizer = self.processor.tokenizer

    def find_placeholder(self, modality: str, *, owner: str) -> str:
        """Return the text that the processor expands to the tokens of one input.

        Raises:
            CheckpointError: the processor has none.
        """
        token = getattr(self.processor, f"{modality}_token", None)
        if not isinstance(token, str):
            raise CheckpointError(
                f"{owner}: its processor has no {modality}_token; name the text that stands for"
                " one input in the recipe: 'placeholder'"
            )
        vocabulary = self.tokenizer.get_vocab()
        # The Omni processors name the wrappers of images and videos after the sense.
        for kind in (modality, "vision") if modality in ("image", "video") else (modality,):
            begin, end = (
                getattr(self.processor, f"{kind}_{edge}_token", None) for edge in ("bos", "eos")
            )
            if begin in vocabulary and end in vocabulary:
                return f"{begin}{token}{end}"
        return token

    def make(self, placeholder: str, modality: str, part: Part) -> Mapping[str, Any]:
        """Return the model's inputs for a prompt that consists of one input."""
        inputs: Mapping[str, Any]
        if modality == "image":
            image = read_image(part.value)
            inputs = self.processor(text=placeholder, images=image, return_tensors="pt")
        elif modality == "audio":
            rate = self.processor.feature_extractor.sampling_rate
            audio = read_audio(part.value, sampling_rate=rate, input_rate=part.sampling_rate)
            inputs = self.processor(
                text=placeholder, audio=audio, sampling_rate=rate, return_tensors="pt"
            )
        elif modality == "video":
            video = load_video(part.value, choose=self.choose_frames)
            inputs = self.processor(
                text=placeholder,
                videos=list(video.frames),
                return_tensors="pt",
                **_describe_frames(video),
            )
        else:
            raise PromptError(
                f"no reader for modality {modality!r}; register one with"
                " mmerge.workers.modalities.processor_inputs.register_inputs"
            )
        return inputs

    def choose_frames(self, film: FilmInfo) -> Sequence[int]:
        """Return the frames that the expert's processor would take of a film."""
        processor: Any = getattr(self.processor, "video_processor", None)
        num_frames = getattr(processor, "num_frames", None)
        if not getattr(processor, "do_sample_frames", False):
            return choose_evenly(film, num_frames=num_frames or DEFAULT_FRAMES)
        from transformers.video_utils import VideoMetadata

        metadata = VideoMetadata(
            total_num_frames=film.num_frames,
            fps=film.frames_per_second,
            width=film.width,
            height=film.height,
            duration=film.seconds,
        )
        # As the processor calls it with the settings of its own files.
        names = inspect.signature(processor.sample_frames).parameters
        settings = {name: getattr(processor, name) for name in names if hasattr(processor, name)}
        return [int(index) for index in processor.sample_frames(metadata=metadata, **settings)]

    def without_frame(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return a mask of the input's positions, without the BOS and EOS of the tokenizer."""
        keep = torch.ones_like(input_ids, dtype=torch.bool)
        if int(input_ids[0]) == self.tokenizer.bos_token_id:
            keep[0] = False
        if int(input_ids[-1]) == self.tokenizer.eos_token_id:
            keep[-1] = False
        return keep


def _describe_frames(video: Video) -> dict[str, Any]:
    """Return what a processor is told of frames that were taken of a film already."""
    if video.film is None:
        return {}
    metadata = {
        "total_num_frames": video.film.num_frames,
        "fps": video.film.frames_per_second,
        "duration": video.film.seconds,
        "frames_indices": list(video.indices),
    }
    return {"video_metadata": [metadata], "do_sample_frames": False}


class VideoLlavaInputs(ProcessorInputs):
    """Inputs of Video-LLaVA without torchvision, which its processor class requires.

    Frames go through its image processor.
    """

    def __init__(self, folder: str, *, owner: str) -> None:
        with suppress(ImportError):
            super().__init__(folder, owner=owner)
            return
        self.processor: Any = None
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        self.images = transformers.VideoLlavaImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        raw = read_config((Path(folder) / "config.json").read_bytes(), owner=owner)
        self.token_ids: dict[str, Any] = {
            "image": raw.get("image_token_index", raw.get("image_token_id")),
            "video": raw.get("video_token_index", raw.get("video_token_id")),
        }
        self.patch_size = int(raw["vision_config"]["patch_size"])

    def find_placeholder(self, modality: str, *, owner: str) -> str:
        """Return the text of the placeholder token."""
        if self.processor is not None:
            return super().find_placeholder(modality, owner=owner)
        return str(self.tokenizer.convert_ids_to_tokens(self.token_ids[modality]))

    def make(self, placeholder: str, modality: str, part: Part) -> Mapping[str, Any]:
        """Return placeholder tokens and pixels; a frame of a video has one token per patch + 1."""
        if self.processor is not None:
            return super().make(placeholder, modality, part)
        if modality == "video":
            frames = list(load_video(part.value, choose=choose_evenly).frames)
        else:
            frames = [read_image(part.value)]
        pixels = self.images(images=frames, return_tensors="pt", return_legacy_image_output=False)[
            "pixel_values"
        ]
        height, width = (size // self.patch_size for size in pixels.shape[-2:])
        tokens_per_frame = height * width + (1 if modality == "video" else 0)
        num_tokens = tokens_per_frame * len(frames)
        ids = torch.full((1, num_tokens), self.token_ids[modality], dtype=torch.long)
        name = "pixel_values_videos" if modality == "video" else "pixel_values_images"
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            name: pixels[None] if modality == "video" else pixels,
        }


_EXTRAS = {"torchvision": "image", "torchaudio": "audio", "num2words": "image", "av": "video"}
"""Extras of this package by the packages that processors need."""
InputMaker = Callable[..., ProcessorInputs]
_INPUTS: dict[str, InputMaker] = {"video_llava": VideoLlavaInputs}


def register_inputs(model_type: str, maker: InputMaker) -> None:
    """Make the inputs of models of a type by `maker(folder, owner=…)`, not by their processor."""
    _INPUTS[model_type] = maker


def open_inputs(model_type: str, files: Mapping[str, bytes], *, owner: str) -> ProcessorInputs:
    """Return the maker of inputs among a checkpoint's files. Raises CheckpointError."""
    loadable = to_loadable_files(files, owner=owner)
    with tempfile.TemporaryDirectory() as folder:
        write_files(loadable, Path(folder))
        try:
            return _INPUTS.get(model_type, ProcessorInputs)(folder, owner=owner)
        except Exception as error:
            raise CheckpointError(
                f"{owner}: its processor cannot be loaded"
                f" ({describe_failure(error)}){name_extra(error)}"
            ) from error


def name_extra(error: BaseException) -> str:
    """Return the extra that installs the package which a processor lacks, empty for others."""
    if not isinstance(error, ImportError):
        return ""
    text = str(error).lower()
    extras = [extra for package, extra in _EXTRAS.items() if re.search(rf"\b{package}\b", text)]
    return f". Install 'mmerge[{extras[0]}]'" if extras else ""


def describe_failure(error: Exception) -> str:
    """Return the first line of an error, without the advice to run the code of a checkpoint."""
    if "trust_remote_code" in str(error):
        return "its files ask for code of their own, which is not run"
    return describe_error(error)
