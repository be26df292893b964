"""Programs that change a registry or a ledger in several processes at once."""

from __future__ import annotations

import subprocess
import sys

from discovery.store import StorePlace, child_environment


def run_together(program: str, place: StorePlace, count: int) -> list[int]:
    """Run a program in `count` processes at once, and return the numbers that they print.

    The program gets the place and the number of its process as arguments. It prints 0, which is not returned, and
    begins once its standard input is closed.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(place), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(place),
        )
        for number in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None  # so that `communicate` does not close it again
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return [int(line) for output in outputs for line in output.split()]
