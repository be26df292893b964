"""Client of the vLLM server: calls, retries, the circuit breaker, branch slots, health checks and response bodies.

Imported by http, admission and every folder above. Knows nothing about clients or episodes.
"""
