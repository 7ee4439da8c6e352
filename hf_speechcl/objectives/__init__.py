"""Pre-training objectives by name. To add one: a file here, a line in `OBJECTIVES`, a test."""

from .base import Objective, ObjectiveOutput
from .best_rq import BestRQ
from .cpc import CPC
from .data2vec import Data2Vec
from .denoising import Denoising
from .hubert import HuBERT
from .info_nce import InfoNCE
from .masked_reconstruction import MaskedReconstruction
from .prototypical import Prototypical
from .siamese import Siamese
from .triplet import Triplet
from .utterance import UtteranceObjective
from .wav2vec2 import Wav2Vec2Contrastive

OBJECTIVES = {
    "info_nce": InfoNCE,
    "siamese": Siamese,
    "triplet": Triplet,
    "prototypical": Prototypical,
    "cpc": CPC,
    "wav2vec2": Wav2Vec2Contrastive,
    "best_rq": BestRQ,
    "hubert": HuBERT,
    "data2vec": Data2Vec,
    "denoising": Denoising,
    "masked_reconstruction": MaskedReconstruction,
}

__all__ = ["OBJECTIVES", "Objective", "ObjectiveOutput", "UtteranceObjective"]
