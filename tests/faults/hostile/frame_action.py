"""Returns an object that only looks like an action."""


class Looks:
    verb = 0
    branch = -1
    intervals = -(1 << 30)
    label = None


class Hostile:
    def __init__(self, beta):
        pass

    def decide(self, state):
        return [Looks()] * 1000
