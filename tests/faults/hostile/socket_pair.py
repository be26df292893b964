"""Makes a pair of sockets."""

import socket


def attack(state):
    return socket.socketpair()
