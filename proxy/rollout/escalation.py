"""Escalation: before an episode ends with too little agreement, the baseline continues it at a larger β.

The baseline continues from any state, as it does when a controller fails, so the branches and their votes are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from controllers import Action, Environment, Fact, State, Verb
from controllers.builtin import BASELINE, create
from controllers.voting import agreement
from proxy.types import AgreementRule


class AnswerHeldBackError(Exception):
    """The controller answers with too little agreement, and a larger β would spend more."""


class AgreementCheck:
    """Environment that holds back an answer with too little agreement, if a larger β would spend more.

    `execute` then raises AnswerHeldBackError, and the state is as before the answer.
    """

    def __init__(self, environment: Environment, state: State, rule: AgreementRule) -> None:
        self._environment = environment
        self._state = state
        self._rule = rule

    async def execute(self, actions: Sequence[Action]) -> Sequence[Fact]:
        if actions[0].verb is Verb.ANSWER and not self._is_final(actions[0].label):
            raise AnswerHeldBackError
        return await self._environment.execute(actions)

    def _is_final(self, label: int | None) -> bool:
        state, rule = self._state, self._rule
        if rule.escalate_beta is None or rule.is_met(agreement(state.deciding_votes(), label)):
            return True
        more = create(BASELINE, rule.escalate_beta).decide(state)
        return more[0].verb is Verb.ANSWER or not state.affordable(more)
