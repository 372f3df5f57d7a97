"""Secrets in URLs, removed from what is printed, logged or stored."""

from __future__ import annotations

import re

REDACTED = "***"
_USER_INFO = re.compile(
    r"""([a-zA-Z][a-zA-Z0-9+.-]{0,30}://)
    (?: [^\s/?#'"<>]{1,2000}                                # as URLs should be
      | [^\s/?#'"<>:@]{0,2000} : (?!\d{1,5}/) [^\s'"<>@]{1,2000}  # a password with / or #
    ) @""",
    re.VERBOSE,
)
_PARAMETER = re.compile(
    r"([?&;][a-z0-9_.-]{0,64}(?:sig|signature|token|secret|password|passwd|credential|key|auth)=)"
    r"[^\s&;#'\"<>]+",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(authorization['\"]?\s{0,3}[:=]\s{0,3}['\"]?(?:bearer|basic)\s{1,3})[A-Za-z0-9._~+/=-]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b")


def redact(text: str) -> str:
    """Return a text without user names, passwords and tokens of the URLs in it.

    Covers `scheme://USER:PASSWORD@host`, parameters such as `?sig=…` of shared access signatures
    and `X-Amz-Signature`, authorization headers, and tokens of the Hugging Face Hub.
    """
    if "@" in text:
        text = _USER_INFO.sub(rf"\1{REDACTED}@", text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\1{REDACTED}", text)
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    return _TOKEN.sub(REDACTED, text)


def has_user_info(uri: str) -> bool:
    """Return whether the host of a URI follows a user name or password."""
    return bool(_USER_INFO.match(uri))
