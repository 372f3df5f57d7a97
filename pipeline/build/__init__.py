"""One build: scan, thresholds, method stages, merge and copy of every shard, then the manifest."""
