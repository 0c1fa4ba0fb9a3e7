"""The audit between a reward model and the training that it pays for: what it likes beside quality, and how surely."""

from kilter.evals.audit.cases import Material, material
from kilter.evals.audit.detectors import DETECTORS, OFF_DISTRIBUTION
from kilter.evals.audit.likes import best_of, likes
from kilter.evals.audit.planted import BIASES, Planted
from kilter.evals.audit.run import Audit, Finding, Rewards, audit
from kilter.evals.audit.style import style_matrix
from kilter.evals.audit.words import ENGLISH, Words, read_words

__all__ = [
    "BIASES",
    "DETECTORS",
    "ENGLISH",
    "OFF_DISTRIBUTION",
    "Audit",
    "Finding",
    "Material",
    "Planted",
    "Rewards",
    "Words",
    "audit",
    "best_of",
    "likes",
    "material",
    "read_words",
    "style_matrix",
]
