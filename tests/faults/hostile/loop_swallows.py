"""Loops forever and catches every exception."""


def attack(state):
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue
