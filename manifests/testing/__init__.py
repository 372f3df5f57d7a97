"""Conformance suites for third-party stores, to be run by pytest (docs/storage.md)."""

from mmerge.manifests.testing.store_conformance import ReadableStoreConformance, StoreConformance

__all__ = ["ReadableStoreConformance", "StoreConformance"]
