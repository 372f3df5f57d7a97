"""Errors that a user can act on: each names the thing, both sides, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from mmerge.manifests.redaction import redact

REPAIR = "'mmerge run RECIPE --fresh', with the recipe of this build, repairs it"
"""Remedy for every damage of a stored build: a run with `--fresh` compares all that the build has
with what it computes, and writes again what is missing or damaged.
"""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, its type where there is none."""
    text = Exception.__str__(error) if isinstance(error, MmergeError) else str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]


class MmergeError(Exception):
    """Base of all errors that the project raises deliberately; the CLI prints them in one line.

    Secrets in the URLs of a message are removed when the error is made.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))

    def __str__(self) -> str:
        return f"{type(self).__name__}: {super().__str__()}"


class RecipeError(MmergeError):
    """The recipe is invalid; the message begins with the path of the key."""


class CheckpointError(MmergeError):
    """A base or expert checkpoint cannot be read, is damaged, or does not fit the base."""


class ShapeMismatch(CheckpointError):
    """A tensor has one shape in the base and another in an expert."""


class NonFiniteError(CheckpointError):
    """An input tensor holds NaN or Inf."""


class StoreError(MmergeError):
    """The object store cannot be opened, read or written."""


class StoreUnavailable(StoreError):
    """The store did not answer, or the connection broke, until the time limit of retries."""


class NotFound(StoreError):
    """The store has no object of that key."""


class AlreadyExists(StoreError):
    """The store already has an object of that key; nothing was overwritten."""


class ManifestError(MmergeError):
    """A manifest is missing, damaged, or of an unknown version."""


class MissingObjects(ManifestError):
    """Objects that a build names are not in the store, or have another size."""

    def __init__(self, uri: str, keys: Sequence[str]) -> None:
        self.uri, self.keys = uri, list(keys)
        others = f" and {len(self.keys) - 1} more" if len(self.keys) > 1 else ""
        super().__init__(
            f"{uri}: {self.keys[0]}{others}: missing, or of another size than the manifest says;"
            " garbage collection or somebody else deleted it. Run the recipe again"
        )

    def __reduce__(self) -> tuple[type[MissingObjects], tuple[str, list[str]]]:
        return (type(self), (self.uri, self.keys))


class DamagedObject(ManifestError):
    """The bytes of an object differ from what its manifest describes."""


class SignatureError(MmergeError):
    """A signature is missing, cannot be made, or is not by the required identity."""


class UnknownVersion(ManifestError):
    """A manifest has a version of the format that this program does not read."""


class BuildDiffers(MmergeError):
    """A build was made or copied again with another result; the stored one was not replaced."""


class PromptError(MmergeError):
    """A prompt cannot be answered by this composite."""

    index: int | None = None
    """Which of several prompts, from 0; None where there is one, or the error is not of one."""


class PlacementError(MmergeError):
    """A composite does not fit the devices, or cannot be partitioned over that many."""


class RankLost(MmergeError):
    """A process that holds a part of the composite has ended or does not answer."""


class TaskErrors(MmergeError):
    """Several tasks failed; the message has one line per failure."""

    def __init__(self, failures: Sequence[str]) -> None:
        self.failures = list(failures)
        noun = "task" if len(self.failures) == 1 else "tasks"
        super().__init__(
            f"{len(self.failures)} {noun} failed; finished shards are kept:\n  "
            + "\n  ".join(self.failures)
        )

    def __reduce__(self) -> tuple[type[TaskErrors], tuple[list[str]]]:
        return (type(self), (self.failures,))
