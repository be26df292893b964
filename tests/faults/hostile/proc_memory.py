"""Opens its memory as a file."""


def attack(state):
    with open("/proc/self/mem", "rb"):
        return "its memory"
