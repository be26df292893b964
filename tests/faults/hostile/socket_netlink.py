"""Opens a netlink socket."""

import socket


def attack(state):
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
