"""Word and character error rates of a CTC model on a corpus."""

import datasets
import evaluate
import jiwer
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.batching import DurationBatchSampler
from ..data.collators import begin_batch
from ..data.dataset import SpeechDataset


def edit_counts(references: list[str], hypotheses: list[str], characters: bool = False) -> np.ndarray:
    """Errors and reference length of every utterance, in words or in characters.

    Returns:
        (N, 2) int: substitutions + deletions + insertions, and words (or characters, spaces among them).
    """
    process = jiwer.process_characters if characters else jiwer.process_words
    outputs = [process(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses)]
    errors = [output.substitutions + output.deletions + output.insertions for output in outputs]
    lengths = [output.hits + output.substitutions + output.deletions for output in outputs]
    return np.array([errors, lengths], dtype=np.int64).T.reshape(-1, 2)


def bootstrap_interval(counts: np.ndarray, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the error rate, utterances resampled with replacement (Bisani and Ney 2004)."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=num_resamples)
    errors, lengths = (draws @ counts).T
    low, high = np.percentile(errors / np.maximum(lengths, 1), [2.5, 97.5])
    return float(low), float(high)


class SpeechErrorRates(evaluate.Metric):
    """WER and CER over all utterances together, with bootstrap 95% intervals; works offline.

    `compute(predictions=…, references=…)` gives `wer`, `wer_low`, `wer_high`, `cer`, `cer_low`, `cer_high` as shares
    (0.25, not 25). Texts are compared as they are: normalise them before.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Word and character error rate with bootstrap intervals.",
            citation="",
            inputs_description="predictions and references: lists of texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, num_resamples=1000, seed=0):
        results = {}
        for name, characters in (("wer", False), ("cer", True)):
            counts = edit_counts(references, predictions, characters)
            errors, length = counts.sum(0)
            if length == 0:
                raise ValueError("all references are empty: there is nothing to score against")
            results[name] = float(errors / length)
            results[f"{name}_low"], results[f"{name}_high"] = bootstrap_interval(counts, num_resamples, seed)
        return results


@torch.inference_mode()
def transcribe(model, processor, corpus: datasets.Dataset, max_seconds_per_batch: float = 60.0) -> list[str | None]:
    """Greedy CTC transcripts of the rows of a corpus, the work shared by all processes of a launch.

    A clip that cannot be decoded is logged and gets None.

    Raises:
        ValueError: the processor and the model are for different sampling rates.
    """
    state = PartialState()
    rate = processor.feature_extractor.sampling_rate
    if rate != getattr(model.config, "sampling_rate", rate):
        raise ValueError(f"the processor is for {rate} Hz, the model for {model.config.sampling_rate} Hz")
    dataset = SpeechDataset(corpus, rate, min_seconds=0)
    sampler = DurationBatchSampler(
        dataset.durations,
        max_seconds_per_batch,
        shuffle=False,
        rank=state.process_index,
        world_size=state.num_processes,
    )
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=begin_batch)
    texts = []
    model.eval()
    with tqdm(total=len(dataset), desc="transcribing", unit="clip", disable=not state.is_main_process) as progress:
        for clips, batch in loader:
            batch.pop("num_skipped")
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
            texts += zip((clip["index"] for clip in clips), processor.batch_decode(logits.argmax(-1)))
            progress.update(len(clips) * state.num_processes)
    texts = dict(gather_object(texts))
    return [texts.get(index) for index in range(len(dataset))]
