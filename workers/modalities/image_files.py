"""Read images of a few formats, within limits on bytes and pixels.

Pillow is told which formats to try: it would otherwise start Ghostscript for a PostScript file of
any name, and open dozens of formats that nobody prompts with.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from mmerge.manifests import limits
from mmerge.manifests.errors import PromptError, first_line
from mmerge.manifests.regular_file import describe_os_error, open_regular_file

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_EXECUTING_FORMATS = ("EPS", "WMF", "EMF")
"""Pillow decodes these with another program or the operating system."""
_JPEG_START = b"\xff\xd8"
_JPEG_SCAN = b"\xff\xda"
"""Start of scan. Inside the data of a scan, 0xFF is always followed by 0x00 or a restart."""


def read_image(value: Any) -> Any:
    """Return a PIL image in RGB.

    Args:
        value: a path, an open binary file or a PIL image.

    Raises:
        PromptError: the file cannot be read, or has too many bytes or pixels.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        if value.format in _EXECUTING_FORMATS:
            raise PromptError(
                f"an image was given as {value.format}, which runs another program. Give a PNG,"
                " JPEG, WebP, GIF or BMP file"
            )
        _check_pixels(value, label="the image")
        return value.convert("RGB")
    label = to_label(value)
    remedy = "Give a PNG, JPEG, WebP, GIF or BMP file"
    with open_image(value, label=label, what="an image", remedy=remedy) as image:
        return image.convert("RGB")


@contextmanager
def open_image(value: Any, *, label: str, what: str, remedy: str) -> Iterator[Any]:
    """Open an image file within limits; errors of its decoder inside the context are translated."""
    from PIL import Image, UnidentifiedImageError

    if limits.IMAGE_PIXELS.value > (Image.MAX_IMAGE_PIXELS or 0):
        Image.MAX_IMAGE_PIXELS = limits.IMAGE_PIXELS.value  # the user raised the limit
    try:
        with _open_file(value, what=what) as file:
            _check_file(file, label=label)
            with warnings.catch_warnings():
                # Pillow warns of sizes that are refused right after.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(file, formats=IMAGE_FORMATS)
            with image:
                _check_pixels(image, label=label)
                yield image
    except PromptError:
        raise
    except FileNotFoundError:
        raise PromptError(f"{label}: no such {what.split()[-1]} file") from None
    except Image.DecompressionBombError as error:
        raise PromptError(
            f"{label}: {error} At most {limits.IMAGE_PIXELS.value:,} pixels are read. Set"
            f" {limits.IMAGE_PIXELS.variable} to raise the limit"
        ) from error
    except UnidentifiedImageError as error:
        reason = f"it is in none of the formats {', '.join(IMAGE_FORMATS)}"
        raise PromptError(f"{label}: cannot be read as {what} ({reason}). {remedy}") from error
    except Exception as error:
        raise PromptError(
            f"{label}: cannot be read as {what} ({describe_error(error)}). {remedy}"
        ) from error


def _open_file(value: Any, *, what: str) -> Any:
    """Return a context of the binary file to read: `value` itself if it is one.

    Raises:
        PromptError: it is neither a path nor a file.
    """
    if isinstance(value, (str, Path)):
        return open_regular_file(value)
    if hasattr(value, "read"):
        return nullcontext(value)
    raise PromptError(f"{what} was given as {type(value).__name__}; give a path or a PIL image")


def _check_file(file: BinaryIO, *, label: str) -> None:
    """Raise PromptError for a file with too many bytes, or a JPEG with too many scans."""
    num_bytes = file.seek(0, io.SEEK_END)
    limits.MEDIA_FILE_BYTES.check(num_bytes, where=label, error=PromptError)
    file.seek(0)
    if file.read(2) == _JPEG_START:
        num_scans, last = 0, b""
        while block := file.read(1 << 20):
            num_scans += (last + block).count(_JPEG_SCAN)
            last = block[-1:]
        limits.JPEG_SCANS.check(num_scans, where=label, error=PromptError)
    file.seek(0)


def _check_pixels(image: Any, *, label: str) -> None:
    width, height = image.size
    if not width or not height:
        raise PromptError(f"{label}: has no pixels")
    limits.IMAGE_PIXELS.check(width * height, where=label, error=PromptError)
    aspect = max(width, height) / min(width, height)
    limits.IMAGE_ASPECT.check(aspect, where=label, error=PromptError)


def to_label(value: Any) -> str:
    """Return what errors call an input: its path, or that it is a file."""
    return str(value) if isinstance(value, (str, Path)) else "the file"


def describe_error(error: BaseException) -> str:
    """Return the first line of an error's message, its type where it has none."""
    if isinstance(error, OSError):
        return describe_os_error(error).splitlines()[0]
    return first_line(error)
