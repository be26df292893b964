"""Rollout state: moves between stages, of the default and of models, and the JSON of both formats."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from controllers.rollout_state import RolloutStage, RolloutState, StageHolders, lot, name_problem

A, B, C, D = (letter * 64 for letter in "abcd")
SHADOW, CANARY, CHAMPION = RolloutStage.SHADOW, RolloutStage.CANARY, RolloutStage.CHAMPION


def champions(*digests: str, model: str | None = None, state: RolloutState | None = None) -> RolloutState:
    """Return the state after promoting these controllers to champion, one after the other."""
    state = state or RolloutState()
    for digest in digests:
        state = state.promote(digest, CHAMPION, 0, model=model)
    return state


# Moves of the default


def test_a_controller_moves_through_the_stages_and_back() -> None:
    shadow = RolloutState().promote(A, SHADOW, 0)
    assert (shadow.default, shadow.version) == (StageHolders(shadow=A), 1)
    canary = shadow.promote(A, CANARY, 0.25)
    assert canary.default == StageHolders(canary=A, share=0.25)
    champion = canary.promote(A, CHAMPION, 0)
    assert champion.default == StageHolders(champion=A, previous=(None,))
    second = champion.promote(B, CANARY, 0.5).promote(B, CHAMPION, 0).promote(C, CANARY, 1)
    assert second.default == StageHolders(canary=C, share=1, champion=B, previous=(None, A))
    assert second.default.stage_of(C) is CANARY
    back = second.roll_back()
    assert (back.default, back.version) == (StageHolders(champion=A, previous=(None,)), second.version + 1)
    assert back.roll_back().default == StageHolders()


def test_a_stage_holds_one_controller_and_a_controller_one_stage() -> None:
    both = RolloutState().promote(A, SHADOW, 0).promote(B, SHADOW, 0).promote(A, CANARY, 0.1)
    assert both.default == StageHolders(shadow=B, canary=A, share=0.1)
    assert both.promote(B, CANARY, 0.2).default == StageHolders(canary=B, share=0.2)


def test_a_rollback_without_a_champion_drops_only_the_canary() -> None:
    installed = RolloutState().promote(A, SHADOW, 0).promote(B, CANARY, 0.1).roll_back()
    assert installed.default == StageHolders(shadow=A)


def test_a_rollback_skips_quarantined_controllers_and_may_take_one_from_the_shadow_stage() -> None:
    three = champions(A, B, C)
    assert three.quarantine(B).roll_back().default.champion == A
    back = three.promote(B, SHADOW, 0).roll_back()
    assert (back.default.champion, back.default.shadow) == (B, None)


def test_a_quarantined_controller_loses_its_stage_unless_it_is_the_default_champion() -> None:
    installed = champions(B, state=RolloutState().promote(A, CANARY, 0.5))
    assert installed.quarantine(A).default.canary is None
    assert installed.quarantine(B).default.champion == B
    lifted = installed.quarantine(A).promote(A, CANARY, 0.5, forced=True)
    assert (lifted.default.canary, lifted.quarantined) == (A, frozenset())


# Moves of a model


def test_a_model_without_stages_of_its_own_is_served_by_the_default() -> None:
    state = champions(A).promote(B, CANARY, 0.1).promote(C, SHADOW, 0)
    serving = state.of_model("small")
    assert serving.holders == StageHolders(C, B, 0.1, A)
    assert set(serving.owners.values()) == {None}


def test_a_champion_of_a_model_serves_that_model_only() -> None:
    state = champions(B, model="small", state=champions(A))
    assert state.of_model("small").holders.champion == B
    assert state.of_model("small").owners[CHAMPION] == "small"
    assert state.of_model("large").holders.champion == A
    assert state.default.champion == A


def test_the_canary_and_shadow_of_the_default_do_not_serve_a_model_with_a_champion_of_its_own() -> None:
    state = champions(B, model="small", state=champions(A).promote(C, CANARY, 0.1).promote(D, SHADOW, 0))
    assert state.of_model("small").holders == StageHolders(champion=B)
    assert state.of_model("large").holders == StageHolders(D, C, 0.1, A)


def test_a_canary_of_a_model_replaces_the_canary_of_the_default_and_is_compared_with_its_champion() -> None:
    state = champions(A).promote(B, CANARY, 0.1).promote(C, CANARY, 0.5, model="small")
    serving = state.of_model("small")
    assert serving.holders == StageHolders(canary=C, share=0.5, champion=A)
    assert (serving.owners[CANARY], serving.owners[CHAMPION]) == ("small", None)
    assert state.of_model("large").holders.canary == B


def test_a_canary_that_becomes_the_champion_of_the_default_no_longer_serves_as_canary_of_a_model() -> None:
    state = champions(A).promote(B, CANARY, 0.5, model="small").promote(B, CHAMPION, 0)
    assert state.of_model("small").holders == StageHolders(champion=B)


def test_a_rollback_of_a_model_leaves_other_models_and_the_default_unchanged() -> None:
    state = champions(C, model="large", state=champions(B, D, model="small", state=champions(A)))
    back = state.roll_back("small")
    assert (back.own("small").champion, back.own("large"), back.default) == (B, state.own("large"), state.default)
    assert back.version == state.version + 1
    finally_default = back.roll_back("small")
    assert finally_default.of_model("small").holders.champion == A
    assert list(finally_default.models) == ["large"]


def test_a_quarantined_controller_leaves_every_model_and_the_default_serves_instead() -> None:
    state = champions(B, model="small", state=champions(A)).promote(B, CANARY, 0.5, model="large")
    state = state.promote(B, SHADOW, 0, model="third").promote(B, CANARY, 0.1)
    state = champions(C, model="other", state=state)
    after = state.quarantine(B)
    assert B not in after.staged
    assert [after.of_model(model).holders.champion for model in ("small", "large", "third", "other")] == [A, A, A, C]
    assert after.version == state.version + 1
    with pytest.raises(ValueError, match="--force lifts the quarantine"):
        after.promote(B, CHAMPION, 0, model="large")


def test_the_champion_before_a_quarantined_one_can_be_promoted_again() -> None:
    state = champions(B, C, model="small", state=champions(A)).quarantine(C)
    assert state.of_model("small").holders.champion == A
    assert state.promote(B, CHAMPION, 0, model="small").of_model("small").holders.champion == B


def test_the_stages_of_a_controller_are_listed_with_their_models() -> None:
    state = champions(A).promote(A, CHAMPION, 0, model="small").promote(A, CHAMPION, 0, model="large")
    assert list(state.stages_of(A)) == [(None, CHAMPION), ("small", CHAMPION), ("large", CHAMPION)]


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda state: state.promote(A, SHADOW, 0), "aaaaaaaaaaaa is the champion; run"),
        (lambda state: state.promote(B, CANARY, 0.1, model="small"), "is the champion of model small; run"),
        (lambda state: state.promote(A, CANARY, 0.1, model="large"), "already serves model large as the default's"),
        (lambda state: state.promote(C, CANARY, 0.1), "is quarantined because it failed; --force"),
        (lambda state: state.promote(D, CANARY, 1.5), "share is a number from 0 to 1"),
        (lambda state: state.promote(D, CANARY, 0.5, model=" x"), "' x' is not the name of a model"),
        (lambda state: state.promote(D, CANARY, 0.5, model=""), "'' is not the name of a model"),
        (lambda state: state.drop_canary(B), "is not the canary$"),
        (lambda state: state.drop_canary(B, "small"), "is not the canary of model small"),
        (lambda state: state.drop_shadow(A, "small"), "is not the shadow of model small"),
        (lambda state: state.quarantine(C), "quarantined already"),
        (lambda state: state.roll_back("large"), r"model large has neither .* \(models with their own: small\)"),
        (lambda _: RolloutState().roll_back(), "neither a canary nor a champion"),
        (
            lambda _: RolloutState().promote(B, SHADOW, 0).roll_back(),
            "only a shadow; `autotts rollback --shadow` takes",
        ),
        (
            lambda state: state.promote(B, SHADOW, 0, model="smal").roll_back("smal"),
            "model smal has neither .*, only a shadow; `autotts rollback --shadow --model smal` takes",
        ),
    ],
)
def test_an_impossible_move_is_refused_with_the_reason(
    move: Callable[[RolloutState], RolloutState], message: str
) -> None:
    state = champions(
        B, model="small", state=RolloutState(default=StageHolders(champion=A), quarantined=frozenset({C}))
    )
    with pytest.raises(ValueError, match=message):
        move(state)


# JSON


def parsed(state: RolloutState) -> RolloutState:
    return RolloutState.parse(json.loads(json.dumps(state.as_json())))


def test_a_rollout_state_survives_a_round_trip_through_json() -> None:
    state = RolloutState(7, StageHolders(A, B, 0.5, C, (None, A)), quarantined=frozenset({D}))
    assert parsed(state) == state
    with_models = champions(A, B, model="small", state=state).promote(A, CANARY, 0.25, model="Qwen/large")
    assert parsed(with_models) == with_models


def test_a_state_without_stages_of_models_is_written_in_format_1() -> None:
    state = champions(A)
    assert (state.as_json()["format"], "models" in state.as_json()) == (1, False)
    upgraded = champions(B, model="small", state=parsed(state))
    assert upgraded.as_json()["format"] == 2
    assert parsed(upgraded) == upgraded
    assert upgraded.roll_back("small").as_json() == {**state.as_json(), "version": 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 3),
        ("version", -1),
        ("version", True),
        ("shadow", "abc"),
        ("champion", 7),
        ("canary", "x"),
        ("canary", {"digest": None, "share": 0.5}),
        ("canary", {"digest": A, "share": 2}),
        ("canary", {"digest": A, "share": True}),
        ("canary", {"digest": C, "share": 0.1}),
        ("previous", None),
        ("previous", ["../x"]),
        ("quarantined", [None]),
        ("models", None),
        ("models", {"": StageHolders().as_json()}),
        ("models", {"small": None}),
        ("models", {"small": {**StageHolders().as_json(), "champion": "x"}}),
    ],
)
def test_an_invalid_rollout_state_is_refused(field: str, value: object) -> None:
    state = champions(A, model="small", state=champions(C))
    RolloutState.parse(state.as_json())
    with pytest.raises(ValueError, match=r"."):
        RolloutState.parse({**state.as_json(), field: value})


def test_the_lot_of_a_request_is_deterministic_and_uniform() -> None:
    lots = [lot(f"chatcmpl-{number}") for number in range(2000)]
    assert lot("chatcmpl-0") == lots[0]
    assert all(0 <= one < 1 for one in lots)
    assert 0.27 < sum(one < 0.3 for one in lots) / 2000 < 0.33


def test_invalid_controller_names_are_refused_with_the_reason() -> None:
    assert name_problem("mine_2") is None
    assert "built-in" in str(name_problem("cmc"))
    assert "letters" in str(name_problem("../x"))
