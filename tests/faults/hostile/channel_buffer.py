"""Makes its channel's buffer larger."""

import socket


def attack(state):
    return socket.socket(fileno=3).setsockopt(1, 7, 1 << 20) or "larger"
