"""Talks to the kernel about networks."""

import socket


def attack(state):
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
