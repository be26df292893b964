"""What can go wrong on the offline side.

DiscoveryError
├── BadRecording    a file that is not what it should be; the message names the record and the reason
└── Censored        a replay asked for more of a branch than was recorded
"""


class DiscoveryError(Exception):
    """Base of every error raised in this package."""


class BadRecording(DiscoveryError):
    """A recording is malformed. Nothing of its file is taken."""


class Censored(DiscoveryError):
    """A branch was recorded only so far, and the replay went past it."""
