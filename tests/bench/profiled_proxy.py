"""Command line of the proxy under a profiler, which SIGUSR1 starts. The profile is written when the proxy ends.

python -m tests.bench.profiled_proxy FILE serve …
"""

from __future__ import annotations

import cProfile
import signal
import sys
import time

from proxy.cli import main

if __name__ == "__main__":
    output, profiler = sys.argv.pop(1), cProfile.Profile(time.thread_time)
    signal.signal(signal.SIGUSR1, lambda *_: profiler.enable())
    try:
        main()
    finally:
        profiler.disable()
        profiler.dump_stats(output)
