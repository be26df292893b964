"""Opens a TCP socket."""

import socket


def attack(state):
    return socket.socket()
