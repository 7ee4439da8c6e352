"""Classes by a few labelled clips of each: speakers, words or languages that the encoder was not trained to tell."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..data.batching import DurationBatchSampler
from ..data.collators import pad_waveforms
from ..hub import find_model, may_be_model, read_config
from ..modeling_speechcl import SpeechCLModel, SpeechCLPreTrainedModel
from ..objectives.base import frame_lengths
from ..objectives.prototypical import Prototypical
from ..objectives.utterance import UtteranceObjective, pool_statistics
from ..pretraining import SpeechCLForPreTraining
from .nearest_prototype import NearestPrototype

MIN_SECONDS = 0.1
TENSORS, CLASSES = "prototypes.safetensors", "classes.json"


class PrototypicalClassifier:
    """Tell classes by the mean embedding of a few labelled clips of each, without training anything.

        classifier = PrototypicalClassifier("runs/mine")
        classifier.fit(waveforms, ["Ann", "Ann", "Bob", "Bob"])  # 1-D float arrays at 16 kHz, of any length
        classifier.predict(others)  # ["Bob", "Ann", …]
        classifier.save("runs/voices")
        PrototypicalClassifier.load("runs/voices").predict_proba(others)  # (N, 2), columns as in .classes

    The embedding of a clip is the mean and the deviation over time of the encoder's last hidden states; each channel is
    brought to mean 0 and deviation 1 over the clips given to `fit`, and the nearest class is that of the least
    Euclidean distance. With `projector`, it is what an objective that compares clips (prototypical, info_nce, siamese,
    triplet) was trained on: the same statistics, projector, batch norm in evaluation mode, and the distance and
    temperature of the prototypical objective, or the cosine of the others. On held-out speakers the statistics were
    the better of the two for every model tried, those trained by such an objective included.

    Waveforms are lists of 1-D float arrays in [-1, 1], mono, at `sampling_rate`; nothing in an array tells at which
    rate it was recorded, so resample it before (`hf_speechcl.data.audio.read_audio` does). Embeddings do not depend on
    what else is in a batch, but for rounding.

    Args:
        model: folder or Hub name (`user/name`, `user/name@revision`) of a SpeechCL model, or such a model; it is put in
            evaluation mode.
        layer: whose hidden states: 0 is what enters the first layer; without, the last.
        projector: use the projector.
        max_seconds_per_batch: seconds of audio that are encoded together, padding included.

    Raises:
        ValueError: no SpeechCL model, no such layer, or no projector.

    Source: Snell et al. 2017, arXiv 1703.05175; the statistics as in Snyder et al. 2018 (`pool_statistics`).
    """

    def __init__(
        self,
        model: str | Path | SpeechCLPreTrainedModel,
        layer: int | None = None,
        projector: bool = False,
        max_seconds_per_batch: float = 60.0,
    ):
        model = load_model(model) if isinstance(model, str | Path) else model
        if not isinstance(model, SpeechCLPreTrainedModel):
            raise ValueError(f"model must be a SpeechCL model, a folder or a Hub name, found {type(model).__name__}")
        if layer is not None and not 0 <= layer <= model.config.num_hidden_layers:
            raise ValueError(f"layer must be between 0 and {model.config.num_hidden_layers}, found {layer}")
        if layer is not None and projector:
            raise ValueError(f"projector takes the last layer, found layer={layer}: leave one of them out")
        self.layer, self.projector, self.max_seconds_per_batch = layer, projector, max_seconds_per_batch
        self.encoder = getattr(model, "speechcl", model)
        self.model = model if projector else self.encoder
        self.objective = find_objective(model) if projector else None
        if self.objective is None:
            self.prototypes = NearestPrototype("euclidean", 0.2 * model.config.hidden_size, standardize=True)
        elif isinstance(self.objective, Prototypical):
            self.prototypes = NearestPrototype(self.objective.distance, self.objective.temperature, standardize=False)
        else:
            self.prototypes = NearestPrototype("cosine", 0.1, standardize=False)

    @property
    def sampling_rate(self) -> int:
        """Hz that waveforms must have."""
        return self.model.config.sampling_rate

    @property
    def classes(self) -> list[str | int]:
        """The labels that `fit` was given, in the order of the columns of `predict_proba`."""
        return self.prototypes.classes

    @torch.no_grad()
    def embed(self, waveforms: list[np.ndarray]) -> torch.Tensor:
        """Embeddings (N, D) float32 of N waveforms.

        Raises:
            ValueError: no waveforms, or one that is not 1-D, not of finite floats, or shorter than 0.1 s.
        """
        waveforms = [self._check(number, waveform) for number, waveform in enumerate(waveforms)]
        if not waveforms:
            raise ValueError("waveforms is empty: give at least one")
        self.model.eval()
        durations = [len(waveform) / self.sampling_rate for waveform in waveforms]
        rows: dict[int, torch.Tensor] = {}
        for keys in DurationBatchSampler(np.array(durations), self.max_seconds_per_batch, shuffle=False):
            indices = [index for _, index in keys]
            batch = pad_waveforms([waveforms[index] for index in indices])
            rows |= dict(zip(indices, self._embed_batch({k: v.to(self.model.device) for k, v in batch.items()})))
        return torch.stack([rows[index] for index in range(len(waveforms))])

    def _embed_batch(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = self.encoder(**batch, output_hidden_states=self.layer is not None)
        states = outputs.last_hidden_state if self.layer is None else outputs.hidden_states[self.layer]
        lengths = frame_lengths(self.encoder, batch, states.shape[1])
        if self.objective is None:
            return pool_statistics(states, lengths)
        return self.objective.batch_norm(self.objective.project(states, lengths))

    def _check(self, number: int, waveform: np.ndarray) -> np.ndarray:
        waveform = np.asarray(waveform)
        found = f"waveforms[{number}]"
        if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
            raise ValueError(
                f"{found} must be a 1-D array of floats in [-1, 1], found {waveform.dtype} of shape {waveform.shape}: "
                "mix channels down, and divide whole numbers by their greatest"
            )
        if len(waveform) < MIN_SECONDS * self.sampling_rate:
            raise ValueError(
                f"{found} is too short: {len(waveform)} samples at {self.sampling_rate} Hz, expected {MIN_SECONDS} s "
                "at least: leave it out"
            )
        if not np.isfinite(waveform).all():
            raise ValueError(f"{found} holds values that are not finite: leave it out")
        return waveform.astype(np.float32, copy=False)

    def fit(self, waveforms: list[np.ndarray], labels: list[str | int]) -> "PrototypicalClassifier":
        """Learn the classes of the labels, and no others, from one or more clips of each.

        Args:
            waveforms: N, see the class.
            labels: N texts or whole numbers.

        Raises:
            ValueError: as for `embed`; labels that are not one for each waveform, empty, or of fewer than two
                classes.
        """
        if len(waveforms) != len(labels):
            raise ValueError(f"labels must be as many as waveforms, found {len(labels)} for {len(waveforms)}")
        self.prototypes.fit(self.embed(waveforms), labels)
        return self

    def predict(self, waveforms: list[np.ndarray]) -> list[str | int]:
        """The label of the nearest class for every waveform."""
        return [self.classes[place] for place in self.predict_proba(waveforms).argmax(-1)]

    def predict_proba(self, waveforms: list[np.ndarray]) -> np.ndarray:
        """Softmax of the nearness to each class (N, C) float32; it ranks classes well and is not calibrated."""
        return self.prototypes.logits(self.embed(waveforms)).softmax(-1).cpu().numpy()

    def save(self, folder: str | Path) -> None:
        """Write the model, `prototypes.safetensors` and `classes.json` into a folder, which needs nothing else.

        Raises:
            ValueError: `fit` was not called.
        """
        if not self.classes:
            raise ValueError("no classes to save: call fit with a few labelled clips of each class first")
        folder = Path(folder)
        self.model.save_pretrained(folder)
        save_file({name: value.cpu().contiguous() for name, value in self.prototypes.tensors.items()}, folder / TENSORS)
        description = {"classes": self.classes, "layer": self.layer, "projector": self.projector}
        (folder / CLASSES).write_text(json.dumps(description, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "PrototypicalClassifier":
        """Read what `save` wrote, from a folder or by its name on the Hub.

        Raises:
            FileNotFoundError: no classifier in the folder.
        """
        folder = Path(find_model(folder))
        for name in (CLASSES, TENSORS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no {name} in {folder}: expected a folder that PrototypicalClassifier.save wrote"
                )
        description = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        classifier = cls(folder, description["layer"], description["projector"])
        classifier.prototypes.classes = description["classes"]
        classifier.prototypes.tensors = load_file(folder / TENSORS)
        return classifier


def load_model(name: str | Path) -> SpeechCLPreTrainedModel:
    """The model of a folder or Hub name: with its projectors, where there are trained ones, else the encoder alone."""
    if not may_be_model(str(name)):
        raise ValueError(f"model {str(name)!r}: expected a folder or a Hub name")
    folder = find_model(name)
    pretraining = SpeechCLForPreTraining.__name__ in (read_config(str(name), folder).architectures or [])
    model_class = SpeechCLForPreTraining if pretraining else SpeechCLModel
    return model_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def find_objective(model: SpeechCLPreTrainedModel) -> UtteranceObjective:
    """The objective of a model that compares clips; the prototypical one, if it has several."""
    found = model.comparing if isinstance(model, SpeechCLForPreTraining) else {}
    if not found:
        raise ValueError(
            "projector: the model has none, as it was not trained with an objective that compares clips (prototypical, "
            "info_nce, siamese, triplet): leave it out"
        )
    return found.get("prototypical") or next(iter(found.values()))
