"""Opens a UDP socket."""

import socket


def attack(state):
    return socket.socket(type=socket.SOCK_DGRAM)
