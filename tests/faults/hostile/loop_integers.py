"""Never comes back from one multiplication."""


def attack(state):
    return 7 ** (7**9) % 2 == 3
