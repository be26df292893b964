"""The live side: an OpenAI-compatible server that runs a controller for each request over a vLLM backend."""
