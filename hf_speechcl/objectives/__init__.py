"""Pre-training objectives by name. To add one: a file here, a line in `OBJECTIVES`, a test."""

from .base import Objective, ObjectiveOutput
from .best_rq import BestRQ
from .wav2vec2 import Wav2Vec2Contrastive

OBJECTIVES = {
    "best_rq": BestRQ,
    "wav2vec2": Wav2Vec2Contrastive,
}

__all__ = ["OBJECTIVES", "Objective", "ObjectiveOutput"]
