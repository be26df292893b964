"""Grows a list for as long as it can, up to 300 MB."""


def attack(state):
    kept = []
    while len(kept) < 300:
        kept.append(bytes(1 << 20))
    return len(kept)
