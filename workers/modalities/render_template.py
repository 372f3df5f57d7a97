"""Render chat templates: a program for a process of its own, which a template cannot outgrow.

A template is a program of whoever made the checkpoint. transformers renders it in a sandbox that
keeps it from files and modules, not from memory and time: those are bounded here.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Render what stdin asks for, a JSON object; write a list of texts and errors to stdout."""
    from transformers.utils.chat_template_utils import render_jinja_template

    request: dict[str, Any] = json.load(sys.stdin)
    _limit(memory_bytes=request["memory_bytes"], seconds=request["seconds"])
    results = []
    for content in request["contents"]:
        message = {"role": "user", "content": content}
        try:
            texts, _ = render_jinja_template(
                [[message]],
                chat_template=request["template"],
                add_generation_prompt=True,
                **request["tokens"],
            )
            if len(texts[0]) > request["characters"]:
                raise ValueError(f"it makes {len(texts[0]):,} characters of a short question")
            results.append({"text": texts[0]})
        except MemoryError:
            results.append({"error": "it takes too much memory"})
        except Exception as error:  # noqa: BLE001 - templates raise anything
            text = str(error).strip()
            first = text.splitlines()[0][:200] if text else ""
            results.append({"error": f"{type(error).__name__}: {first}"})
    json.dump(results, sys.stdout)


def _limit(*, memory_bytes: int, seconds: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    total = pages * resource.getpagesize() + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (total, total))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    stop = int(usage.ru_utime + usage.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (stop, stop))


if __name__ == "__main__":
    main()
