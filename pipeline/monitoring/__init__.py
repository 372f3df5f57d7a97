"""Progress, run records and metrics."""
