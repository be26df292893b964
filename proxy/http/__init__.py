"""HTTP server side: connections, request heads and bodies, server-sent events, graceful shutdown and the access log.

Imported by admission and every folder above. Knows nothing about models or episodes.
"""
