"""Recognisers of very small models of several families."""

import soundfile
import torch
from transformers import (
    HubertConfig,
    HubertForCTC,
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerForCTC,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)

from hf_speechcl import SpeechCLConfig, SpeechCLForCTC
from hf_speechcl.ctc import build_processor
from hf_speechcl.recognizer import SpeechRecognizer
from tests.conftest import TINY

RATE = 16000
TEXT = "the quick brown fox jumps over a lazy dog"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "pad_token_id": 0,
}
LAYER_NORM = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
CONVOLUTIONS = {"conv_dim": (8,) * 7}


def tiny_recognizer(name: str) -> SpeechRecognizer:
    torch.manual_seed(0)
    processor = build_processor([TEXT], RATE)
    size = len(processor.tokenizer)
    features = processor.feature_extractor
    if name == "speechcl":
        model = SpeechCLForCTC(SpeechCLConfig(**{**TINY, "vocab_size": size, "pad_token_id": 0, "sliding_window": 4}))
    elif name == "parakeet":
        encoder = {
            name: value for name, value in SMALL.items() if not name.startswith("num_conv") and name != "pad_token_id"
        }
        encoder |= {"subsampling_conv_channels": 4, "num_mel_bins": 16, "conv_kernel_size": 5, "num_key_value_heads": 2}
        model = ParakeetForCTC(ParakeetCTCConfig(vocab_size=size, encoder_config=encoder, pad_token_id=0))
        features = ParakeetFeatureExtractor(feature_size=16)
    else:
        options = {**SMALL, **CONVOLUTIONS, "vocab_size": size}
        if name == "wav2vec2 (group)":
            features = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
        else:
            options |= LAYER_NORM
            features = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
        classes = {
            "hubert": (HubertForCTC, HubertConfig),
            "wavlm": (WavLMForCTC, WavLMConfig),
            "conformer": (Wav2Vec2ConformerForCTC, Wav2Vec2ConformerConfig),
        }
        model_class, config_class = classes.get(name, (Wav2Vec2ForCTC, Wav2Vec2Config))
        model = model_class(config_class(**options))
    return SpeechRecognizer(model, features, processor.tokenizer)


def write(file, samples, rate=RATE):
    soundfile.write(file, samples, rate, subtype="FLOAT")
    return str(file)
