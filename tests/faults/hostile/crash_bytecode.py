"""Runs bytecode that was never compiled."""


def attack(state):
    broken = attack.__code__.replace(co_code=bytes([100, 255] * 50), co_consts=(), co_stacksize=1)
    return type(attack)(broken, {})(state)
