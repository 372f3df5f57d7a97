"""Requests of OpenAI's chat protocol, checked: what cannot be honoured is refused by name.

The protocol is that of https://platform.openai.com/docs/api-reference/chat, with one content part
of our own, `media_url`, for modalities that it does not know and for an expert by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmerge.pipeline.serving.api_errors import ApiError

_STRICT = ConfigDict(extra="forbid", strict=True)
_WITHOUT_EFFECT = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "parallel_tool_calls",
)
"""Parameters that change nothing about an answer of one model on one server."""
_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "store": (False,),
    "logprobs": (False,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""The values of parameters that are not supported at which they ask for nothing; so does null."""


class Url(BaseModel):
    """A file as a data URL; `detail` of images has no effect."""

    model_config = _STRICT

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class MediaUrl(BaseModel):
    """A file for a modality or an expert of this name."""

    model_config = _STRICT

    url: str
    kind: str


class AudioData(BaseModel):
    """A sound file in base64."""

    model_config = _STRICT

    data: str
    format: Literal["wav", "mp3", "flac", "ogg"]


class TextContent(BaseModel):
    """A piece of text."""

    model_config = _STRICT

    type: Literal["text"]
    text: str


class ImageContent(BaseModel):
    """An image."""

    model_config = _STRICT

    type: Literal["image_url"]
    image_url: Url


class VideoContent(BaseModel):
    """A video."""

    model_config = _STRICT

    type: Literal["video_url"]
    video_url: Url


class AudioContent(BaseModel):
    """A sound."""

    model_config = _STRICT

    type: Literal["input_audio"]
    input_audio: AudioData


class MediaContent(BaseModel):
    """An input of any other modality, such as the features of a point cloud."""

    model_config = _STRICT

    type: Literal["media_url"]
    media_url: MediaUrl


Content: TypeAlias = Annotated[
    TextContent | ImageContent | VideoContent | AudioContent | MediaContent,
    Field(discriminator="type"),
]


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Content]


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    model_config = _STRICT

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    min_tokens: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=0, lt=1 << 64)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens of the answer at most; None: as many as the server gives."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which the answer ends."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stops)

    def to_options(self) -> dict[str, Any]:
        """Return the options of `Composite.generate_rows`; greedy without a temperature above 0."""
        options: dict[str, Any] = {
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens,
        }
        if self.temperature:
            options |= {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": max(self.top_k or 0, 0),  # −1 and 0 both mean all tokens
                "min_p": self.min_p,
                "seed": self.seed,
            }
        return {name: value for name, value in options.items() if value is not None}


def parse_request(body: bytes) -> ChatRequest:
    """Return the request in a body of JSON.

    Raises:
        ApiError: 400; it is no JSON, lacks something, or asks for what is not supported.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        # A list of contents is no text, either: what is wrong within it stands deeper.
        detail = max(details, key=lambda detail: len(detail["loc"]))
        where = _to_path(detail["loc"])
        raise ApiError(400, f"{where}{': ' * bool(where)}{detail['msg']}", param=where) from None
    for name, value in (request.model_extra or {}).items():
        neutral = name in _WITHOUT_EFFECT or value is None
        if not neutral and value not in _NEUTRAL_VALUES.get(name, ()):
            raise ApiError(400, f"{name[:100]}: is not supported. Leave it out", param=name[:100])
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            400,
            "max_tokens: is the older name of max_completion_tokens. Give one of them",
            param="max_tokens",
        )
    if len(request.stops) > 4 or not all(0 < len(stop) <= 100 for stop in request.stops):
        raise ApiError(400, "stop: give at most 4 texts of 1 to 100 characters", param="stop")
    return request


def _to_path(location: tuple[int | str, ...]) -> str:
    """Return where a value stands: messages[0].content[1].image_url.url."""
    path = ""
    for previous, step in zip(("", *location), location, strict=False):
        if isinstance(step, int):
            path += f"[{step}]"
        elif not _is_branch(step, previous):
            path += f".{step}" if path else step
    return path


def _is_branch(step: str, previous: int | str) -> bool:
    """Return whether a step of a location names a branch of a union, which no body has."""
    types = ("text", "image_url", "video_url", "input_audio", "media_url")
    is_type = isinstance(previous, int) and step in types
    return is_type or step == "str" or step.startswith("list[")
