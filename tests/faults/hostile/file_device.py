"""Opens a device."""


def attack(state):
    with open("/dev/zero", "rb") as file:
        return file.read(1)
