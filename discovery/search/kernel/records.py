"""Layouts of the kernel's records. Compiled code reads and writes their fields as attributes."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from controllers.dial import MOST_CHAINS

Record: TypeAlias = Any
"""One record. numba knows its layout, the type checker does not."""
Records: TypeAlias = NDArray[np.void]

NOBODY: Final = -1
"""Label of a chain without a readable answer, and place of the leader when there are no votes."""
UNSEEN_WINDOW: Final = -1
"""Confidence of the least confident window of a chain while it is unknown."""

# Values of `CHAIN.fate`
RUNS, IS_FINISHED, IS_PRUNED = range(3)

# Components, by part
ALL_AT_ONCE, REFILL, WAVE, GROWING = range(4)
CONFIDENCE, SHARE, LEAD, MARGIN, BAYES, CERTIFIED, GAIN = range(7)
NO_PRUNING, LONG, DEVIANT, UNSTABLE, DOUBTFUL, WEAK = range(6)
PLAIN, LENGTH, LIKELIHOOD, TOKEN_CONFIDENCE, PROBE_CONFIDENCE, LENGTH_AND_CONFIDENCE = range(6)

_PARTS: Final = ("widen", "stop", "prune", "weight", "filter", "pool", "depth", "pace")
_COUNTS: Final = ("first", "most", "enough", "least", "running", "wave", "patience", "flips", "horizon")
_NUMBERS: Final = (
    *("growth", "sure", "share", "lead", "margin", "factor", "error", "worth", "stretch", "trust", "floor"),
    *("power", "scale", "strength", "belief", "kept", "voice"),
)
_FACTS: Final = ("probes_running", "reads_intervals", "repeats_rounds", "is_counted")

POLICY: Final = np.dtype(
    [
        *((part, np.int64) for part in _PARTS),  # codes of components
        *((fact, np.int64) for fact in _FACTS),  # functions of the genome of the same names
        *((name, np.int64) for name in _COUNTS),  # knobs at one β
        *((name, np.float64) for name in _NUMBERS),
        ("log_trust", np.float64),
        ("half", np.float64),  # 0.5; a constant exponent would become a square root, which rounds differently
        ("steepest", np.float64),  # `controllers.voting.STEEPEST`
    ]
)
"""A genome at one β."""

WAVES: Final = np.dtype([("samples", np.int64), ("first", np.int64), ("least", np.int64), ("worth", np.float64)])
"""The numbers of `adaptive_consistency` at one β: most chains, first wave, chains that must agree, and least gain."""

QUESTION: Final = np.dtype(
    [
        ("interval", np.int64),  # tokens between probes, Δ
        ("reference", np.int64),  # number of the reference answer
        ("width", np.int64),  # branches that an episode may open
        ("order", np.int64),  # which of the orders its branches are opened in
        ("branch", np.int64),  # its first branch
    ]
)
"""A recorded question. Its branches follow one another, as do the probes and intervals of a branch."""

BRANCH: Final = np.dtype(
    [
        ("probe", np.int64),  # its first probe
        ("start", np.int64),  # its first interval
        ("probes", np.int64),  # it has one interval more
        ("tokens", np.int64),
        ("final", np.int64),  # answer's number, or NOBODY
    ]
)
PROBE: Final = np.dtype(
    [
        ("answer", np.int32),  # its number, or NOBODY
        ("tokens", np.int32),  # as they are charged
        ("log_confidence", np.float64),  # NaN if unknown
    ]
)
INTERVAL: Final = np.dtype(
    [
        ("log_confidence", np.float64, (2,)),  # of the fact of this interval, and of this and the next one
        ("lowest", np.int64, (2,)),  # likewise
        ("log_probability", np.float64),  # of the branch up to its end, if intervals were run one by one
        ("lowest_so_far", np.int64),  # likewise
    ]
)
"""Signals of an interval; NaN and UNSEEN_WINDOW if they are unknown."""

CHAIN: Final = np.dtype(
    [
        *((name, np.int64) for name in ("probe", "start", "probes", "length", "final")),  # of its recorded branch
        ("left", np.int64),  # whole intervals it can still run; -1 once it has finished
        ("tokens", np.int64),
        ("probe_tokens", np.int64),
        ("label", np.int64),  # its answer's number
        ("probed", np.int64),  # intervals it had run when it was last probed
        ("fate", np.int64),
        ("is_lost", np.int64),  # the policy prunes it in the next round
        ("lowest", np.int64),  # the signals are kept only if intervals are not run one by one
        ("log_probability", np.float64),
        ("probe_confidence", np.float64),  # logarithm; NaN if unknown
        *((name, np.int64) for name in ("strayed", "said", "changes")),  # see the controller files
    ]
)
"""A chain of the episode; chains are numbered in the order in which they were opened."""

_PLACES: Final = MOST_CHAINS + 1  # one more for an answer that nobody gave
EPISODE: Final = np.dtype(
    [
        *((name, np.int64) for name in ("opened", "ended", "rounds", "spent", "critical_path")),
        *((name, np.int64) for name in ("actives", "finishes")),  # lengths of the lists below
        *((name, (np.int64, (MOST_CHAINS,))) for name in ("active", "finished", "running")),  # lists of chains
        ("counted", np.int64),  # finished chains behind the votes
        ("known", np.int64),  # labels with votes
        ("leader", np.int64),  # its place
        ("stamp", np.int64),  # latest stamp of a place
        *((name, np.float64) for name in ("total", "squares", "voters", "anchor")),  # see `WeightedTally`
        *((name, np.float64) for name in ("longest", "level", "limit")),  # beyond which chains are pruned
        ("labels", np.int64, (_PLACES,)),  # in the order in which they were first seen
        ("weights", np.float64, (_PLACES,)),  # as they were added up
        ("votes", np.float64, (_PLACES,)),  # of finished chains, scaled
        ("polled", np.float64, (_PLACES,)),  # with those of running chains
        ("is_int", np.int64, (_PLACES,)),  # Python has an int there, which `sum` adds in another way
        ("values", np.float64, (_PLACES,)),  # for sorting
    ]
)
"""State of an episode."""

PLACE: Final = np.dtype([("stamp", np.int64), ("place", np.int64)])
"""Place of a label in the votes, if the stamp is the latest."""
