"""Never comes back from a regular expression."""

import re


def attack(state):
    return re.match(r"(a+)+$", "a" * 64 + "b")
