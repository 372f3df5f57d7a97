"""Load a composite from its store onto its devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch

from mmerge.manifests.errors import CheckpointError, ManifestError, PlacementError
from mmerge.manifests.format.manifest import FileEntry, read_file
from mmerge.workers.composite.decoder.text_answers import (
    choose_rules,
    measure_base_rules,
    scale_logits,
)
from mmerge.workers.composite.decoder.text_config import to_language_config
from mmerge.workers.composite.language_model import LanguageModelLoader, LoadRequest
from mmerge.workers.composite.loaded import LoadReport
from mmerge.workers.composite.meta_model import find_text_class
from mmerge.workers.composite.model import Composite
from mmerge.workers.composite.placement import Placement
from mmerge.workers.composite.prefetch import (
    RANK_WINDOW_BYTES,
    WINDOW_BYTES,
    prefetch,
    read_threads,
)
from mmerge.workers.composite.process_group import (
    ProcessGroup,
    check_device,
    in_torchrun,
    open_process_group,
)
from mmerge.workers.composite.rank_encoder import RankEncoder
from mmerge.workers.composite.routed_linear import Policy
from mmerge.workers.composite.routing import Routing
from mmerge.workers.composite.served_models import refuse_unserved
from mmerge.workers.composite.shard_exchange import assign_ranks
from mmerge.workers.modalities.chat_files import load_chats
from mmerge.workers.modalities.encoders import Encoder, load_base_encoders, load_encoder
from mmerge.workers.modalities.expert_model import make_config
from mmerge.workers.modalities.processor_encoder import load_tokenizer
from mmerge.workers.modalities.text_rules import TextRules
from mmerge.workers.reconstruction.expert_only import refuse_unshared
from mmerge.workers.reconstruction.language_reader import LanguageReader
from mmerge.workers.reconstruction.masked_weights import load_kernel
from mmerge.workers.runtime.host_memory import resident_bytes

Mode = Literal["expansion", "retention"]


def load_composite(
    uri: str,
    *,
    mode: Mode = "expansion",
    expert: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    policy: Policy = "packed",
    placement: Placement | None = None,
    group: ProcessGroup | None = None,
    check: bool = True,
    on_bytes: Callable[[int, int], None] = lambda num_bytes, total: None,
    reuse: Composite | None = None,
) -> Composite:
    """Return the composite at `uri`, ready for prompts.

    Args:
        uri: STORE, STORE#NAME, STORE#NAME@NUMBER or STORE#DIGEST.
        mode: `expansion` multiplies each token by its modality's weights; `retention` rebuilds one
            expert.
        expert: the expert to rebuild, in retention mode.
        device: of the composite, or of this rank's part of it.
        dtype: of the loaded weights; the build's if absent.
        policy: which weights of a build of masks are resident, see `routed_linear.Policy`.
        placement: from `plan_placement`: over layers in this process, or over the ranks that
            torchrun started.
        group: the processes that hold the composite together, from `open_process_group`; from the
            placement if absent.
        check: whether a small prompt is answered by each expert's own class too, and compared.
            Without it, and on several devices, classes that no test compares are refused.
        on_bytes: called with the stored bytes that this rank has read and will read in all.
        reuse: a composite on the same device, such as one of an earlier build. Tensors of its
            language model that this build has too are shared, and neither read nor held twice.

    Raises:
        ManifestError, StoreError: the build is missing or damaged, has no such expert, or an
            expert's language model has tensors that the base lacks.
        CheckpointError: transformers does not know the models, or a composite cannot serve an
            expert of this class.
        PlacementError: the model cannot be divided as asked, or there is no such device.
        RankLost: another rank ended.
    """
    if mode not in get_args(Mode) or policy not in get_args(Policy):
        raise ManifestError(
            f"{uri}: expected a mode of {get_args(Mode)} and a policy of {get_args(Policy)}, got"
            f" {mode!r} and {policy!r}"
        )
    devices = {device}
    if placement is not None and placement.num_ranks == 1:
        devices |= {stage.device for stage in placement.stages}
    for name in sorted(devices):
        check_device(name)
    reader = LanguageReader(uri)
    if mode == "retention":
        if expert is None:
            raise ManifestError(
                f"{uri}: retention mode rebuilds one expert: name one of"
                f" {', '.join(reader.expert_names)}"
            )
        reader.manifest.to_expert(expert)
    elif expert is not None:
        raise ManifestError(
            f"{uri}: 'expert' has no effect in expansion mode; use mode='retention', or leave"
            " it out"
        )
    refuse_unshared(reader, expert)
    is_whole = placement is None or (placement.num_ranks == 1 and len(placement.stages) == 1)
    is_compared = check and is_whole and (group is None or group.num_ranks == 1)
    refuse_unserved(reader, expert, is_compared=is_compared)
    group = _check_group(placement, device, group=group)
    request = LoadRequest(
        reader=reader,
        expert=expert,
        device=torch.device(device),
        dtype=dtype or reader.dtype,
        policy=policy,
        placement=placement,
        group=group,
        on_bytes=on_bytes,
        is_compared=is_compared,
        reuse=None if reuse is None else reuse.loaded,
    )
    if request.reuse is not None and not (
        request.can_share and request.reuse.device == request.device
    ):
        raise PlacementError(
            f"{uri}: tensors are shared by composites that are whole on one device: the other is on"
            f" {request.reuse.device}. Leave 'reuse' out"
        )
    try:
        return _load(request)
    except Exception:
        group.close(wait=False)  # the other ranks learn at once that this one is gone
        raise


def _check_group(
    placement: Placement | None, device: str, *, group: ProcessGroup | None
) -> ProcessGroup:
    """Return the process group of a placement, opened if absent; they must have the same size."""
    num_ranks = placement.num_ranks if placement is not None else None
    if group is None:
        if num_ranks is None or num_ranks == 1:
            group = ProcessGroup()
        elif not in_torchrun():
            raise PlacementError(
                f"the placement is for {num_ranks} ranks, this process is alone: start it with"
                f" 'torchrun --nproc-per-node {num_ranks}'"
            )
        else:
            group = open_process_group(device=device)
    if num_ranks is not None and num_ranks != group.num_ranks:
        raise PlacementError(
            f"the placement is for {num_ranks} ranks, {group.num_ranks} were started"
        )
    return group


def _load(request: LoadRequest) -> Composite:
    """Read, place and connect everything."""
    start_time = time.monotonic()
    reader, manifest, group = request.reader, request.reader.manifest, request.group
    record = manifest.to_expert(request.expert) if request.expert else manifest.base
    files = _read_files(reader, record.files)
    if "config.json" not in files:
        raise CheckpointError(f"{request.owner}: the build has no config.json of it")
    whole_config = make_config(files, owner=request.owner)
    config = to_language_config(whole_config)
    # Imports the model's module; with the kernel, all code is in memory before the first weight.
    text_class = find_text_class(config.get_text_config(), owner=request.owner)
    if manifest.kind == "masks":
        load_kernel()
    start_bytes = resident_bytes("VmRSS")
    encoder_ranks, encoder_loads = _assign_encoders(request)
    routing = Routing()
    loader = LanguageModelLoader(request, routing=routing, loads=encoder_loads)
    with prefetch(
        loader.first_items(),
        loader.read,
        num_threads=read_threads(reader.store),
        window_bytes=_window_bytes(request),
    ) as tensors:
        # Model, tokenizer and encoders are made while threads read the language model.
        model = loader.make_model(config, text_class.__name__, tensors=tensors)
        tokenizer = load_tokenizer(files, config=whole_config, owner=request.owner)
        hidden_size = model.config.hidden_size
        encoders = {
            name: _load_encoder(request, name, source=rank, hidden_size=hidden_size)
            for name, rank in encoder_ranks.items()
        }
        encoders |= _load_base_encoders(request, files)
        loader.fill(model, tensors)
    loader.connect(model)
    rules = _apply_rules(request, model, encoders)
    report = LoadReport(
        rank=group.rank,
        bytes_read=reader.bytes_read,
        seconds=time.monotonic() - start_time,
        start_bytes=start_bytes,
        peak_bytes=resident_bytes("VmHWM"),
    )
    composite = Composite(
        manifest=manifest,
        expert=request.expert,
        language_model=model,
        routing=routing,
        tokenizer=tokenizer,
        encoders=encoders,
        chats=load_chats(reader, request.expert),
        text_is_prefix=rules is not None and rules.is_prefix,
        group=group,
        load_reports=group.all_gather_object(report),
        loaded=loader.loaded,
    )
    if request.is_compared and rules is not None:
        composite.compare_with_classes(rules)
    return composite


def _apply_rules(
    request: LoadRequest, model: Any, encoders: Mapping[str, Encoder]
) -> TextRules | None:
    """Scale logits as the experts' class does; return the rules, None without such a class."""
    measured = {name: getattr(encoder, "text_rules", None) for name, encoder in encoders.items()}
    if not any(measured.values()):
        return None
    base = measure_base_rules(model, owner=request.owner)
    rules = choose_rules(
        base,
        [rule or base for rule in measured.values()],
        is_routed=request.expert is None
        and request.reader.manifest.kind != "plain"
        and not request.reader.is_multimodal,
    )
    scale_logits(model, base, rules, owner=", ".join(measured))
    return rules


def _read_files(reader: LanguageReader, entries: tuple[FileEntry, ...]) -> dict[str, bytes]:
    return {entry.name: read_file(reader.store, entry) for entry in entries}


def _window_bytes(request: LoadRequest) -> int | None:
    """Return how many stored bytes may be prefetched."""
    if request.group.num_ranks > 1:
        return RANK_WINDOW_BYTES
    if all(device.type == "cpu" for device in request.devices):
        return None  # the tensors become the model as they are: no second copy in memory
    return max(WINDOW_BYTES, request.reader.largest_shard_bytes())


def _assign_encoders(request: LoadRequest) -> tuple[dict[str, int], list[int]]:
    """Return the rank that holds each expert's encoder, and the bytes each rank reads for them."""
    reader, num_ranks = request.reader, request.group.num_ranks
    names = [request.expert] if request.expert else reader.expert_names
    sizes = [reader.encoder_bytes(name) for name in names]
    owners = assign_ranks(sizes, num_ranks=num_ranks)
    loads = [0] * num_ranks
    for owner, size in zip(owners, sizes, strict=True):
        loads[owner] += size
    return dict(zip(names, owners, strict=True)), loads


def _load_encoder(request: LoadRequest, name: str, *, source: int, hidden_size: int) -> Encoder:
    """Return the encoder of an expert, which rank `source` holds."""
    record = request.reader.manifest.to_expert(name)
    device = request.devices[0]
    encoder = None
    if source == request.group.rank:
        encoder = load_encoder(
            request.reader,
            name,
            files=_read_files(request.reader, request.reader.encoder_files(name)),
            hidden_size=hidden_size,
            dtype=request.dtype,
            device=device,
        )
    if request.group.num_ranks == 1:
        assert encoder is not None
        return encoder
    return RankEncoder(
        encoder,
        modality=record.modality,
        group=request.group,
        source=source,
        dtype=request.dtype,
        device=device,
    )


def _load_base_encoders(request: LoadRequest, files: Mapping[str, bytes]) -> dict[str, Encoder]:
    """Return the encoders of a multimodal base that no expert replaces; every rank has its own."""
    if request.expert:
        return {}
    return load_base_encoders(
        request.reader, files=files, dtype=request.dtype, device=request.devices[0]
    )
