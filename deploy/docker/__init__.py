"""Container image: its Dockerfile, and the health check that runs in it."""
