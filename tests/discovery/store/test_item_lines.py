"""Lines of the spill file: recordings with and without signals, also as written before there were signals; episodes."""

import pytest

from discovery.data.recordings import RecordedBranch, RecordedQuestion
from discovery.store.item_lines import decode_item, encode_item
from discovery.store.records import EpisodeDetails, ServedEpisode
from discovery.store.rows import episode_from_row, episode_row

PLAIN = RecordedBranch(["1"], 5, "7", [9])
SIGNALLED = PLAIN._replace(confidences=[900, None], lowests=[800, None], probe_confidences=[431])


def test_a_line_keeps_the_signals_of_a_recording() -> None:
    recorded = RecordedQuestion("q", "m", "b", 10, [SIGNALLED])
    assert decode_item(encode_item(recorded)) == recorded


def test_a_line_from_before_signals_is_read() -> None:
    recorded = RecordedQuestion("q", "m", "b", 10, [PLAIN])
    line = encode_item(recorded).replace(b",true,[],[],[]]", b",true]")
    assert b'[["1"],5,"7",[9],true]' in line
    assert decode_item(line) == recorded


def test_a_line_with_an_impossible_signal_is_refused() -> None:
    line = encode_item(RecordedQuestion("q", "m", "b", 10, [SIGNALLED])).replace(b"431", b"4310")
    with pytest.raises(ValueError, match="probe_confidences has 4310; use null or an integer from 0 to 1000"):
        decode_item(line)


def test_limits_of_an_episode_keep_their_flags_as_booleans() -> None:
    limits = {"has_pauses": True, "has_probes": False, "interval": 1, "max_tokens": None}
    about = EpisodeDetails(limits=limits)
    episode = ServedEpisode("e", "r", "m", "c", "d", 0.5, 1, 1, {"branches": 1}, "answered", about=about)
    for kept in (decode_item(encode_item(episode)), episode_from_row(episode_row(episode)[:-1])):
        assert isinstance(kept, ServedEpisode)
        assert repr(kept.about["limits"]) == repr(limits)  # 0 equals False
