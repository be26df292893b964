"""A tiny reasoning model, trained from scratch by this repository, served by vLLM for CPU."""
