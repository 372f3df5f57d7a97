"""Options of generation, and answers while they are generated."""
