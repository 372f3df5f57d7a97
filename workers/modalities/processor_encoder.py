"""An expert's own processor, encoder and connector, run with transformers."""

from __future__ import annotations

import copy
import inspect
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from torch import nn

from mmerge.manifests.errors import CheckpointError, MmergeError, PromptError
from mmerge.workers.families.registry import role_of
from mmerge.workers.modalities.decoder_inputs import DecoderCall, DecoderInputs, capture_calls
from mmerge.workers.modalities.expert_model import make_config, make_model
from mmerge.workers.modalities.image_files import describe_error
from mmerge.workers.modalities.media_files import read_audio, read_image
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.modalities.small_files import read_config, to_loadable_files, write_files
from mmerge.workers.modalities.text_rules import measure_text_rules
from mmerge.workers.modalities.video_files import (
    DEFAULT_FRAMES,
    FilmInfo,
    Video,
    choose_evenly,
    load_video,
)


def load_tokenizer(files: Mapping[str, bytes], *, config: Any, owner: str) -> Any:
    """Return the tokenizer among a model's files, of the class that its `config` implies.

    Raises:
        CheckpointError: transformers can load none.
    """
    loadable = to_loadable_files(files, owner=owner)
    with tempfile.TemporaryDirectory() as folder:
        write_files(loadable, Path(folder))
        try:
            return transformers.AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise CheckpointError(
                f"{owner}: has no tokenizer that transformers can load ({_describe(error)})"
            ) from error


class MediaEncoder:
    """Turns inputs of one modality into the embeddings that enter the expert's language model.

    The expert's model class runs with a language model of zero layers. A hook captures the call of
    the decoder: the embeddings of the placeholder, as processor and forward pass laid them out, and
    what else the class hands over. A text token on either side of the input shows how its positions
    and its mask connect to text. One thread at a time encodes: neither processors nor hooks of a
    model are safe for threads.
    """

    def __init__(
        self,
        *,
        expert: str,
        modality: str,
        files: Mapping[str, bytes],
        state: dict[str, torch.Tensor],
        embedding: tuple[str, torch.Tensor],
        placeholder: str | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make the encoder.

        Args:
            expert: its name, for errors.
            modality: what it encodes.
            files: the expert's configuration, tokenizer and processor files.
            state: the copied tensors, named as in the expert's files.
            embedding: name in the expert's files and values of its embedding, for wrapper tokens.
            placeholder: the text that stands for one input; from the processor if None.
            dtype, device: of the encoder.
        """
        owner = f"expert {expert!r}"
        config = make_config(files, owner=owner)
        self.expert, self.modality, self.dtype, self.device = expert, modality, dtype, device
        self.config = config
        headless = copy.deepcopy(config)
        text = headless.get_text_config()
        text.num_hidden_layers = 0
        embedding_name, embedding_weight = embedding
        text.vocab_size = embedding_weight.shape[0]
        model = make_model(
            headless,
            state | {embedding_name: embedding_weight},
            dtype=dtype,
            owner=owner,
            may_lack=lambda key: role_of(key) in ("head", "final_norm"),
        )
        self.model = model.to(device)
        self.inputs = _open_inputs(config.model_type, files, owner=owner)
        self.placeholder = placeholder or self.inputs.find_placeholder(modality, owner=owner)
        token = getattr(getattr(self.inputs, "processor", None), f"{modality}_token", None)
        self.placeholders: tuple[str, ...] = (self.placeholder,)
        """Texts that stand for an input: with its wrappers, and as the processor expands it."""
        if isinstance(token, str) and token != self.placeholder:
            self.placeholders += (token,)
        self.text_id = _find_text_id(config)
        self.text_rules = measure_text_rules(self.model, token=self.text_id, owner=owner)
        self._turn = Lock()

    def encode(self, part: Part) -> torch.Tensor:
        """Return the embeddings of one input, [tokens, hidden].

        Raises:
            PromptError: it cannot be read, or the processor refuses it.
        """
        return self.encode_for_decoder(part).embeds

    @torch.inference_mode()
    def encode_for_decoder(self, part: Part) -> DecoderInputs:
        """Return all that the expert's class hands its decoder for one input.

        Raises:
            PromptError: it cannot be read, or the processor refuses it.
            CheckpointError: the class hands over what a composite does not carry over.
        """
        with self._turn:
            inputs = self.make_inputs(part)
            keep = self.inputs.without_frame(inputs["input_ids"][0]).nonzero().reshape(-1).tolist()
            before, behind = self._count_wrappers(part)
            call = self._capture_call(add_text(inputs, self.text_id), part)
            # The text token in front moves every other token by one.
            first, end = keep[0] + 1 + before, keep[-1] + 2 - behind
            return call.read(first, end, owner=f"expert {self.expert!r}")

    def _count_wrappers(self, part: Part) -> tuple[int, int]:
        """Return how many tokens stand around an input whose prompt has its wrappers as text.

        The class sees them all the same: the Omni thinkers find images by the wrapper in front.
        """
        if not part.placeholder or part.placeholder not in self.placeholder:
            return 0, 0
        first, _, last = self.placeholder.partition(part.placeholder)
        tokenizer = self.inputs.tokenizer
        before, behind = (
            len(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else 0
            for text in (first, last)
        )
        return before, behind

    def make_inputs(self, part: Part) -> dict[str, torch.Tensor]:
        """Return the arguments of the class for a prompt of one input alone.

        Raises:
            PromptError: it cannot be read, or the processor refuses it.
        """
        try:
            placeholder = self.placeholder
            if part.placeholder and part.placeholder not in placeholder:
                placeholder = part.placeholder
            inputs = self.inputs.make(placeholder, self.modality, part)
        except MmergeError:
            raise
        except Exception as error:
            name = part.value if isinstance(part.value, (str, Path)) else f"the {part.kind}"
            raise PromptError(
                f"{name}: the processor of expert {self.expert!r} does not take it"
                f" ({describe_error(error)}){_name_extra(error)}"
            ) from error
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }

    def _capture_call(self, inputs: Mapping[str, Any], part: Part) -> DecoderCall:
        """Return the call of the decoder in one forward pass.

        The hook belongs to this pass alone, so no call for another input can be returned.
        """
        try:
            with capture_calls(self.model) as calls:
                self.model(**inputs, use_cache=False)
        except MmergeError:
            raise
        except Exception as error:
            raise PromptError(
                f"the {part.kind}: the encoder of expert {self.expert!r} fails on it"
                f" ({type(error).__name__}: {describe_error(error)})"
            ) from error
        if len(calls) != 1:
            raise CheckpointError(
                f"expert {self.expert!r}: its model calls its decoder {len(calls)} times for one"
                " prompt, expected one call"
            )
        return calls[0]


_TEXT_FILL = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
"""Arguments with one number per token, and that of text."""


def add_text(
    inputs: Mapping[str, torch.Tensor], text_id: int, *, before: int = 1, behind: int = 1
) -> dict[str, torch.Tensor]:
    """Return the arguments of a class with text tokens around the tokens of a prompt of one."""
    framed = dict(inputs)
    fills = {"input_ids": text_id, **_TEXT_FILL}
    for name in fills.keys() & inputs.keys():
        framed[name] = nn.functional.pad(inputs[name], (before, behind), value=fills[name])
    return framed


def _find_text_id(config: Any) -> int:
    """Return the id of a token that a class takes for text: none that its configuration names."""
    special: set[int] = set()
    pending = [config.to_dict()]
    while pending:
        values = pending.pop()
        for name, value in values.items():
            if isinstance(value, dict):
                pending.append(value)
            elif isinstance(value, int) and name.endswith(("_id", "_index", "_token")):
                special.add(value)
    return next(number for number in range(len(special) + 1) if number not in special)


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
                " mmerge.workers.modalities.processor_encoder.register_inputs"
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


def _open_inputs(model_type: str, files: Mapping[str, bytes], *, owner: str) -> ProcessorInputs:
    loadable = to_loadable_files(files, owner=owner)
    with tempfile.TemporaryDirectory() as folder:
        write_files(loadable, Path(folder))
        try:
            return _INPUTS.get(model_type, ProcessorInputs)(folder, owner=owner)
        except Exception as error:
            raise CheckpointError(
                f"{owner}: its processor cannot be loaded ({_describe(error)}){_name_extra(error)}"
            ) from error


def _name_extra(error: BaseException) -> str:
    """Return the extra that installs the package which a processor lacks, empty for others."""
    if not isinstance(error, ImportError):
        return ""
    text = str(error).lower()
    extras = [extra for package, extra in _EXTRAS.items() if re.search(rf"\b{package}\b", text)]
    return f". Install 'mmerge[{extras[0]}]'" if extras else ""


def _describe(error: Exception) -> str:
    """Return the first line of an error, without the advice to run the code of a checkpoint."""
    if "trust_remote_code" in str(error):
        return "its files ask for code of their own, which is not run"
    return describe_error(error)
