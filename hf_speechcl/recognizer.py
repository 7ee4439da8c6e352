"""Any speech recognition model of transformers → transcripts of waveforms and of recordings."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer, pipeline
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_RNNT_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_FOR_TDT_MAPPING_NAMES,
)

from .command_line import option
from .data.audio import AudioError, stream_audio
from .decoding import DecodingArguments, Transcript, build_decoder, join_transcripts
from .hub import find_model
from .int8 import quantize_linear
from .recordings import (
    RecordingArguments,
    Window,
    batch_by_length,
    cut_windows,
    find_utterances,
    group_windows,
    measure_levels,
)

SPEECH_TO_TEXT = {
    *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
    *MODEL_FOR_TDT_MAPPING_NAMES.values(),
    *MODEL_FOR_RNNT_MAPPING_NAMES.values(),
}
# Model types that read a clip in a padded batch as they read it alone.
IGNORES_PADDING = {"speechcl", "wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "parakeet_ctc"}
SHORTEST_SECONDS = 0.1  # that a model of another kind is given
SHORTEST_CHUNK = 1.0  # seconds, for models that are given one chunk after the other
STRIDE_SECONDS = 4.0  # surroundings of a chunk, for models that attend to all of it
BATCH_SECONDS = 15.0  # of short utterances of a recording, read together; more is slower on a CPU
GROUP_SECONDS = 60.0  # of a recording are at hand to be batched by their length
DTYPES = ("float32", "bfloat16", "int8")


@dataclass
class ComputingArguments:
    """Where and in what precision a model computes."""

    device: str = option("auto", "cpu, cuda:1 …, or auto for the accelerator where there is one.")
    dtype: str = option(
        "float32",
        "float32; bfloat16, which needs a processor that has it to be faster; or int8: linear layers in 8-bit "
        "integers, on a CPU.",
    )

    def __post_init__(self):
        check_dtype(self.dtype, self.torch_device)

    @property
    def torch_device(self) -> torch.device:
        return find_device(self.device)


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name, or for "auto" the accelerator where there is one.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used ({reason}): expected auto, cpu or cuda") from None


def check_dtype(dtype: str, device: torch.device) -> None:
    """Raise ValueError unless a recogniser can compute in it there."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {dtype!r}")
    if dtype == "int8" and device.type != "cpu":
        raise ValueError(f"dtype int8 is for the cpu, found device {device}: use bfloat16, or the device cpu")


class SpeechRecognizer:
    """A speech recognition model with all that stands before and after it.

    Models with a CTC head are called directly; the others, such as Whisper, through transformers' pipeline.

    Attributes:
        sampling_rate: Hz, of the waveforms it takes.
        kind: "ctc" or "seq2seq".
    """

    def __init__(self, model, feature_extractor, tokenizer, decoding: DecodingArguments | None = None):
        decoding = decoding or DecodingArguments()
        self.model, self.feature_extractor, self.tokenizer = model.eval(), feature_extractor, tokenizer
        self.sampling_rate: int = feature_extractor.sampling_rate
        of_model = getattr(model.config, "sampling_rate", self.sampling_rate)
        if of_model != self.sampling_rate:
            raise ValueError(
                f"the feature extractor is for {self.sampling_rate} Hz and the model for {of_model} Hz: the folder "
                "holds the preprocessor_config.json of another model"
            )
        self.kind = "ctc" if type(model).__name__.endswith("ForCTC") else "seq2seq"
        if self.kind == "ctc":
            self.samples_per_frame = _samples_per_frame(model, feature_extractor)
            self.decoder = build_decoder(tokenizer, self.samples_per_frame / self.sampling_rate, decoding)
            self.shortest = _shortest(model, self.samples_per_frame)
            # Elsewhere a clip's posteriors depend on its padding, which adapters, some relative positions and group
            # normalisation see; models with the latter were trained on padding that they do not mask.
            self.alone = (
                model.config.model_type not in IGNORES_PADDING
                or getattr(model.config, "add_adapter", False)
                or getattr(model.config, "feat_extract_norm", None) == "group"
                or not feature_extractor.return_attention_mask
            )
        else:
            if decoding.uses_beam:
                raise ValueError(f"{type(model).__name__} has no CTC head: beam_width, lm and hot_words are for those")
            self.pipeline = pipeline(
                "automatic-speech-recognition",
                model=model,
                feature_extractor=feature_extractor,
                tokenizer=tokenizer,
                device=model.device,
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: str = "float32",
        decoding: DecodingArguments | None = None,
        trust_remote_code: bool = False,
    ) -> "SpeechRecognizer":
        """Load a folder, or a model of the Hub: `user/name`, or `user/name@revision`. Weights must be safetensors.

        Args:
            device: of torch, or "auto" for the accelerator where there is one.
            dtype: one of `DTYPES`.
            decoding: of CTC models; greedy by default.
            trust_remote_code: run the code that comes with the model.

        Raises:
            ValueError: the model is no speech recogniser, or not for the sampling rate of its feature extractor; or
                dtype int8 elsewhere than on a CPU.
        """
        device = find_device(device)
        check_dtype(dtype, device)
        folder, source = find_model(model), {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(folder, **source)
        architectures = config.architectures or []
        precision = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        if any(name.endswith("ForCTC") for name in architectures):
            network = AutoModelForCTC.from_pretrained(folder, dtype=precision, use_safetensors=True, **source)
            feature_extractor = AutoFeatureExtractor.from_pretrained(folder, **source)
            tokenizer = AutoTokenizer.from_pretrained(folder, **source)
            if dtype == "int8":
                quantize_linear(network)
            return cls(network.to(device), feature_extractor, tokenizer, decoding)
        if not SPEECH_TO_TEXT & set(architectures):
            raise ValueError(
                f"{model} holds {', '.join(architectures) or config.model_type}, which writes no text: fine-tune it "
                "first (scripts/finetune_ctc.py)"
            )
        loaded = pipeline(
            "automatic-speech-recognition",
            model=folder,
            dtype=precision,
            model_kwargs={"use_safetensors": True},
            **source,
        )
        if dtype == "int8":
            quantize_linear(loaded.model)
        return cls(loaded.model.to(device), loaded.feature_extractor, loaded.tokenizer, decoding)

    def transcribe(self, waveforms: list[np.ndarray]) -> list[Transcript]:
        """Transcribe a batch of clips, each as it would be alone.

        Args:
            waveforms: (S,) float32 each, mono, in [-1, 1], at `sampling_rate`.

        Returns:
            A transcript of each, in their order; an empty one of a clip that is shorter than a frame.
        """
        if self.kind == "seq2seq":
            return [self._generate(waveform) for waveform in waveforms]
        return [self.decoder.decode(log_probs) for log_probs in self.log_probs(waveforms)]

    @torch.inference_mode()
    def log_probs(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """Log-posteriors (T, V) float32 of each clip of a batch, of a model with a CTC head."""
        if self.alone and len(waveforms) > 1:
            return [log_probs for waveform in waveforms for log_probs in self.log_probs([waveform])]
        kept = [waveform for waveform in waveforms if len(waveform) >= self.shortest]
        outputs: Iterable[np.ndarray] = iter(())
        if kept:
            inputs = self.feature_extractor(
                kept, sampling_rate=self.sampling_rate, padding=True, return_tensors="pt"
            ).to(self.model.device)
            if self.model.config.model_type != "speechcl":  # whose log-mel is of float32 in every dtype
                inputs = inputs.to(self.model.dtype)
            if self.model.main_input_name == "input_values" and len({*map(len, kept)}) == 1:
                inputs.pop("attention_mask", None)
            logits = self.model(**inputs).logits
            lengths = self._num_frames(inputs, logits)
            log_probs = logits.float().log_softmax(-1).cpu().numpy()
            outputs = (frames[:length] for frames, length in zip(log_probs, lengths))
        nothing = np.zeros((0, self.model.config.vocab_size), np.float32)
        return [next(outputs) if len(waveform) >= self.shortest else nothing for waveform in waveforms]

    def transcribe_recording(
        self, audio: str | Path | dict[str, Any], recording: RecordingArguments | None = None
    ) -> Transcript:
        """Transcribe a recording of any length, rate and number of channels in little memory.

        Args:
            audio: a path, or `{"bytes", "path"}` as the rows of a corpus have it.
            recording: how it is cut.

        Raises:
            AudioError: it cannot be read or holds nothing.
        """
        return join_transcripts(transcript for _, _, transcript in self.transcribe_utterances(audio, recording))

    def transcribe_utterances(
        self,
        audio: str | Path | dict[str, Any],
        recording: RecordingArguments | None = None,
        progress: Callable[[float, float], None] | None = None,
    ) -> Iterator[tuple[float, float, Transcript]]:
        """Transcribe a recording between its pauses: start and end in seconds, and transcript, of one after the other.

        Args:
            audio, recording: as for `transcribe_recording`. Times are those of the recording.
            progress: is told the seconds done and those there are.

        Raises:
            AudioError: it cannot be read or holds nothing.
        """
        recording = recording or RecordingArguments()
        audio = audio if isinstance(audio, dict) else {"bytes": None, "path": str(audio)}
        length, stride = self.chunk(recording.chunk_seconds)
        levels, num_samples = measure_levels(stream_audio(audio, self.sampling_rate), self.sampling_rate)
        if num_samples == 0:
            raise AudioError("it holds no samples")
        utterances = find_utterances(
            levels,
            num_samples,
            self.sampling_rate,
            recording.pause_seconds,
            **({"grid": self.samples_per_frame} if self.kind == "ctc" else {"max_seconds": recording.chunk_seconds}),
        )
        windows = cut_windows(stream_audio(audio, self.sampling_rate), utterances, length, stride)
        stitched = self._stitch(windows) if self.kind == "ctc" else None
        for begin, end in utterances:
            start = begin / self.sampling_rate
            if self.kind == "ctc":
                transcript = self.decoder.decode(next(stitched))
                words = [replace(word, start=word.start + start, end=word.end + start) for word in transcript.words]
                transcript = replace(transcript, words=words)
            else:
                transcript = self._generate(next(windows).samples)
            yield start, end / self.sampling_rate, transcript
            if progress is not None:
                progress(end / self.sampling_rate, num_samples / self.sampling_rate)

    def _stitch(self, windows: Iterator[Window]) -> Iterator[np.ndarray]:
        """Log-posteriors of one utterance after the other, without those of the surroundings of their windows."""
        parts = []
        for group in group_windows(windows, round(GROUP_SECONDS * self.sampling_rate)):
            for window, log_probs in zip(group, self._read(group)):
                left = window.left // self.samples_per_frame
                right = None if window.is_last else left + window.length // self.samples_per_frame
                parts.append(log_probs[left:right])
                if window.is_last:
                    yield np.concatenate(parts)
                    parts = []

    def _read(self, windows: list[Window]) -> list[np.ndarray]:
        """Log-posteriors of windows, which are batched by their length."""
        lengths = [len(window.samples) for window in windows]
        found: dict[int, np.ndarray] = {}
        for batch in batch_by_length(lengths, round(BATCH_SECONDS * self.sampling_rate)):
            found.update(zip(batch, self.log_probs([windows[place].samples for place in batch])))
        return [found[place] for place in range(len(windows))]

    def chunk(self, chunk_seconds: float) -> tuple[int, int]:
        """Samples of a window of `chunk_seconds` and of its surroundings to either side.

        Raises:
            ValueError: the window has no room between its surroundings, or none for a word.
        """
        if self.kind == "seq2seq":
            if chunk_seconds < SHORTEST_CHUNK:
                raise ValueError(f"chunk_seconds must be {SHORTEST_CHUNK:g} or more, found {chunk_seconds:g}")
            return math.ceil(chunk_seconds * self.sampling_rate), 0
        if reach := getattr(self.model.config, "layer_reach", None):
            stride = reach + 2
        else:
            stride = math.ceil(STRIDE_SECONDS * self.sampling_rate / self.samples_per_frame)
        seconds_per_frame = self.samples_per_frame / self.sampling_rate
        length = int(chunk_seconds / seconds_per_frame)
        if length <= 2 * stride:
            raise ValueError(
                f"chunk_seconds {chunk_seconds:g}: chunks of this model overlap by {stride * seconds_per_frame:g} s on "
                f"either side; set it to {math.ceil(3 * stride * seconds_per_frame)} or more"
            )
        return length * self.samples_per_frame, stride * self.samples_per_frame

    def _num_frames(self, inputs, logits: torch.Tensor) -> list[int]:
        """Frames of every clip of a batch that are not padding."""
        mask = inputs.get("attention_mask")
        if mask is None:
            return [logits.shape[1]] * len(logits)
        lengths = mask.sum(-1)
        if self.model.main_input_name == "input_values":
            lengths = self.model._get_feat_extract_output_lengths(lengths)
        elif hasattr(self.model, "_get_subsampling_output_length"):
            lengths = self.model._get_subsampling_output_length(lengths)
        return lengths.tolist()

    @torch.inference_mode()
    def _generate(self, waveform: np.ndarray) -> Transcript:
        if len(waveform) == 0:
            return Transcript("", None, None)
        waveform = np.pad(waveform, (0, max(0, round(SHORTEST_SECONDS * self.sampling_rate) - len(waveform))))
        # Whisper reads more than it takes at once when it may mark the times itself.
        longest = getattr(self.feature_extractor, "n_samples", math.inf)
        options = {"return_timestamps": True} if len(waveform) > longest else {}
        output = self.pipeline({"raw": waveform, "sampling_rate": self.sampling_rate}, **options)
        return Transcript(output["text"].strip(), None, None)


def _samples_per_frame(model, feature_extractor) -> int:
    encoder = getattr(model.config, "encoder_config", model.config)
    if model.main_input_name != "input_values" and hasattr(encoder, "subsampling_factor"):
        return feature_extractor.hop_length * encoder.subsampling_factor
    if getattr(model.config, "add_adapter", False):
        return model.config.inputs_to_logits_ratio * model.config.adapter_stride**model.config.num_adapter_layers
    return model.config.inputs_to_logits_ratio


def _shortest(model, samples_per_frame: int) -> int:
    """Samples that give a frame."""
    if model.main_input_name != "input_values":
        return 2 * samples_per_frame
    lengths = model._get_feat_extract_output_lengths(torch.arange(1, 10 * samples_per_frame))
    return 1 + int((lengths > 0).int().argmax())
