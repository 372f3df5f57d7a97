"""Computation: methods, checkpoints read, shards written, the composite on its devices."""

if __name__ != "mmerge.workers":
    raise ImportError(f"import 'mmerge.workers', not {__name__!r}: a second copy has other classes")
