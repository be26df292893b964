"""Never comes back, and swallows whatever is thrown at it."""


def attack(state):
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue
