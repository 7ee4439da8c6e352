"""Any speech recognition model of transformers → transcripts of waveforms and of recordings."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
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

from .data.audio import stream_audio
from .decoding import DecodingArguments, Transcript, build_decoder, join_transcripts
from .hub import find_model
from .recordings import RecordingArguments, Window, cut_windows, find_utterances, measure_levels

SPEECH_TO_TEXT = {
    *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values(),
    *MODEL_FOR_TDT_MAPPING_NAMES.values(),
    *MODEL_FOR_RNNT_MAPPING_NAMES.values(),
}
STRIDE_SECONDS = 4.0  # surroundings of a chunk, for models that attend to all of it


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
            # Group normalisation sees padding, and such models were trained on padding that they do not mask.
            self.alone = (
                not feature_extractor.return_attention_mask
                or getattr(model.config, "feat_extract_norm", None) == "group"
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
        device: str = "cpu",
        decoding: DecodingArguments | None = None,
        trust_remote_code: bool = False,
    ) -> "SpeechRecognizer":
        """Load a folder, or a model of the Hub: `user/name`, or `user/name@revision`. Weights must be safetensors.

        Args:
            device: of torch, or "auto" for the accelerator where there is one.
            decoding: of CTC models; greedy by default.
            trust_remote_code: run the code that comes with the model.

        Raises:
            ValueError: the model is no speech recogniser, or not for the sampling rate of its feature extractor.
        """
        folder, source = find_model(model), {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(folder, **source)
        architectures = config.architectures or []
        if device == "auto":
            device = torch.accelerator.current_accelerator() or "cpu"
        if any(name.endswith("ForCTC") for name in architectures):
            network = AutoModelForCTC.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **source)
            parts = network.to(device), AutoFeatureExtractor.from_pretrained(folder, **source)
            return cls(*parts, AutoTokenizer.from_pretrained(folder, **source), decoding)
        if not SPEECH_TO_TEXT & set(architectures):
            raise ValueError(
                f"{model} holds {', '.join(architectures) or config.model_type}, which writes no text: fine-tune it "
                "first (scripts/finetune_ctc.py)"
            )
        loaded = pipeline(
            "automatic-speech-recognition",
            model=folder,
            dtype=torch.float32,
            model_kwargs={"use_safetensors": True},
            **source,
        )
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
        shortest = self._shortest
        kept = [waveform for waveform in waveforms if len(waveform) >= shortest]
        outputs: Iterable[np.ndarray] = iter(())
        if kept:
            inputs = self.feature_extractor(
                kept, sampling_rate=self.sampling_rate, padding=True, return_tensors="pt"
            ).to(self.model.device)
            logits = self.model(**inputs).logits
            lengths = self._num_frames(inputs, logits)
            log_probs = logits.float().log_softmax(-1).cpu().numpy()
            outputs = (frames[:length] for frames, length in zip(log_probs, lengths))
        nothing = np.zeros((0, self.model.config.vocab_size), np.float32)
        return [next(outputs) if len(waveform) >= shortest else nothing for waveform in waveforms]

    def transcribe_recording(
        self, audio: str | Path | dict[str, Any], recording: RecordingArguments | None = None
    ) -> Transcript:
        """Transcribe a recording of any length, rate and number of channels in little memory.

        Args:
            audio: a path, or `{"bytes", "path"}` as the rows of a corpus have it.
            recording: how it is cut.

        Raises:
            AudioError: it cannot be read.
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
        """
        recording = recording or RecordingArguments()
        audio = audio if isinstance(audio, dict) else {"bytes": None, "path": str(audio)}
        length, stride = self._chunk(recording.chunk_seconds)
        levels, num_samples = measure_levels(stream_audio(audio, self.sampling_rate), self.sampling_rate)
        utterances = find_utterances(
            levels,
            num_samples,
            self.sampling_rate,
            recording.pause_seconds,
            **({"grid": self.samples_per_frame} if self.kind == "ctc" else {"max_seconds": recording.chunk_seconds}),
        )
        windows = cut_windows(stream_audio(audio, self.sampling_rate), utterances, length, stride)
        for begin, end in utterances:
            start = begin / self.sampling_rate
            if self.kind == "ctc":
                transcript = self.decoder.decode(np.concatenate(list(self._stitch(windows))))
                words = [replace(word, start=word.start + start, end=word.end + start) for word in transcript.words]
                transcript = replace(transcript, words=words)
            else:
                transcript = self._generate(next(windows).samples)
            yield start, end / self.sampling_rate, transcript
            if progress is not None:
                progress(end / self.sampling_rate, num_samples / self.sampling_rate)

    def _stitch(self, windows: Iterator[Window]) -> Iterator[np.ndarray]:
        """Log-posteriors of the windows of one utterance, without those of their surroundings."""
        for window in windows:
            (log_probs,) = self.log_probs([window.samples])
            left = window.left // self.samples_per_frame
            yield (
                log_probs[left:] if window.is_last else log_probs[left : left + window.length // self.samples_per_frame]
            )
            if window.is_last:
                return

    def _chunk(self, chunk_seconds: float) -> tuple[int, int]:
        """Samples of a window and of its surroundings to either side."""
        if self.kind == "seq2seq":
            return math.ceil(chunk_seconds * self.sampling_rate), 0
        if window := getattr(self.model.config, "sliding_window", None):
            stride = self.model.config.num_hidden_layers * window + 2
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

    @property
    def _shortest(self) -> int:
        """Samples that give a frame."""
        if self.model.main_input_name != "input_values":
            return 2 * self.samples_per_frame
        lengths = self.model._get_feat_extract_output_lengths(torch.arange(1, 10 * self.samples_per_frame))
        return 1 + int((lengths > 0).int().argmax())

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
        # Whisper reads more than it takes at once when it may mark the times itself.
        longest = getattr(self.feature_extractor, "n_samples", math.inf)
        options = {"return_timestamps": True} if len(waveform) > longest else {}
        output = self.pipeline({"raw": waveform, "sampling_rate": self.sampling_rate}, **options)
        return Transcript(output["text"].strip(), None, None)


def _samples_per_frame(model, feature_extractor) -> int:
    encoder = getattr(model.config, "encoder_config", model.config)
    if model.main_input_name != "input_values" and hasattr(encoder, "subsampling_factor"):
        return feature_extractor.hop_length * encoder.subsampling_factor
    return model.config.inputs_to_logits_ratio
