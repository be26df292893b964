"""Restores the import machinery and imports a module."""

import importlib.machinery
import sys


def attack(state):
    library = statistics_folder()
    sys.path.append(library)
    sys.path_hooks.append(importlib.machinery.FileFinder.path_hook((importlib.machinery.SourceFileLoader, [".py"])))
    sys.meta_path.append(importlib.machinery.PathFinder)
    import colorsys

    return colorsys


def statistics_folder():
    import statistics

    return statistics.__file__.rpartition("/")[0]
