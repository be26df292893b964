"""Fleet of upstreams: route requests to one of several replicas by their prompts, load and health.

Imported by environment, recording, episode, api and commands. Imports the client of one upstream, settings and metrics.
"""
