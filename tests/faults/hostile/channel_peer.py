"""Asks for the credentials of the other end of its channel."""

import socket


def attack(state):
    return socket.socket(fileno=3).getsockopt(1, 17, 12)
