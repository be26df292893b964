"""The contract of ledgers, in files and in PostgreSQL: their lock, and judgements by several processes at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from discovery.data.hash_chained_log import hash_line
from discovery.errors import GateError
from discovery.promotion.ledger import Ledger
from discovery.store import StorePlace, child_environment
from tests.discovery.promotion.concurrent_programs import run_together
from tests.discovery.promotion.outside import ledger_lines

QUESTIONS = ["a" * 64, "b" * 64]


def judged(ledger: Ledger, digest: str = "d") -> int:
    """Add a judgement at the next level, which is returned."""
    with ledger.locked():
        k = ledger.next_k(QUESTIONS)
        ledger.append(
            split="s",
            questions=[question[:16] for question in QUESTIONS],
            digest=digest,
            champion="c",
            k=k,
            p=0.5,
            verdict="reject",
            created="now",
            who="me",
            report={},
        )
    return k


def test_judgements_are_read_back_in_their_order(ledger_place: StorePlace) -> None:
    ledger = Ledger(ledger_place)
    assert (ledger.judgements(), ledger.next_k(QUESTIONS)) == ([], 1)
    assert [judged(ledger, digest) for digest in "efg"] == [1, 2, 3]
    lines = Ledger(ledger_place).judgements()
    assert [(line.digest, line.k) for line in lines] == [("e", 1), ("f", 2), ("g", 3)]
    assert [line.after for line in lines[1:]] == [hash_line(line) for line in ledger_lines(ledger_place)[:2]]


def test_a_failure_under_the_lock_releases_it(ledger_place: StorePlace) -> None:
    ledger = Ledger(ledger_place)
    with pytest.raises(KeyError), ledger.locked():
        raise KeyError
    assert judged(ledger) == 1


def test_lines_that_do_not_follow_are_refused(ledger_place: StorePlace) -> None:
    ledger = Ledger(ledger_place)
    judged(ledger)
    before = ledger_lines(ledger_place)
    with pytest.raises(GateError, match="line 2 does not follow line 1"):
        ledger.extend(before)
    assert ledger_lines(ledger_place) == before


JUDGING = """
import sys
from discovery.promotion.ledger import Ledger
from discovery.store import parse_place
from tests.discovery.promotion.test_ledger import judged
ledger = Ledger(parse_place(sys.argv[1]))
print(0, flush=True)
sys.stdin.read()
for number in range(10):
    print(judged(ledger, f"{sys.argv[2]}-{number}"))
"""


@pytest.mark.process
def test_judgements_by_several_processes_take_every_level_once(ledger_place: StorePlace) -> None:
    levels = sorted(run_together(JUDGING, ledger_place, 3))
    judgements = Ledger(ledger_place).judgements()
    assert levels == [judgement.k for judgement in judgements] == list(range(1, 31))
    assert len({judgement.digest for judgement in judgements}) == 30


HOLDING = """
import sys
from discovery.promotion.ledger import Ledger
from discovery.store import parse_place
from tests.discovery.promotion.test_ledger import QUESTIONS
ledger = Ledger(parse_place(sys.argv[1]))
with ledger.locked():
    print(ledger.next_k(QUESTIONS), flush=True)
    sys.stdin.read()
"""


@pytest.mark.process
def test_the_lock_of_a_killed_process_is_released(ledger_place: StorePlace) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(ledger_place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(ledger_place),
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "1\n"
        holder.kill()
    assert judged(Ledger(ledger_place)) == 1
