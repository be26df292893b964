"""Live environment of one request: its branches on vLLM, their answers, and whether the task can be voted on.

Imported by recording, episode and api. Imports upstream and what is below it.
"""
