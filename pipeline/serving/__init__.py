"""Ray actors and the Ray Serve application."""
