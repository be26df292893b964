"""Published policies, one per file. Each gets a mapping of β to its parameters, so that any can serve."""

from controllers.baselines.adaptive_consistency import AdaptiveWaves
from controllers.baselines.answer_consistency import AnswerConsistency
from controllers.baselines.asc import AdaptiveConsistency
from controllers.baselines.best_of_infinity import BestOfInfinity
from controllers.baselines.certified import CertifiedConsistency
from controllers.baselines.cisc import ConfidenceInformed
from controllers.baselines.cmc import CMC
from controllers.baselines.confident import ConfidentWaves
from controllers.baselines.esc import EarlyStopping
from controllers.baselines.mars import MarginAdversarial
from controllers.baselines.parallel_probe import ParallelProbe
from controllers.baselines.self_consistency import SelfConsistency
from controllers.baselines.short_m_at_k import ShortestFirst
from controllers.baselines.single import Single

__all__ = [
    "CMC",
    "AdaptiveConsistency",
    "AdaptiveWaves",
    "AnswerConsistency",
    "BestOfInfinity",
    "CertifiedConsistency",
    "ConfidenceInformed",
    "ConfidentWaves",
    "EarlyStopping",
    "MarginAdversarial",
    "ParallelProbe",
    "SelfConsistency",
    "ShortestFirst",
    "Single",
]
