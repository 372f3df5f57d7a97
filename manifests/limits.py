"""Limits on what is read from files and requests of other people, each raised by a variable.

They bound memory and time: a file of a few kilobytes can decode to gigabytes. docs/security.md
lists them. Limits of a file format itself stand beside its reader.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from mmerge.manifests.errors import MmergeError


@dataclass(frozen=True)
class Limit:
    """An upper bound, and the environment variable that replaces it."""

    variable: str
    default: int
    unit: str
    """What is counted, in the plural: "pixels"."""

    @property
    def value(self) -> int:
        """The bound now. Raises MmergeError if its variable is no positive whole number."""
        text = os.environ.get(self.variable, "")
        if not text:
            return self.default
        if not (text.isascii() and text.isdigit() and 0 < len(text) <= 18 and int(text)):
            raise MmergeError(f"{self.variable}: expected a positive whole number, got {text!r}")
        return int(text)

    def describe_excess(self, amount: float) -> str:
        """Return what is wrong with `amount`, which exceeds the bound; it names both numbers."""
        shown = f"{amount:,}" if isinstance(amount, int) else f"{amount:,.1f}"
        return (
            f"has {shown} {self.unit}, at most {self.value:,} are read. Set {self.variable} to"
            " raise the limit"
        )

    def check(self, amount: float, *, where: str, error: type[MmergeError]) -> None:
        """Raise `error`, with a message that begins with `where`, if `amount` is too large."""
        if amount > self.value:
            raise error(f"{where}: {self.describe_excess(amount)}")


MEDIA_FILE_BYTES = Limit("MMERGE_MAX_MEDIA_FILE_BYTES", 1 << 30, "bytes")
IMAGE_PIXELS = Limit("MMERGE_MAX_IMAGE_PIXELS", 1 << 26, "pixels")
JPEG_SCANS = Limit("MMERGE_MAX_JPEG_SCANS", 200, "scans")
"""Each scan of a progressive JPEG is decoded over all pixels, however few bytes it has."""
IMAGE_ASPECT = Limit("MMERGE_MAX_IMAGE_ASPECT", 50, "times the height as width, or width as height")
"""Processors scale the shorter side to a fixed size: a line of pixels becomes a large image."""
VIDEO_FRAMES = Limit("MMERGE_MAX_VIDEO_FRAMES", 512, "frames")
VIDEO_PIXELS = Limit("MMERGE_MAX_VIDEO_PIXELS", 1 << 27, "pixels in all its frames")
FILM_FRAMES = Limit("MMERGE_MAX_FILM_FRAMES", 200_000, "frames")
"""Of a film (MP4, WebM), of which the expert's processor takes some."""
FILM_PIXELS = Limit("MMERGE_MAX_FILM_PIXELS", 1 << 33, "pixels to decode")
"""Of all frames up to the last one that is taken; a frame follows from those before it."""
AUDIO_SECONDS = Limit("MMERGE_MAX_AUDIO_SECONDS", 3600, "seconds of audio")
AUDIO_SAMPLES = Limit("MMERGE_MAX_AUDIO_SAMPLES", 1 << 26, "samples per channel")
AUDIO_CHANNELS = Limit("MMERGE_MAX_AUDIO_CHANNELS", 16, "channels")
AUDIO_RATE = Limit("MMERGE_MAX_AUDIO_RATE", 384_000, "samples per second")
MIN_AUDIO_RATE = 1000
"""In Hz. A file of a lower rate is no recording, and resampling would enlarge it."""
ARRAY_ENTRIES = Limit("MMERGE_MAX_ARRAY_ENTRIES", 1 << 25, "numbers")
PROCESSOR_EDGE = Limit("MMERGE_MAX_PROCESSOR_EDGE", 4096, "pixels on a side")
"""Of the images that the processor of an expert makes."""
PROCESSOR_NUMBER = Limit("MMERGE_MAX_PROCESSOR_NUMBER", 1 << 26, "as value")
PROMPT_CHARACTERS = Limit("MMERGE_MAX_PROMPT_CHARACTERS", 1_000_000, "characters")
CHAT_TEMPLATE_CHARACTERS = Limit("MMERGE_MAX_CHAT_TEMPLATE_CHARACTERS", 200_000, "characters")
PROMPT_FILE_BYTES = Limit("MMERGE_MAX_PROMPT_FILE_BYTES", 256 << 20, "bytes")
REQUEST_BYTES = Limit("MMERGE_MAX_REQUEST_BYTES", 64 << 20, "bytes")
"""Of the body of one request to a server, which is held in memory."""
REQUEST_MEDIA = Limit("MMERGE_MAX_REQUEST_MEDIA", 32, "media")
REQUEST_SECONDS = Limit("MMERGE_MAX_REQUEST_SECONDS", 60, "seconds")
"""Until all of a request has arrived."""
QUESTION_FILE_BYTES = Limit("MMERGE_MAX_QUESTION_FILE_BYTES", 1 << 30, "bytes")
RECIPE_BYTES = Limit("MMERGE_MAX_RECIPE_BYTES", 1 << 20, "bytes")
RECIPE_ALIASES = Limit("MMERGE_MAX_RECIPE_ALIASES", 100, "aliases")
RECIPE_VALUES = Limit("MMERGE_MAX_RECIPE_VALUES", 100_000, "values with its aliases expanded")
RECIPE_DEPTH = Limit("MMERGE_MAX_RECIPE_DEPTH", 50, "levels of nesting")
SMALL_FILE_BYTES = Limit("MMERGE_MAX_SMALL_FILE_BYTES", 64 << 20, "bytes")
"""Of one configuration, tokenizer or processor file; all of a checkpoint are held in memory."""
SMALL_FILES_BYTES = Limit("MMERGE_MAX_SMALL_FILES_BYTES", 256 << 20, "bytes of small files")
SMALL_FILES = Limit("MMERGE_MAX_SMALL_FILES", 1000, "small files")
TABLE_ROWS = Limit("MMERGE_MAX_TABLE_ROWS", 1 << 21, "rows")
"""Of a build's table of tensors. A million equal rows take some kilobytes in Parquet, and more than
a gigabyte of memory.
"""
TABLE_BYTES = Limit("MMERGE_MAX_TABLE_BYTES", 1 << 29, "bytes once decompressed")
"""Of that table: a row has about 500, and few long texts can stand in many rows."""
ARCHIVE_ENTRIES = Limit("MMERGE_MAX_ARCHIVE_ENTRIES", 100_000, "entries")
PATTERN_CHARACTERS = Limit("MMERGE_MAX_PATTERN_CHARACTERS", 1000, "characters")
PATTERNS = Limit("MMERGE_MAX_PATTERNS", 1000, "patterns")
ENCODER_LAYERS = Limit("MMERGE_MAX_LAYERS", 2000, "layers")
"""Of a model that a configuration describes: modules are made before any weight is compared."""
