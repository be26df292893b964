"""Resolves a host name."""

import socket


def attack(state):
    return socket.getaddrinfo(b"localhost", 80)
