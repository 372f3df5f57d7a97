"""What the user writes: recipe files, parsed and validated."""
