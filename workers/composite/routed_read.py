"""The weights of a routed Linear read from a build."""

from __future__ import annotations

import torch

from mmerge.workers.composite.routed_linear import Policy, RoutedWeights
from mmerge.workers.reconstruction.bitmask import pack_rows
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.masked_read import read_formed
from mmerge.workers.runtime.host_memory import Empty, empty_host


def read_routed(
    reader: BuildReader, name: str, *, dtype: torch.dtype, policy: Policy, empty: Empty = empty_host
) -> RoutedWeights:
    """Return what the RoutedLinear of a matrix [rows, width] holds, θ_text in `dtype`, in memory
    from `empty` where it is read in one pass.

    Raises:
        DamagedObject: bytes are not what the manifest says.
    """
    rescalers = [reader.rescaler(expert) for expert in reader.expert_names]
    height, width = reader.shape(name, "base")
    if policy == "packed" and width % 8 == 0:
        is_kept = (
            len(rescalers) > 1
        )  # of a single expert neither τ⋆ nor bits are: nothing that is dropped goes to `empty`
        memory = empty if is_kept else empty_host
        formed = read_formed(
            reader,
            reader.masked_pieces(name),
            dtype=dtype,
            factors=rescalers,
            keeps_delta=is_kept,
            empty=memory,
        )
        if formed is not None:
            factors, divisor = RoutedWeights.factors_of(rescalers)
            if formed.delta is None:  # of a single expert θ_text is all there is
                return RoutedWeights(formed.values, None, None, None, factors, divisor)
            # Bits fill the stored words from the first byte on, and rows end on whole bytes.
            masks = formed.masks[:, : height * width // 8].view(-1, height, width // 8)
            return RoutedWeights(formed.values, formed.delta, masks, None, factors, divisor)
    base = reader.read(name, "base")
    masks = torch.stack(
        [
            pack_rows(reader.read_packed_mask(name, expert), base.shape)
            for expert in reader.expert_names
        ]
    )
    return RoutedWeights.make(
        base, reader.read(name, "delta"), masks, dtype=dtype, policy=policy, rescalers=rescalers
    )
