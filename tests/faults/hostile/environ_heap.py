"""Searches all objects of its process for those that hold the question or the settings."""

import gc


def attack(state):
    kinds = {type(thing).__name__ for thing in gc.get_objects()}
    return kinds & {"ScriptedEnvironment", "ReplayEnvironment", "Recording", "Settings", "Labels"}
