"""Where tasks run: serial, processes, Ray; scheduler and simulation."""
