"""Opens a Unix socket."""

import socket


def attack(state):
    return socket.socket(socket.AF_UNIX)
