"""Ways to bring the proxy up together with something to stand in front of."""
