"""Never comes back from a sum in C."""


def attack(state):
    return sum(range(1 << 62)) == 0
