"""Never comes back from raising: its error's text has no end."""


class Endless(Exception):
    def __str__(self):
        while True:
            pass


def attack(state):
    raise Endless
