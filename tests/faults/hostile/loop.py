"""Never comes back."""


def attack(state):
    while True:
        pass
