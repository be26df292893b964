"""Health check of the container: exit 0 if the proxy in it answers `/health`, which needs no key.

python -m deploy.docker.container_health
"""

from __future__ import annotations

import http.client
import os
import sys
from typing import Final

TIMEOUT_S: Final = 3.0
DEFAULT_PORT: Final = 8400
"""Default of AUTOTTS_PORT. The proxy's settings are not imported, because that would take most of the time."""


def main() -> int:
    """Ask the proxy once; print why it is not healthy and return 1, or return 0."""
    port = int(os.environ.get("AUTOTTS_PORT") or DEFAULT_PORT)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"the proxy does not answer on port {port}: {error}\n")
        return 1
    finally:
        connection.close()
    if status != http.HTTPStatus.OK:
        sys.stderr.write(f"/health on port {port} has status {status}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
