"""The models that questions are asked to: composites, reconstructed experts, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import RecipeError
from mmerge.manifests.format.manifest import ExpertRecord, Manifest
from mmerge.manifests.maintenance.check_build import open_checked_build
from mmerge.manifests.stores.open import is_local, to_local_path
from mmerge.pipeline.build.run import run
from mmerge.pipeline.evaluation.questions import Question
from mmerge.pipeline.execution.executor import Executor
from mmerge.pipeline.monitoring.progress import Progress
from mmerge.pipeline.planning.plan import make_plan
from mmerge.pipeline.recipes.parsing import parse_recipe
from mmerge.workers.modalities.prompt import find_media_templates


@dataclass(frozen=True)
class Model:
    """A model to ask: a build, and the expert to reconstruct from it (None: route by modality)."""

    name: str
    uri: str
    expert: str | None = None
    build: str = ""
    manifest: Manifest | None = None

    @classmethod
    def open(cls, name: str, uri: str, *, expert: str | None = None) -> Model:
        """Return the model at a composite's URI. Raises StoreError, ManifestError."""
        checked = open_checked_build(uri, level="records")
        manifest = checked.manifest
        if expert is not None:
            manifest.to_expert(expert)  # raises if there is none
        build_uri = f"{checked.store.uri}#{checked.build}"
        return cls(name, build_uri, expert, checked.build, manifest)

    @property
    def num_bytes(self) -> int:
        """Bytes of the build's objects."""
        return sum(entry.num_bytes for entry in self.manifest.entries) if self.manifest else 0

    @property
    def active_experts(self) -> tuple[ExpertRecord, ...]:
        """The experts whose modalities the model reads."""
        if self.manifest is None:
            return ()
        return tuple(
            record for record in self.manifest.experts if self.expert in (None, record.name)
        )


def is_checkpoint(uri: str) -> bool:
    """Return whether a URI is a checkpoint (a folder with config.json, or hf://), not a store."""
    if "#" in uri:
        return False
    if is_local(uri):
        return (to_local_path(uri) / "config.json").is_file()
    return uri.startswith("hf://")


def open_checkpoint(
    name: str,
    uri: str,
    *,
    base: str | None,
    modality: str | None,
    store_uri: str,
    executor: Executor,
    progress: Progress,
) -> Model:
    """Return a checkpoint as a model: a linear merge of it alone, equal to it bit for bit.

    Args:
        name: what the model is called.
        uri: the checkpoint, Hugging Face layout.
        base: the LLM it was tuned from, which determines the tensors of its language model; a
            checkpoint of text alone needs none.
        modality: what its encoder reads; None for a checkpoint of text alone.
        store_uri: the store that the build is written to.
        executor: where it is built.
        progress: notified of every task.

    Raises:
        RecipeError: a multimodal checkpoint without base.
        CheckpointError: it cannot be read.
    """
    if modality and not base:
        raise RecipeError(
            f"{name}: {uri}: give its base LLM with --base, to tell encoder and language model"
            " apart"
        )
    expert_name = modality or "text"
    raw: dict[str, Any] = {
        "name": f"model-{digest_json([uri, base, modality])[:12]}",
        "method": "linear",
        "output": store_uri,
        "experts": {expert_name: {"path": uri, "modality": expert_name}},
    }
    if base:
        raw["base"] = base
    plan = make_plan(parse_recipe(raw, folder=Path.cwd()))
    report = run(plan, executor=executor, progress=progress)
    return replace(Model.open(name, report.uri, expert=modality), name=name)


def check_media(models: Sequence[Model], questions: Sequence[Question]) -> None:
    """Check, before any model is loaded, that every model reads the media of every question.

    Raises:
        RecipeError: names the first question and model that do not fit.
    """
    for model in models:
        if model.manifest is None:
            continue
        readable_kinds = {"text"}
        for record in model.active_experts:
            readable_kinds |= {record.name, record.modality}
        for question in questions:
            kinds = {part.kind for part in (*question.parts, *question.media)}
            unreadable_kinds = sorted(kinds - readable_kinds)
            if unreadable_kinds:
                modalities = dict.fromkeys(record.modality for record in model.active_experts)
                raise RecipeError(
                    f"question {question.id!r} of task {question.task!r}: model {model.name!r} does"
                    f" not read {unreadable_kinds[0]!r}; it reads"
                    f" {', '.join(modalities) or 'text alone'}"
                )


def find_templates(models: Sequence[Model]) -> tuple[str | None, dict[str, str]]:
    """Return the prompt template and the media templates by modality of the models' recipes.

    The first model that has one decides, so that all models get equal prompts.
    """
    prompt_template: str | None = None
    media_templates: dict[str, str] = {}
    for model in models:
        if model.manifest is None:
            continue
        if prompt_template is None:
            prompt_template = model.manifest.template
        media_templates = find_media_templates(model.manifest.experts) | media_templates
    return prompt_template, media_templates
