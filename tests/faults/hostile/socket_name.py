"""Looks a host up."""

import socket


def attack(state):
    return socket.getaddrinfo(b"localhost", 80)
