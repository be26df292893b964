"""Choose and run controllers: rollout stages, sandboxed processes, the shadow, and the tests that watch a canary.

Imported by recording, episode and app.
"""
