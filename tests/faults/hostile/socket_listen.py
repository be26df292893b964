"""Listens on a TCP socket."""

import socket


def attack(state):
    return socket.create_server(("127.0.0.1", 0))
