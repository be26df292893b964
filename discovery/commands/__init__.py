"""The offline verbs of `autotts`, a file each. They raise; the command line tells what they raise in one line."""
