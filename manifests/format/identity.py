"""The digest that names a build: one formula for the writer of a manifest and for its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmerge.manifests.digest import digest_json
from mmerge.manifests.format.entry import digest_of_object
from mmerge.manifests.format.manifest import VERSION, BaseRecord, ExpertRecord, Manifest, to_fields


def make_build_digest(fields: dict[str, Any], objects: Sequence[str]) -> str:
    """Return the digest of a build: of its recipe, of its inputs, and of how its objects were made.

    Args:
        fields: the manifest's fields of the recipe, the base and the experts (`to_fields`).
        objects: the DIGEST of each object's key, merged objects first, in the plan's order.
    """
    base: BaseRecord = fields["base"]
    experts: Sequence[ExpertRecord] = fields["experts"]
    identity = {
        **fields,
        "version": VERSION,
        "base": base.model_dump(mode="json"),
        "experts": [_describe_expert(expert) for expert in experts],
        "objects": list(objects),
    }
    return digest_json(identity)


def _describe_expert(expert: ExpertRecord) -> dict[str, Any]:
    """Return the fields of an expert that have part in the digest.

    `layout` is left out where it is absent, so that builds keep their digests of before it existed.
    """
    described: dict[str, Any] = expert.model_dump(mode="json")
    if expert.layout is None:
        del described["layout"]
    return described


def recompute_build_digest(manifest: Manifest) -> str:
    """Return the digest that a manifest's own fields and entries give; equal to its `build`."""
    objects = [digest_of_object(entry.key) for entry in manifest.entries]
    return make_build_digest(to_fields(manifest), objects)
