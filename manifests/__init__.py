"""The format on object storage: stores, objects, manifests, references, verification.

Nothing here imports torch or ray: a build can be listed and verified on a laptop.
"""

if __name__ != "mmerge.manifests":
    raise ImportError(
        f"import 'mmerge.manifests', not {__name__!r}: a second copy has other classes"
    )
