"""Which method runs in which kernel."""
