"""SpeechCL encoder and its CTC and classification heads.

A Hub repository carries this file and the configuration beside it; both import only torch and transformers.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.audio_utils import mel_filter_bank
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput, Wav2Vec2BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_speechcl import SpeechCLConfig

PUSH_OPTIONS = "repo_id commit_message commit_description private token revision create_pr tags".split()
REMOTE_CODE = {
    "AutoConfig": "configuration_speechcl.SpeechCLConfig",
    "AutoModel": "modeling_speechcl.SpeechCLModel",
    "AutoModelForCTC": "modeling_speechcl.SpeechCLForCTC",
    "AutoModelForAudioClassification": "modeling_speechcl.SpeechCLForSequenceClassification",
}


@dataclass
class SpeechCLModelOutput(Wav2Vec2BaseModelOutput):
    """As that of wav2vec 2.0; `log_mel` (B, F, num_mel_bins) are the frames before any mask or noise."""

    log_mel: torch.Tensor | None = None


def length_mask(lengths: torch.Tensor, max_length: int) -> torch.Tensor:
    """Boolean mask (B, max_length), true on the first `lengths[b]` positions of row b."""
    return torch.arange(max_length, device=lengths.device) < lengths[:, None]


class SpeechCLLogMel(nn.Module):
    """Normalised log-mel energies of a waveform, in float32 whatever the weights are in.

    Frame t is centred on the t-th hop and is taken with zeros beyond both ends, so S samples give ceil(S / hop_length)
    frames, and a recording cut at a multiple of the hop gives the frames of the whole but for those at the cut.
    """

    def __init__(self, config: SpeechCLConfig):
        super().__init__()
        self.config = config
        self.n_fft = 2 ** math.ceil(math.log2(config.frame_length))
        # No buffers: these would be cast with the weights, and are not saved. The device is named, as models are also
        # made without memory.
        self.window = torch.hann_window(config.frame_length, periodic=False, dtype=torch.float32, device="cpu")
        filters = mel_filter_bank(
            num_frequency_bins=self.n_fft // 2 + 1,
            num_mel_filters=config.num_mel_bins,
            min_frequency=20.0,
            max_frequency=config.sampling_rate / 2,
            sampling_rate=config.sampling_rate,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )
        self.filters = torch.from_numpy(filters).float()  # (n_fft / 2 + 1, num_mel_bins)

    @torch.no_grad()
    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        """(B, S) waveform in [-1, 1] → (B, ceil(S / hop_length), num_mel_bins)."""
        hop, length = self.config.hop_length, self.config.frame_length
        if self.window.device != input_values.device:
            self.window, self.filters = self.window.to(input_values.device), self.filters.to(input_values.device)
        with torch.autocast(input_values.device.type, enabled=False):
            left = (length - hop) // 2
            right = length - hop - left + -input_values.shape[-1] % hop
            frames = nn.functional.pad(input_values.float(), (left, right)).unfold(-1, length, hop)
            frames = (frames - frames.mean(-1, keepdim=True)).mul_(self.window)
            spectrum = torch.fft.rfft(frames, n=self.n_fft)
            energies = (spectrum.real.square() + spectrum.imag.square()) @ self.filters
            energies = energies.clamp_min_(self.config.log_mel_floor).log_()
            return energies.sub_(self.config.log_mel_mean).div_(self.config.log_mel_std)


class SpeechCLSubsampling(nn.Module):
    """Convolutions of stride 2 over time, each halving the frame rate; padding stays zero throughout."""

    def __init__(self, config: SpeechCLConfig):
        super().__init__()
        num_layers = int(math.log2(config.subsampling_factor))
        widths = [config.num_mel_bins] + [config.conv_dim] * num_layers
        self.layers = nn.ModuleList(
            nn.Conv1d(i, o, kernel_size=3, stride=2, padding=1) for i, o in zip(widths, widths[1:])
        )
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, log_mel: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """(B, F, num_mel_bins), valid frames (B,) → (B, ceil(F / subsampling_factor), conv_dim)."""
        hidden_states = log_mel.transpose(1, 2)  # (B, F, M) -> (B, M, F)
        for layer in self.layers:
            if lengths is not None:
                hidden_states = hidden_states * length_mask(lengths, hidden_states.shape[-1])[:, None]
                lengths = (lengths + 1) // 2
            hidden_states = self.activation(layer(hidden_states.to(layer.weight.dtype)))
        return hidden_states.transpose(1, 2)


class SpeechCLFramePerceptron(nn.Module):
    """Linear layers with activations, on each log-mel frame alone."""

    def __init__(self, config: SpeechCLConfig):
        super().__init__()
        widths = [config.num_mel_bins, *config.perceptron_dims]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, widths[1:]))
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, log_mel: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """(B, F, num_mel_bins) → (B, F, conv_dim)."""
        hidden_states = log_mel
        for layer in self.layers:
            hidden_states = self.activation(layer(hidden_states.to(layer.weight.dtype)))
        return hidden_states


def rotary_embeddings(config: SpeechCLConfig, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions for (B, T, H) states, each (T, head_dim), computed in float32.

    Source: Su et al. 2021, arXiv 2104.09864, eq. 34.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    channels = torch.arange(0, head_dim, 2, device=hidden_states.device, dtype=torch.float32)
    positions = torch.arange(hidden_states.shape[1], device=hidden_states.device, dtype=torch.float32)
    angles = torch.outer(positions, config.rope_theta ** (-channels / head_dim)).repeat(1, 2)
    return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the channel pairs (d, d + D/2) of (B, N, T, D) by the angles of their positions."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def dropout(states: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Dropout; on CPUs from 16 random bits an element, since there drawing takes longer than most layers."""
    if not training or p == 0 or states.device.type != "cpu" or torch.compiler.is_compiling():
        return nn.functional.dropout(states, p, training)
    bits = torch.empty(-(-states.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = bits[: states.numel()].view(states.shape) >= round(p * 2**16) - 2**15
    return states * keep.to(states.dtype).mul_(1 / (1 - p))


class SpeechCLDropout(nn.Dropout):
    """`dropout` as a module."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return dropout(states, self.p, self.training)


def attend(query, key, value, attention_mask, scaling, p, training) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain matrix products, softmax in float32: (..., Q, D), (..., K, D) twice → (..., Q, D), weights.

    Args:
        attention_mask: broadcast to (..., Q, K), added to the scores; or bool, true where attention may go.
    """
    weights = torch.matmul(query * scaling, key.transpose(-2, -1))
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = as_bias(attention_mask, weights.dtype)
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = dropout(weights, p, training)
    return torch.matmul(weights, value), weights


def as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a mask is true, elsewhere a number so low that it leaves nothing, to which a score can still be added."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min / 2)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """`attend` as transformers calls it: (B, N, T, D) each → output (B, T, N, D), weights (B, N, T, T)."""
    output, weights = attend(query, key, value, attention_mask, scaling, dropout, module.training)
    return output.transpose(1, 2).contiguous(), weights


def into_blocks(states: torch.Tensor, window: int) -> torch.Tensor:
    """(..., T, D) → (..., ceil(T / window), window, D), zeros at the end."""
    return nn.functional.pad(states, (0, 0, 0, -states.shape[-2] % window)).unflatten(-2, (-1, window))


def with_neighbours(blocks: torch.Tensor) -> torch.Tensor:
    """Each block between the one before and the one after it: (..., blocks, W, D) → (..., blocks, 3 * W, D)."""
    padded = nn.functional.pad(blocks, (0, 0, 0, 0, 1, 1))
    return torch.cat((padded[..., :-2, :, :], blocks, padded[..., 2:, :, :]), dim=-2)


def local_attention_mask(
    num_frames: int, window: int, attention_mask: torch.Tensor | None, causal: bool, states: torch.Tensor
) -> torch.Tensor:
    """What `local_attention_forward` adds to its scores: (B or 1, 1, blocks, window, 3 * window).

    Args:
        attention_mask: (B, num_frames) bool, false on padding; None if nothing is padded.
        causal: reach back less than `window` frames and not ahead.
        states: of the dtype and device of the result.
    """
    times = torch.arange(3 * window, device=states.device)
    back = times[window : 2 * window, None] - times
    near = (back >= 0) & (back < window) if causal else back.abs() <= window
    if attention_mask is None:
        attention_mask = torch.ones(1, num_frames, dtype=torch.bool, device=states.device)
    own = with_neighbours(into_blocks(attention_mask[..., None], window)).transpose(-2, -1)  # (B, blocks, 1, 3 * W)
    return as_bias((near & own)[:, None], states.dtype)


def local_attention_forward(module, query, key, value, attention_mask, scaling, dropout, sliding_window):
    """Attention to a window, block by block, so that what lies outside costs nothing: (B, N, T, D) → (B, T, N, D).

    Args:
        attention_mask: of `local_attention_mask`.
    """
    num_frames = query.shape[2]
    query, key, value = (into_blocks(states, sliding_window) for states in (query, key, value))
    output, _ = attend(
        query, with_neighbours(key), with_neighbours(value), attention_mask, scaling, dropout, module.training
    )
    return output.flatten(2, 3)[:, :, :num_frames].transpose(1, 2)  # (B, N, blocks, W, D) -> (B, T, N, D)


class SpeechCLAttention(nn.Module):
    """Multi-head self-attention over all frames or those in a window, with rotary positions."""

    def __init__(self, config: SpeechCLConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, attention_mask, position_embeddings, is_causal=False, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)  # (B, T, H) -> (B, T, N, D) -> (B, N, T, D)
        query = rotate(self.q_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
        key = rotate(self.k_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        options = {"dropout": self.config.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        window, implementation = self.config.sliding_window, self.config._attn_implementation
        if window and implementation == "sdpa":
            output = local_attention_forward(self, query, key, value, attention_mask, sliding_window=window, **options)
            return self.o_proj(output.reshape(hidden_states.shape)), None
        if implementation == "sdpa" and options["dropout"] and query.device.type == "cpu":
            implementation = "eager"  # what sdpa does there, but for the slower dropout
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = function(
            self,
            query,
            key,
            value,
            attention_mask,
            sliding_window=window and window + (not is_causal),
            is_causal=is_causal,
            **options,
            **kwargs,
        )
        return self.o_proj(output.reshape(hidden_states.shape)), weights


class SpeechCLFeedForward(nn.Module):
    def __init__(self, config: SpeechCLConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = SpeechCLDropout(config.activation_dropout)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.down_proj(self.dropout(self.activation(self.up_proj(hidden_states))))


class SpeechCLConvolution(nn.Module):
    """Convolution module: pointwise with a gated linear unit, depthwise over time, norm, activation, pointwise.

    Source: Gulati et al. 2020, arXiv 2005.08100, section 2.2. Differs from it in a layer norm for the batch norm, so
    that a clip does not depend on others.
    """

    def __init__(self, config: SpeechCLConfig):
        super().__init__()
        self.reach = config.conv_depthwise_kernel_size // 2
        self.gate_proj = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.depthwise = nn.Conv1d(
            config.hidden_size, config.hidden_size, config.conv_depthwise_kernel_size, groups=config.hidden_size
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = nn.SiLU()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, frame_mask, causal):
        """(B, T, H), (B, T) bool, false on padding, or None → (B, T, H)."""
        hidden_states = nn.functional.glu(self.gate_proj(hidden_states), dim=-1)
        if frame_mask is not None:
            hidden_states = hidden_states * frame_mask[..., None]
        around = (2 * self.reach, 0) if causal else (self.reach, self.reach)
        hidden_states = nn.functional.pad(hidden_states.transpose(1, 2), around)  # (B, T, H) -> (B, H, T + K - 1)
        hidden_states = self.depthwise(hidden_states).transpose(1, 2)
        return self.out_proj(self.activation(self.norm(hidden_states)))


class SpeechCLEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm Transformer layer: x + attention(norm(x)), then x + feed-forward(norm(x)); between them, with
    `conv_depthwise_kernel_size`, x + convolution(norm(x))."""

    def __init__(self, config: SpeechCLConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SpeechCLAttention(config)
        self.convolution = None
        if config.conv_depthwise_kernel_size is not None:
            self.convolution_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.convolution = SpeechCLConvolution(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = SpeechCLFeedForward(config)
        self.dropout = SpeechCLDropout(config.hidden_dropout)
        self.layerdrop = config.layerdrop

    def forward(self, hidden_states, attention_mask, position_embeddings, frame_mask, is_causal=False, **kwargs):
        begin = hidden_states
        attended, _ = self.attention(
            self.attention_norm(hidden_states), attention_mask, position_embeddings, is_causal=is_causal, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        if self.convolution is not None:
            local = self.convolution(self.convolution_norm(hidden_states), frame_mask, is_causal)
            hidden_states = hidden_states + self.dropout(local)
        hidden_states = hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))
        if self.training and self.layerdrop > 0:
            # Bypassed rather than left out: every rank and every compiled graph sees the same parameters.
            drop = torch.rand((), device=hidden_states.device) < self.layerdrop
            hidden_states = torch.where(drop, begin, hidden_states)
        return hidden_states


def is_distributed() -> bool:
    """Whether several processes train; not all builds of torch can."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def needs_input_gradient(layer: GradientCheckpointingLayer) -> bool:
    """Whether nothing of a layer would be trained without a gradient of its input, as with reentrant checkpoints."""
    return (
        layer.gradient_checkpointing
        and layer._gradient_checkpointing_func.keywords.get("use_reentrant", True)
        and any(weight.requires_grad for weight in layer.parameters())
    )


class SpeechCLPreTrainedModel(PreTrainedModel):
    config: SpeechCLConfig
    base_model_prefix = "speechcl"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # losses are of a batch: transformers' Trainer divides them by its accumulated steps
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["SpeechCLEncoderLayer"]
    _can_record_outputs = {"hidden_states": SpeechCLEncoderLayer, "attentions": SpeechCLAttention}
    # Pre-training folders also hold the objectives' weights, which the other classes have no use for.
    _keys_to_ignore_on_load_unexpected = [r"^objectives\."]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight)
        elif isinstance(module, SpeechCLModel):
            init.uniform_(module.masked_spec_embed)
        elif isinstance(module, SpeechCLHeadModel) and self.config.use_weighted_layer_sum:
            init.zeros_(module.layer_weights)

    def _get_feat_extract_output_lengths(self, input_lengths: torch.Tensor | int) -> torch.Tensor | int:
        """Encoder frames of a waveform of `input_lengths` samples (tensor or number)."""
        return self.config.num_frames(input_lengths)

    def save_pretrained(self, save_directory, *, push_to_hub: bool = False, **kwargs):
        """As `PreTrainedModel.save_pretrained`; adds the two modelling files, so that the folder loads by
        `trust_remote_code=True` where hf_speechcl is not installed."""
        of_push = {name: kwargs.pop(name) for name in PUSH_OPTIONS if push_to_hub and name in kwargs}
        self.config.auto_map = dict(REMOTE_CODE)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name in ("configuration_speechcl.py", "modeling_speechcl.py"):
            source, target = Path(__file__).with_name(name), Path(save_directory, name)
            if source.resolve() != target.resolve():
                shutil.copyfile(source, target)
        super().save_pretrained(save_directory, **kwargs)
        # Asked to push, super() would send what it has written itself, without the modelling files.
        if push_to_hub and kwargs.get("is_main_process", True):
            self.push_to_hub(of_push.pop("repo_id", Path(save_directory).name), **of_push)


class SpeechCLModel(SpeechCLPreTrainedModel):
    """The encoder: waveform → log-mel → subsampling → masked spans → Transformer."""

    def __init__(self, config: SpeechCLConfig):
        super().__init__(config)
        self.log_mel = SpeechCLLogMel(config)
        if config.perceptron_dims is None:
            self.subsampling = SpeechCLSubsampling(config)
            self.feature_norm = nn.LayerNorm(config.conv_dim, eps=config.layer_norm_eps)
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.subsampling = SpeechCLFramePerceptron(config)
            self.feature_norm = self.norm = nn.Identity()
        self.feature_projection = nn.Linear(config.conv_dim, config.hidden_size)
        self.feature_dropout = SpeechCLDropout(config.feat_proj_dropout)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size))
        self.layers = nn.ModuleList(SpeechCLEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    @property
    def causal_reach(self) -> int:
        """Samples from the start of frame t to the end of what its log-mel and convolution windows cover."""
        config = self.config
        left = (config.frame_length - config.hop_length) // 2
        return (config.subsampling_factor - 1) * config.hop_length + config.frame_length - left

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask_time_indices: torch.Tensor | None = None,
        mask_feature_indices: torch.Tensor | None = None,
        log_mel_noise: torch.Tensor | None = None,
        causal: bool = False,
        **kwargs,
    ) -> SpeechCLModelOutput:
        """Encode waveforms.

        Args:
            input_values: (B, S) float, mono, in [-1, 1], at `config.sampling_rate`.
            attention_mask: (B, S), 1 on samples and 0 on padding at the end; `None` if nothing is padded.
            mask_time_indices: (B, T) bool, encoder frames to replace by the learned mask vector.
            mask_feature_indices: (B, num_mel_bins) bool, mel bins to replace by their mean.
            log_mel_noise: (B, F, num_mel_bins) float, added to the normalised log-mel frames.
            causal: attention reaches to earlier frames only: frame t sees nothing beyond the waveform that its own
                log-mel and convolution windows cover, `causal_reach` samples from its start.

        Returns:
            `last_hidden_state` (B, T, hidden_size) and `extract_features` (B, T, conv_dim), the latter taken before
            masking, with T = ceil(S / inputs_to_logits_ratio); `log_mel` (B, F, num_mel_bins); `hidden_states` when
            asked for, the last after the final norm, and `attentions` too, where attention is eager.
        """
        if input_values.ndim != 2 or input_values.shape[1] == 0:
            raise ValueError(
                f"input_values must be (batch, samples) with samples > 0, found {tuple(input_values.shape)}"
            )
        if not input_values.is_floating_point():
            raise ValueError(
                f"input_values must be floating point in [-1, 1], found {input_values.dtype}: divide 16-bit samples by "
                "32768"
            )
        frame_lengths = None
        if attention_mask is not None:
            sample_lengths = attention_mask.to(torch.bool).sum(-1)
            frame_lengths = self._get_feat_extract_output_lengths(sample_lengths)
            attention_mask = length_mask(frame_lengths, self._get_feat_extract_output_lengths(input_values.shape[1]))
            input_values = input_values * length_mask(sample_lengths, input_values.shape[1])

        log_mel = features = self.log_mel(input_values)
        if mask_feature_indices is not None:
            features = features.masked_fill(mask_feature_indices[:, None].to(torch.bool), 0.0)
        if log_mel_noise is not None:
            features = features + log_mel_noise
        mel_lengths = None if frame_lengths is None else -(-sample_lengths // self.config.hop_length)
        extract_features = self.feature_norm(self.subsampling(features, mel_lengths))
        hidden_states = self.feature_dropout(self.feature_projection(extract_features))
        if mask_time_indices is not None:
            mask = mask_time_indices.to(torch.bool)[..., None]
            hidden_states = torch.where(mask, self.masked_spec_embed.to(hidden_states.dtype), hidden_states)
        elif self.training and self.masked_spec_embed.requires_grad and is_distributed():
            # Every weight takes part, as DistributedDataParallel waits for the gradients of all.
            hidden_states = hidden_states + 0.0 * self.masked_spec_embed.to(hidden_states.dtype)

        position_embeddings = rotary_embeddings(self.config, hidden_states)
        layer_mask = self._layer_mask(hidden_states, attention_mask, causal)
        for layer in self.layers:
            if self.training and not hidden_states.requires_grad and needs_input_gradient(layer):
                hidden_states.requires_grad_(torch.is_grad_enabled())
            hidden_states = layer(
                hidden_states, layer_mask, position_embeddings, frame_mask=attention_mask, is_causal=causal, **kwargs
            )
        return SpeechCLModelOutput(
            last_hidden_state=self.norm(hidden_states), extract_features=extract_features, log_mel=log_mel
        )

    def _layer_mask(self, hidden_states, attention_mask, causal):
        """The mask that the layers' attention takes, of (B, T) bool, false on padding, or None."""
        window = self.config.sliding_window
        if window and self.config._attn_implementation == "sdpa":
            return local_attention_mask(hidden_states.shape[1], window, attention_mask, causal, hidden_states)
        options = {"config": self.config, "inputs_embeds": hidden_states, "attention_mask": attention_mask}
        if causal:
            create_mask = create_sliding_window_causal_mask if window else create_causal_mask
            return create_mask(**options, past_key_values=None, allow_is_causal_skip=False)
        return (create_bidirectional_sliding_window_mask if window else create_bidirectional_mask)(**options)


class SpeechCLHeadModel(SpeechCLPreTrainedModel):
    """Encoder of which a head sees the last layer or, with `config.use_weighted_layer_sum`, all of them.

    Source of the weighted sum: Yang et al. 2021, arXiv 2105.01051, section 3.
    """

    def __init__(self, config: SpeechCLConfig):
        super().__init__(config)
        self.speechcl = SpeechCLModel(config)
        if config.use_weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))

    def encode(self, input_values, attention_mask, **kwargs) -> tuple[torch.Tensor, SpeechCLModelOutput]:
        """What the head sees, (B, T, hidden_size), and all that the encoder gives."""
        if not self.config.use_weighted_layer_sum:
            outputs = self.speechcl(input_values, attention_mask, **kwargs)
            return outputs.last_hidden_state, outputs
        outputs = self.speechcl(input_values, attention_mask, **{**kwargs, "output_hidden_states": True})
        weights = self.layer_weights.float().softmax(0)
        hidden_states = sum(weight * states for weight, states in zip(weights, outputs.hidden_states))
        if not kwargs.get("output_hidden_states", self.config.output_hidden_states):
            outputs.hidden_states = None
        return hidden_states.to(outputs.last_hidden_state.dtype), outputs


class SpeechCLForCTC(SpeechCLHeadModel):
    """Encoder with a linear CTC head (Graves et al. 2006)."""

    def __init__(self, config: SpeechCLConfig):
        super().__init__(config)
        self.dropout = SpeechCLDropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutput:
        """Frame-wise token scores and, with labels, the CTC loss.

        Args:
            input_values, attention_mask: as in `SpeechCLModel`; so are the masks among `kwargs`.
            labels: (B, L) token ids, padded with -100.

        Returns:
            `logits` (B, T, vocab_size), in evaluation mode certain of the blank on padding frames, so that a batch
            decodes to the text of its clips; `loss` scalar, reduced as `config.ctc_loss_reduction` says.
        """
        hidden_states, outputs = self.encode(input_values, attention_mask, **kwargs)
        logits = self.lm_head(self.dropout(hidden_states))
        if attention_mask is None:
            frame_lengths = torch.full((len(logits),), logits.shape[1], device=logits.device)
        else:
            frame_lengths = self._get_feat_extract_output_lengths(attention_mask.to(torch.bool).sum(-1))

        loss = None
        if labels is not None:
            if labels.numel() and labels.max() >= self.config.vocab_size:
                raise ValueError(
                    f"label {labels.max().item()} is outside the vocabulary of {self.config.vocab_size} tokens"
                )
            targets = labels.masked_select(labels >= 0)
            log_probs = nn.functional.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)  # (T, B, V)
            has_loss = logits.device if logits.device.type in ("cpu", "cuda") else "cpu"  # torch has it for these alone
            with torch.backends.cudnn.flags(enabled=False):
                loss = nn.functional.ctc_loss(
                    log_probs.to(has_loss),
                    targets.to(has_loss),
                    frame_lengths.to(has_loss),
                    (labels >= 0).sum(-1).to(has_loss),
                    blank=self.config.pad_token_id,
                    reduction=self.config.ctc_loss_reduction,
                    zero_infinity=self.config.ctc_zero_infinity,
                ).to(logits.device)
        if attention_mask is not None and not self.training:
            padding = ~length_mask(frame_lengths, logits.shape[1])[..., None]
            blank = torch.arange(self.config.vocab_size, device=logits.device) == self.config.pad_token_id
            logits = torch.where(padding, torch.where(blank, 0.0, -1e4).to(logits.dtype), logits)
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SpeechCLForSequenceClassification(SpeechCLHeadModel):
    """Encoder with mean pooling over time and a linear classifier: speaker, keyword, language."""

    def __init__(self, config: SpeechCLConfig):
        super().__init__(config)
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.dropout = SpeechCLDropout(config.final_dropout)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Class scores of whole clips.

        Args:
            input_values, attention_mask: as in `SpeechCLModel`; so are the masks among `kwargs`.
            labels: (B,) class ids.

        Returns:
            `logits` (B, num_labels); `loss`, the mean cross-entropy, with labels.
        """
        hidden_states, outputs = self.encode(input_values, attention_mask, **kwargs)
        hidden_states = self.projector(hidden_states)
        if attention_mask is None:
            pooled = hidden_states.mean(1)
        else:
            frame_lengths = self._get_feat_extract_output_lengths(attention_mask.to(torch.bool).sum(-1))
            mask = length_mask(frame_lengths, hidden_states.shape[1])[..., None]
            pooled = (hidden_states * mask).sum(1) / frame_lengths[:, None].clamp_min(1)
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
