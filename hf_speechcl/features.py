"""Frames of a clip: hidden states of an encoder, or the log-mel that they are held against.

Both take one clip at a time, so that nothing is padded and a clip's frames do not depend on others.
"""

import logging

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel

from .configuration_speechcl import SpeechCLConfig
from .data.folders import source_name
from .hub import find_model, may_be_model
from .modeling_speechcl import SpeechCLLogMel

logger = logging.getLogger(__name__)


class HiddenStates:
    """Hidden states of an encoder of the wav2vec 2.0 family, in the mode that it is in.

    Args:
        encoder: such a model.
        layers: which of its `hidden_states`; 0 is what enters the first layer. None for all.
        normalize: bring every waveform to mean 0 and variance 1, as the encoder's feature extractor does.
        sampling_rate: in Hz.

    Raises:
        ValueError: no such layer.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        layers: list[int] | None = None,
        normalize: bool = False,
        sampling_rate: int = 16000,
    ):
        last = encoder.config.num_hidden_layers
        self.encoder, self.normalize, self.sampling_rate = encoder, normalize, sampling_rate
        self.layers = list(range(last + 1)) if layers is None else layers
        for layer in self.layers:
            if not 0 <= layer <= last:
                raise ValueError(f"layer must be between 0 and {last}, found {layer}")
        self.samples_per_frame = encoder.config.inputs_to_logits_ratio

    @classmethod
    def load(cls, name: str, layers: list[int] | None = None, device: torch.device | str = "cpu") -> "HiddenStates":
        """Of a folder, or Hub name as for `find_model`, for `AutoModel`; in evaluation mode.

        Raises:
            ValueError: no such layer, or no encoder of that family.
            FileNotFoundError: no such checkpoint.
        """
        if not may_be_model(name):
            raise ValueError(f"model {name!r}: expected a folder or a Hub name")
        folder = find_model(name)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not hasattr(config, "inputs_to_logits_ratio"):
            raise ValueError(f"model {name}: {config.model_type} is no encoder of the wav2vec 2.0 family")
        encoder = AutoModel.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32, use_safetensors=True)
        if encoder.main_input_name != "input_values" or config.is_encoder_decoder:
            raise ValueError(f"model {name}: {config.model_type} does not encode waveforms alone")
        try:
            extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
            normalize, sampling_rate = extractor.do_normalize, extractor.sampling_rate
        except OSError:
            normalize, sampling_rate = False, getattr(config, "sampling_rate", 16000)
            logger.info("%s has no preprocessor_config.json: waveforms go in as they are", source_name(name))
        return cls(encoder.eval().to(device), layers, normalize, sampling_rate)

    @torch.no_grad()
    def __call__(self, samples: torch.Tensor) -> np.ndarray:
        """(S,) float32 waveform → (layers, ceil(S / samples_per_frame), H) float32.

        An encoder that does not pad its input gives a frame or two less; the last is repeated.
        """
        if self.normalize:
            samples = (samples - samples.mean()) / torch.sqrt(samples.var(correction=0) + 1e-7)
        outputs = self.encoder(samples[None].to(self.encoder.device), output_hidden_states=True)
        states = outputs.hidden_states or (outputs.last_hidden_state,)  # the latter of an encoder without layers
        frames = torch.cat([states[layer] for layer in self.layers]).float().cpu().numpy()
        missing = -(-len(samples) // self.samples_per_frame) - frames.shape[1]
        return np.pad(frames, ((0, 0), (0, missing), (0, 0)), mode="edge")


class StackedLogMel:
    """Log-mel frames of `SpeechCLLogMel`, as many side by side as an encoder makes one frame of.

    Args:
        config: of log-mel and frame rate.
    """

    def __init__(self, config: SpeechCLConfig):
        self.log_mel, self.sampling_rate = SpeechCLLogMel(config), config.sampling_rate
        self.stacked, self.samples_per_frame = config.subsampling_factor, config.inputs_to_logits_ratio

    @torch.no_grad()
    def __call__(self, samples: torch.Tensor) -> np.ndarray:
        """(S,) float32 waveform → (1, ceil(S / samples_per_frame), stacked * num_mel_bins) float32.

        Where a clip ends within a frame, its last log-mel frame is repeated.
        """
        frames = self.log_mel(samples[None])  # (1, F, M)
        missing = -frames.shape[1] % self.stacked
        frames = nn.functional.pad(frames.transpose(1, 2), (0, missing), mode="replicate").transpose(1, 2)
        return frames.reshape(1, -1, self.stacked * frames.shape[2]).numpy()
