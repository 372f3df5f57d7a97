"""BLAKE3 digests of bytes and of JSON in canonical form."""

from __future__ import annotations

import json
import re
from typing import Any

from blake3 import blake3

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
SHOWN_DIGITS = 12
"""Hex digits of a digest in messages; all 64 are stored."""


def digest_bytes(data: bytes | memoryview) -> str:
    """Return the BLAKE3 digest of `data` as 64 hex digits."""
    return str(blake3(data).hexdigest())


def to_canonical_json(value: Any) -> bytes:
    """Return `value` as JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises:
        ValueError: `value` holds NaN or Inf.
        TypeError: `value` holds a type that JSON cannot represent.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def digest_json(value: Any) -> str:
    """Return the digest of `value` in canonical JSON."""
    return digest_bytes(to_canonical_json(value))


def parse_json(
    data: bytes, *, what: str, max_bytes: int = 256 << 20, allow_infinity: bool = False
) -> Any:
    """Return the value of strict JSON: no duplicate keys, no NaN, at most `max_bytes` long.

    Its text is Unicode: half of a surrogate pair, which JSON can escape, is refused. Infinity is
    allowed where Python's own writer is known to put it: configurations of models.

    Raises:
        ValueError: the text breaks one of these rules; the message begins with `what`.
    """
    if len(data) > max_bytes:
        raise ValueError(f"{what}: {len(data):,} bytes of JSON, at most {max_bytes:,} are read")

    def to_constant(name: str) -> float:
        if allow_infinity and name != "NaN":
            return float(name)
        raise ValueError(f"{what}: {name} is no JSON number")

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for key, value in pairs:
            if key in items:
                raise ValueError(f"{what}: key {key!r} stands twice")
            items[key] = value
        return items

    try:
        value = json.loads(data, object_pairs_hook=to_dict, parse_constant=to_constant)
        if _SURROGATE_ESCAPE.search(data):  # half a pair is a text that cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: no valid JSON ({error})") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: has half of a surrogate pair, which is no character") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{what}: no valid JSON ({type(error).__name__})") from error
    except ValueError as error:
        if str(error).startswith(what):
            raise
        raise ValueError(f"{what}: no valid JSON ({error})") from error  # a number of 5,000 digits
