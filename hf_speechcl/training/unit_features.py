"""What units are clusters of: MFCCs, or a layer of a trained encoder.

Both take one clip at a time, so that nothing is padded and a clip's units do not depend on others.
"""

import numpy as np
import scipy.fft
import scipy.ndimage
import torch

from ..configuration_speechcl import SpeechCLConfig
from ..features import HiddenStates
from ..hub import may_be_model, weights_digest
from ..modeling_speechcl import SpeechCLLogMel

NUM_MEL_BINS, NUM_CEPSTRA, LIFTER = 23, 13, 22  # Kaldi's
SLOPE = np.arange(-2, 3) / 10  # least-squares line through five frames


class MFCC:
    """39 features a unit: 13 mel-frequency cepstra, their slopes and the slopes' slopes, each 10 ms, then averaged.

    Cepstra are liftered as Kaldi's are and, as in HuBERT's own code, not normalised over the clip. That code takes the
    first of the 10 ms frames in an encoder frame; here they are averaged, so that no audio goes unseen.

    Args:
        sampling_rate: in Hz.
        samples_per_unit: samples of an encoder frame, a multiple of 10 ms.

    Source: Hsu et al. 2021, arXiv 2106.07447, section 4.2, and `simple_kmeans/dump_mfcc_feature.py` in fairseq.
    """

    def __init__(self, sampling_rate: int = 16000, samples_per_unit: int = 640):
        hop = sampling_rate // 100
        if samples_per_unit < 1 or hop < 1 or samples_per_unit % hop:
            raise ValueError(
                f"samples_per_unit must be a multiple of 10 ms, {hop} samples at {sampling_rate} Hz, "
                f"found {samples_per_unit}"
            )
        self.sampling_rate, self.samples_per_unit = sampling_rate, samples_per_unit
        self.source = {"features": "mfcc"}
        self.frames_per_unit = samples_per_unit // hop
        self.log_mel = SpeechCLLogMel(
            SpeechCLConfig(
                sampling_rate=sampling_rate,
                hop_length=hop,
                frame_length=5 * hop // 2,
                num_mel_bins=NUM_MEL_BINS,
                log_mel_mean=0.0,
                log_mel_std=1.0,
            )
        )
        self.lifter = 1 + LIFTER / 2 * np.sin(np.pi * np.arange(NUM_CEPSTRA) / LIFTER)

    def __call__(self, samples: torch.Tensor) -> np.ndarray:
        """(S,) float32 waveform → (ceil(S / samples_per_unit), 39) float32."""
        log_mel = self.log_mel(samples[None])[0].numpy()
        cepstra = scipy.fft.dct(log_mel, norm="ortho")[:, :NUM_CEPSTRA] * self.lifter
        slopes = scipy.ndimage.correlate1d(cepstra, SLOPE, axis=0, mode="nearest")
        curvatures = scipy.ndimage.correlate1d(slopes, SLOPE, axis=0, mode="nearest")
        frames = np.concatenate([cepstra, slopes, curvatures], axis=1)
        starts = np.arange(0, len(frames), self.frames_per_unit)
        counts = np.diff(starts, append=len(frames))
        return (np.add.reduceat(frames, starts) / counts[:, None]).astype(np.float32)


class EncoderLayer:
    """Hidden states of one layer of an encoder of the wav2vec 2.0 family, in evaluation mode.

    Args:
        name: folder, Hub name or `starter`, as for `find_model`, for `AutoModel`.
        layer: which of its `hidden_states`; 0 is what enters the first layer.
        device: to run it on.

    Raises:
        ValueError: no such layer, or no encoder of that family.
        FileNotFoundError: no such checkpoint.

    Source: Hsu et al. 2021, arXiv 2106.07447, section 3.2, for iterations after the first.
    """

    def __init__(self, name: str, layer: int, device: torch.device | str = "cpu"):
        if not may_be_model(name):
            raise ValueError(f"features {name!r}: expected mfcc, starter, a folder or a Hub name")
        self.hidden_states = HiddenStates.load(name, [layer], device)
        self.sampling_rate = self.hidden_states.sampling_rate
        self.samples_per_unit = self.hidden_states.samples_per_frame
        self.source = {"features": name, "layer": layer, "weights": weights_digest(self.hidden_states.encoder)}

    def __call__(self, samples: torch.Tensor) -> np.ndarray:
        """(S,) float32 waveform → (ceil(S / samples_per_unit), H) float32."""
        return self.hidden_states(samples)[0]
