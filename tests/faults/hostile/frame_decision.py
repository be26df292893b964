"""Returns a list of actions with a false length."""


class Liar(list):
    def __len__(self):
        return 1 << 50


class Hostile:
    def __init__(self, beta):
        pass

    def decide(self, state):
        return Liar()
