"""The model at inference: load, route, place, parallelise."""
