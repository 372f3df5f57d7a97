"""What is shown of a build."""
