"""Configuration of the SpeechCL encoder. A Hub repository carries this file; it imports only transformers."""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import strict

# The small sizes, for little audio, attend to 0.64 s on either side in each layer; on the embedded corpus that lowered
# the error rates, pre-trained or not, and it lets long recordings be transcribed in chunks exactly.
SIZES = {
    "tiny": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "sliding_window": 16,
    },
    "small": {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "sliding_window": 16,
    },
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


@strict
class SpeechCLConfig(PreTrainedConfig):
    """Architecture of a SpeechCL encoder: log-mel → convolutional subsampling → pre-norm rotary Transformer.

    Args:
        sampling_rate: samples per second of the waveform that the model takes.
        num_mel_bins: number of mel filters.
        frame_length, hop_length: analysis window and step of the log-mel, in samples (25 ms and 10 ms at 16 kHz).
        log_mel_floor: smallest mel energy before the logarithm; keeps silence finite.
        log_mel_mean, log_mel_std: constants that the natural-log mel energies are shifted and scaled by. They are
            fixed rather than measured per clip, so that a chunk of a recording gives the frames of the whole.
        subsampling_factor: log-mel frames per encoder frame: 2, 4 or 8 (20, 40 or 80 ms).
        conv_dim: channels of the subsampling convolutions, and of `extract_features`.
        perceptron_dims: widths of a perceptron that each log-mel frame goes through in place of the convolutions, and
            without layer norms; the last is conv_dim, subsampling_factor is 1. For very small encoders, with
            num_hidden_layers 0 for no Transformer at all.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act: the Transformer.
        hidden_dropout, activation_dropout, attention_dropout, feat_proj_dropout, final_dropout: dropout
            probabilities after each sub-layer, inside the feed-forward, on attention weights, after the feature
            projection and before the CTC or classification head.
        layerdrop: probability that a layer is bypassed in training (Fan et al. 2019, arXiv 1909.11556).
        sliding_window: encoder frames that attention reaches to either side; `None` for all. With a window, what a
            frame sees is bounded by `layer_reach` frames on either side: a recording transcribed in chunks whose
            strides are longer gives exactly the text of the whole (but for its last half frame, which transformers'
            pipeline may cut), and its length does not matter.
        conv_depthwise_kernel_size: encoder frames, an odd number, that the convolution module of each layer covers
            (Gulati et al. 2020, arXiv 2005.08100); `None` for layers without one.
        rope_theta: base of the rotary position frequencies (Su et al. 2021, arXiv 2104.09864).
        objectives: `{name: {"weight": float, option: value, …}}`, what `SpeechCLForPreTraining` trains with. The
            other classes keep it as a record of where the weights come from.
        vocab_size, pad_token_id: number of CTC classes and the blank among them.
        ctc_loss_reduction: "sum" or "mean" over the batch; "mean" divides by label length first.
        ctc_zero_infinity: replace infinite CTC losses (label sequence longer than the frames) by zero.
        classifier_proj_size: width of the projection before mean pooling in `SpeechCLForSequenceClassification`.
        use_weighted_layer_sum: the CTC and classification heads see a learned weighted mean of what goes into the
            first layer and comes out of every layer, of the last after the final norm, in place of that alone.
        text_policy: what was done to the texts that a recogniser was fine-tuned on (casing, punctuation, digits,
            language); a record, which fine-tuning goes on with.

    Raises:
        huggingface_hub.errors.StrictDataclassError: a value or a combination that no model can have, with the field
            named.
    """

    model_type = "speechcl"

    sampling_rate: int = 16000
    num_mel_bins: int = 80
    frame_length: int = 400
    hop_length: int = 160
    log_mel_floor: float | int = 1e-6
    log_mel_mean: float | int = -4.3
    log_mel_std: float | int = 4.7
    subsampling_factor: int = 4
    conv_dim: int = 256
    perceptron_dims: list | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    activation_dropout: float | int = 0.0
    attention_dropout: float | int = 0.1
    feat_proj_dropout: float | int = 0.0
    final_dropout: float | int = 0.1
    layerdrop: float | int = 0.0
    sliding_window: int | None = None
    conv_depthwise_kernel_size: int | None = None
    rope_theta: float | int = 10000.0
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    objectives: dict | None = None
    vocab_size: int | None = 32
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    ctc_loss_reduction: str = "sum"
    ctc_zero_infinity: bool = True
    classifier_proj_size: int = 256
    use_weighted_layer_sum: bool = False
    text_policy: dict | None = None

    @classmethod
    def from_size(cls, size: str, **overrides) -> "SpeechCLConfig":
        """Configuration of a named size ("tiny", "small", "base" or "large"), with fields replaced by `overrides`."""
        if size not in SIZES:
            raise ValueError(f"unknown model size {size!r}: expected one of {', '.join(SIZES)}")
        return cls(**{**SIZES[size], **overrides})

    def validate_architecture(self):
        if self.perceptron_dims is None and self.subsampling_factor not in (2, 4, 8):
            raise ValueError(f"subsampling_factor must be 2, 4 or 8, found {self.subsampling_factor}")
        if self.perceptron_dims is not None:
            if self.subsampling_factor != 1:
                raise ValueError(
                    f"subsampling_factor must be 1 with perceptron_dims, which are for single frames, found "
                    f"{self.subsampling_factor}"
                )
            if not self.perceptron_dims or self.perceptron_dims[-1] != self.conv_dim:
                raise ValueError(
                    f"perceptron_dims must end with conv_dim ({self.conv_dim}), found {self.perceptron_dims}"
                )
        positive = "sampling_rate num_mel_bins hop_length conv_dim num_attention_heads intermediate_size"
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        for name in ("log_mel_floor", "log_mel_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be positive or None, found {self.sliding_window}")
        kernel_size = self.conv_depthwise_kernel_size
        if kernel_size is not None and (kernel_size < 1 or kernel_size % 2 == 0):
            raise ValueError(f"conv_depthwise_kernel_size must be odd and positive, or None, found {kernel_size}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown: expected one of {', '.join(ACT2FN)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of twice num_attention_heads "
                f"({self.num_attention_heads}): rotary positions turn pairs of channels of every head"
            )
        if self.use_weighted_layer_sum and self.num_hidden_layers < 1:
            raise ValueError("use_weighted_layer_sum needs layers to weigh: num_hidden_layers is 0")
        if not self.hop_length <= self.frame_length:
            raise ValueError(f"hop_length ({self.hop_length}) must not exceed frame_length ({self.frame_length})")
        if self.ctc_loss_reduction not in ("sum", "mean"):
            raise ValueError(f"ctc_loss_reduction must be 'sum' or 'mean', found {self.ctc_loss_reduction!r}")
        for name in (
            "hidden_dropout",
            "activation_dropout",
            "attention_dropout",
            "feat_proj_dropout",
            "final_dropout",
            "layerdrop",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), found {getattr(self, name)}")

    @property
    def layer_reach(self) -> int | None:
        """Encoder frames to either side that the layers let a frame see; None for all."""
        if self.sliding_window is None:
            return None
        return self.num_hidden_layers * (self.sliding_window + (self.conv_depthwise_kernel_size or 1) // 2)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Waveform samples per encoder frame."""
        return self.hop_length * self.subsampling_factor

    def num_frames(self, num_samples):
        """Encoder frames of a waveform of `num_samples` (tensor or number)."""
        return -(-num_samples // self.inputs_to_logits_ratio)
