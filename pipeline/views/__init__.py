"""Plans, builds, methods and runs as tables and JSON."""
