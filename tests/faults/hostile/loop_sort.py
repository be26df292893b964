"""Never comes back from a sort key."""


def attack(state):
    return sorted([2, 1], key=lambda _: next(n for n in iter(int, 1) if n))
