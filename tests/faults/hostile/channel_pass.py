"""Passes a descriptor over its channel."""

import socket


def attack(state):
    return socket.send_fds(socket.socket(fileno=3), [b"x"], [0])
