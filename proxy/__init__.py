"""OpenAI-compatible server that runs a test-time-compute controller for each request against a vLLM upstream."""
