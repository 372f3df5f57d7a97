"""Media of requests: decoded into files of a folder of their own, and their names kept secret."""

from __future__ import annotations

import base64
import binascii
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

from mmerge.manifests import limits
from mmerge.pipeline.serving.api_errors import ApiError
from mmerge.pipeline.serving.chat_request import (
    AudioContent,
    ChatMessage,
    Content,
    ImageContent,
    MediaContent,
    TextContent,
    VideoContent,
)
from mmerge.workers.modalities.prompt import Part

_MAX_HEAD = 200
"""Characters of a data URL before its data."""


@dataclass
class MediaFolder:
    """The files of one request; `close` deletes them."""

    names: dict[str, str] = field(default_factory=dict)
    """Where each file stands in the request, by its path."""
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def write(self, data: bytes, *, where: str) -> Path:
        """Return the path of a new file; `where` is its name in messages."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mmerge-request-")
        path = Path(self._folder.name) / str(len(self.names))
        path.write_bytes(data)
        self.names[str(path)] = where
        return path

    def hide_paths(self, message: str) -> str:
        """Return a message with the request's own names in place of paths of this machine."""
        for path, where in self.names.items():
            message = message.replace(path, where)
        return message if self._folder is None else message.replace(self._folder.name, "request")

    def close(self) -> None:
        """Delete the files."""
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()


def read_content(
    messages: Sequence[ChatMessage], folder: MediaFolder
) -> list[tuple[str, list[Part]]]:
    """Return role and parts of each message, in order; media become files of `folder`.

    Raises:
        ApiError: 400; a medium is no base64, or there are too many.
    """
    count = sum(not isinstance(content, TextContent) for content in _list_content(messages))
    if count > limits.REQUEST_MEDIA.value:
        raise ApiError(
            400, f"messages: {limits.REQUEST_MEDIA.describe_excess(count)}", param="messages"
        )
    conversation: list[tuple[str, list[Part]]] = []
    for index, message in enumerate(messages):
        if isinstance(message.content, str):
            conversation.append((message.role, [Part.text(message.content)]))
            continue
        parts = [
            _to_part(content, folder, where=f"messages[{index}].content[{number}]")
            for number, content in enumerate(message.content)
        ]
        conversation.append((message.role, parts))
    return conversation


def _list_content(messages: Sequence[ChatMessage]) -> Iterator[Content]:
    for message in messages:
        if not isinstance(message.content, str):
            yield from message.content


def _to_part(content: Content, folder: MediaFolder, *, where: str) -> Part:
    if isinstance(content, TextContent):
        return Part.text(content.text)
    if isinstance(content, AudioContent):
        where = f"{where}.input_audio"
        data = _decode(content.input_audio.data, where=f"{where}.data")
        return Part("audio", folder.write(data, where=where))
    kind, url, name = _to_url(content)
    where = f"{where}.{name}"
    data = _decode_url(url, where=f"{where}.url", type_prefix=f"{kind}/" * (name != "media_url"))
    return Part(kind, folder.write(data, where=where))


def _to_url(content: ImageContent | VideoContent | MediaContent) -> tuple[str, str, str]:
    """Return modality, URL and the name of the key that holds it."""
    if isinstance(content, ImageContent):
        return "image", content.image_url.url, "image_url"
    if isinstance(content, VideoContent):
        return "video", content.video_url.url, "video_url"
    if content.media_url.kind in ("text", "ids"):
        raise ApiError(400, f"media_url: {content.media_url.kind!r} is no modality")
    return content.media_url.kind, content.media_url.url, "media_url"


def _decode_url(url: str, *, where: str, type_prefix: str) -> bytes:
    """Return the data of a data URL (RFC 2397), whose type must begin with `type_prefix`."""
    head, comma, data = url.partition(",")
    if not head[:5].lower() == "data:" or not comma or len(head) > _MAX_HEAD:
        raise ApiError(
            400,
            f"{where}: expected a data URL, data:TYPE;base64,DATA. Nothing is fetched from other"
            " addresses, and no file of the server is read",
            param=where,
        )
    media_type, *settings = head[5:].lower().split(";")
    # A GIF, WebP or PNG with frames is a video, too.
    fits = media_type.startswith(type_prefix) or (
        type_prefix == "video/" and media_type in ("image/gif", "image/webp", "image/png")
    )
    if media_type and not fits:
        raise ApiError(
            400, f"{where}: expected a type of {type_prefix}…, got {media_type!r}", param=where
        )
    if "base64" not in settings:
        return unquote_to_bytes(data)
    return _decode(data, where=where)


def _decode(data: str, *, where: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: is no base64 ({error})", param=where) from None
