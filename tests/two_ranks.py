"""Run by torch.distributed.run from test_processes.py: gradients of every objective, its clips on both ranks."""

import sys

import torch
from torch import nn

from hf_speechcl import load_corpus
from hf_speechcl.distributed import leaves_launch
from tests.trainers import KINDS, gradients, make_pretraining_trainer, objectives_of, quiet_gumbel_softmax

# For every rank the clips of its micro-batches.
SPREADS = {"one batch each": [[[0, 1, 2]], [range(3, 12)]], "two each": [[[0], range(1, 5)], [range(5, 10), [10, 11]]]}


@leaves_launch
def main(file: str) -> None:
    nn.functional.gumbel_softmax = quiet_gumbel_softmax
    corpus = load_corpus("demo", "validation")
    found = {}
    for kind in KINDS:
        for spread, ranks in SPREADS.items():
            torch.manual_seed(0)
            trainer = make_pretraining_trainer(corpus, file + ".runs", objectives_of(kind))
            items = [trainer.train_dataset[0, index] for index in range(12)]
            parts = [trainer.data_collator([items[i] for i in part]) for part in ranks[trainer.args.process_index]]
            loss, found_gradients = gradients(trainer, parts, trainer.accelerator.prepare_model(trainer.model))
            found[kind, spread] = trainer.accelerator.reduce(loss, "mean"), found_gradients  # as the log reports it
    if trainer.args.process_index == 0:
        torch.save(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
