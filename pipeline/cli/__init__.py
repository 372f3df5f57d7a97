"""The command line: one module per group of commands, found by name (`commands.py`)."""
