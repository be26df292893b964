"""Points and tokens that early stopping costs on ten strong models, whose short chains are not right more often.

Skipped where the public recordings are not beside the project.
"""

from __future__ import annotations

import pytest

from controllers.builtin import DEFAULT
from tests.bench.default import AIMS, FILES, SHUFFLES, compare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.no_cover,
    pytest.mark.xdist_group("finished chains"),  # both tests replay the same files
    pytest.mark.skipif(not FILES, reason="the public recordings are not beside the project (../shared/replay)"),
]


def test_the_default_loses_at_most_a_tenth_of_a_point_at_30_percent_of_the_tokens() -> None:
    compared = compare(DEFAULT, FILES, SHUFFLES)
    assert len(compared.points) == 10
    least, least_of_a_model = AIMS.points.values()
    assert compared.accuracy >= least
    assert min(compared.points.values()) >= least_of_a_model
    assert compared.tokens <= AIMS.tokens
    assert compared.critical_path <= AIMS.critical_path


def test_short_m_at_k_loses_over_three_points_on_some_model() -> None:
    files = [path for path in FILES if "gpt-oss-20b" in path.name]
    assert compare("short_m_at_k", files, SHUFFLES).accuracy < -3
