"""Starts a program by the standard library."""


def attack(state):
    import subprocess

    return subprocess.run(["/bin/sh", "-c", "exit 0"], check=True)
