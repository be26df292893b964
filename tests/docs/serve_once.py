"""Run `autotts serve` on a free port until it listens, then stop it.

`python -m tests.docs.serve_once serve [FLAG ...]` is its command line.

Ends with the status of `autotts serve`, which is 0 after an orderly stop, or with 70 if it never listened.
"""

from __future__ import annotations

import subprocess
import sys

NEVER_LISTENED = 70


def main(arguments: list[str]) -> int:
    """Serve, stop and return the status."""
    command = [sys.executable, "-m", "proxy.cli", *arguments, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        has_listened = False
        for line in process.stderr:
            sys.stderr.write(line)
            if not has_listened and "listens on http://" in line:
                has_listened = True
                process.terminate()
    return process.returncode if has_listened else process.returncode or NEVER_LISTENED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
