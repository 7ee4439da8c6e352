"""From any source of audio to training batches."""

from .batching import DurationBatchSampler, LabelBatchSampler
from .collators import ClassificationCollator, CTCCollator, PretrainingCollator
from .corpora import load_corpus
from .dataset import SpeechDataset
from .demo import load_demo

__all__ = [
    "CTCCollator",
    "ClassificationCollator",
    "DurationBatchSampler",
    "LabelBatchSampler",
    "PretrainingCollator",
    "SpeechDataset",
    "load_corpus",
    "load_demo",
]
