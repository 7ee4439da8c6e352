"""Any speech recognition model of transformers → transcripts of waveforms and of recordings."""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCTC, AutoProcessor

from .data.audio import read_audio
from .decoding import DecodingArguments, Transcript, build_decoder


class SpeechRecognizer:
    """A model with its processor and a decoder.

    Attributes:
        sampling_rate: Hz, of the waveforms it takes.
        kind: "ctc" or "seq2seq".
    """

    def __init__(self, model, processor, decoding: DecodingArguments):
        self.model, self.processor, self.kind = model.eval(), processor, "ctc"
        self.sampling_rate = processor.feature_extractor.sampling_rate
        of_model = getattr(model.config, "sampling_rate", self.sampling_rate)
        if of_model != self.sampling_rate:
            raise ValueError(f"the processor is for {self.sampling_rate} Hz, the model for {of_model} Hz")
        self.decoder = build_decoder(
            processor.tokenizer, model.config.inputs_to_logits_ratio / self.sampling_rate, decoding
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        revision: str | None = None,
        device: str = "cpu",
        decoding: DecodingArguments | None = None,
        trust_remote_code: bool = False,
    ) -> "SpeechRecognizer":
        """Load a folder or a Hub repository."""
        source = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        processor = AutoProcessor.from_pretrained(model, **source)
        if not hasattr(processor, "tokenizer"):
            raise ValueError(f"{model} has no tokenizer: fine-tune it first (scripts/finetune_ctc.py)")
        network = AutoModelForCTC.from_pretrained(model, **source).to(device)
        return cls(network, processor, decoding or DecodingArguments())

    @torch.inference_mode()
    def transcribe(self, waveforms: list[np.ndarray]) -> list[Transcript]:
        """Transcribe a batch.

        Args:
            waveforms: float32, mono, in [-1, 1], at `sampling_rate`.
        """
        if not self.processor.feature_extractor.return_attention_mask and len(waveforms) > 1:
            # Such models were trained on padding that they do not mask: their clips must come alone.
            return [transcript for waveform in waveforms for transcript in self.transcribe([waveform])]
        inputs = self.processor.feature_extractor(
            waveforms, sampling_rate=self.sampling_rate, padding=True, return_tensors="pt"
        ).to(self.model.device)
        log_probs = self.model(**inputs).logits.float().log_softmax(-1).cpu().numpy()
        lengths = [
            int(self.model._get_feat_extract_output_lengths(torch.tensor(len(waveform)))) for waveform in waveforms
        ]
        return [self.decoder.decode(frames[:length]) for frames, length in zip(log_probs, lengths)]

    def transcribe_recording(self, audio: str | dict[str, Any]) -> Transcript:
        """Transcribe a recording of any length: a path, or `{"bytes", "path"}`."""
        audio = audio if isinstance(audio, dict) else {"bytes": None, "path": str(audio)}
        return self.transcribe([read_audio(audio, self.sampling_rate)])[0]
