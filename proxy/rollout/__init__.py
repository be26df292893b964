"""Choose and run controllers: rollout stages, sandbox processes, the shadow, and the tests of canaries and costs.

Imported by recording, episode and app.
"""
