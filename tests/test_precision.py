"""Transcription with bfloat16 and 8-bit integers."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)

from hf_speechcl import SpeechCLConfig, SpeechCLForCTC
from hf_speechcl.ctc import build_processor
from hf_speechcl.int8 import Int8Linear, quantize_linear
from hf_speechcl.recognizer import DTYPES, ComputingArguments, SpeechRecognizer, check_dtype
from tests.conftest import TINY
from tests.recognizers import CONVOLUTIONS, LAYER_NORM, RATE, SMALL, TEXT


def int8_linear(inputs, linear):
    """An 8-bit linear layer number by number."""
    outputs = torch.zeros(len(inputs), linear.out_features)
    for row, values in enumerate(inputs):
        step = values.abs().max() / 127
        for column, weights in enumerate(linear.weight):
            size = weights.abs().max() / 127
            product = sum((values / step).round() * (weights / size).round())
            outputs[row, column] = product * step * size + linear.bias[column]
    return outputs


@torch.no_grad()
def test_int8_layer_is_the_rounded_product_and_a_loud_frame_leaves_the_others_alone():
    linear, inputs = nn.Linear(64, 8), torch.randn(2, 3, 64)
    layer = Int8Linear(linear)
    outputs = layer(inputs)
    torch.testing.assert_close(outputs.flatten(0, 1), int8_linear(inputs.flatten(0, 1), linear), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs, linear(inputs), rtol=0, atol=0.03)
    loud = torch.cat([inputs, 1000 * inputs[:1]])
    assert torch.equal(layer(loud)[:2], outputs)
    assert torch.equal(layer(torch.zeros(1, 64)), linear.bias[None])


def test_int8_stands_for_every_linear_layer_but_small_ones():
    model = SpeechCLForCTC(SpeechCLConfig(**{**TINY, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 30}))
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
    quantize_linear(model)
    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    assert len(layers) == 2 * 6
    assert {layer.integers.dtype for layer in layers} == {torch.int8}
    assert sum(layer.integers.numel() for layer in layers) > 0.9 * weights
    assert type(model.lm_head) is nn.Linear


def test_int8_is_refused_where_its_products_overflow(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: (left.int() @ right.int()).clamp(-32768, 32767))
    with pytest.raises(ValueError, match="dtype int8: the products of this processor overflow; use float32"):
        quantize_linear(nn.Linear(64, 64))


@pytest.mark.parametrize("name", ["speechcl", "wav2vec2", "wavlm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_posteriors_of_other_dtypes_are_near_those_of_float32(name, dtype, clips, tmp_path):
    torch.manual_seed(0)
    processor = build_processor([TEXT], RATE)
    options = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": len(processor.tokenizer), "pad_token_id": 0}
    if name == "speechcl":
        model = SpeechCLForCTC(SpeechCLConfig(**{**TINY, **options}))
    else:
        model_class, config = (Wav2Vec2ForCTC, Wav2Vec2Config) if name == "wav2vec2" else (WavLMForCTC, WavLMConfig)
        model = model_class(config(**{**SMALL, **CONVOLUTIONS, **LAYER_NORM, **options}))
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    recognizer = SpeechRecognizer.from_pretrained(tmp_path, dtype=dtype)
    layers = {type(layer) for layer in recognizer.model.modules()}
    assert (recognizer.model.dtype, Int8Linear in layers) == (
        (torch.bfloat16, False) if dtype == "bfloat16" else (torch.float32, True)
    )
    expected = SpeechRecognizer.from_pretrained(tmp_path).log_probs(clips[:3])
    for found, reference in zip(recognizer.log_probs(clips[:3]), expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, reference, atol=0.1)
        assert np.abs(found - reference).max() > 0


def test_unknown_precision_and_int8_on_an_accelerator_are_refused():
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, found 'float16'"):
        ComputingArguments(device="cpu", dtype="float16")
    with pytest.raises(
        ValueError, match="dtype int8 is for the cpu, found device cuda:1: use bfloat16, or the device cpu"
    ):
        check_dtype("int8", torch.device("cuda:1"))
    for dtype in DTYPES:
        assert ComputingArguments(device="cpu", dtype=dtype).torch_device == torch.device("cpu")
