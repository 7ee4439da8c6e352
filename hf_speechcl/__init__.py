"""Self-supervised speech pre-training in the Hugging Face ecosystem."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoModelForPreTraining,
)

from .configuration_speechcl import SpeechCLConfig
from .data import DurationBatchSampler, SpeechDataset, load_corpus, load_demo
from .modeling_speechcl import SpeechCLForCTC, SpeechCLForSequenceClassification, SpeechCLModel
from .objectives import OBJECTIVES, Objective, ObjectiveOutput
from .pretraining import SpeechCLForPreTraining

__version__ = "0.1.0"

AutoConfig.register("speechcl", SpeechCLConfig, exist_ok=True)
AutoModel.register(SpeechCLConfig, SpeechCLModel, exist_ok=True)
AutoModelForPreTraining.register(SpeechCLConfig, SpeechCLForPreTraining, exist_ok=True)
AutoModelForCTC.register(SpeechCLConfig, SpeechCLForCTC, exist_ok=True)
AutoModelForAudioClassification.register(SpeechCLConfig, SpeechCLForSequenceClassification, exist_ok=True)

__all__ = [
    "OBJECTIVES",
    "DurationBatchSampler",
    "Objective",
    "ObjectiveOutput",
    "SpeechCLConfig",
    "SpeechCLForCTC",
    "SpeechCLForPreTraining",
    "SpeechCLForSequenceClassification",
    "SpeechCLModel",
    "SpeechDataset",
    "load_corpus",
    "load_demo",
]
