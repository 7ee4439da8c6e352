"""What `torch.compile` rests on: whole graphs, and none made anew for batches of other shapes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hf_speechcl import SpeechCLConfig, SpeechCLForPreTraining
from tests.conftest import SMALL_OBJECTIVES, TINY, make_collator


def make_batches(model, clips, groups):
    collator = make_collator(model)
    for number, group in enumerate(groups):
        items = [
            {"index": index, "label": index, "seed": (0, number, index), "input_values": clips[index]}
            for index in group
        ]
        batch = collator(items)
        batch.pop("num_skipped")
        yield batch


@pytest.mark.parametrize("name", ["best_rq", "hubert", "wav2vec2", "denoising", "masked_reconstruction"])
def test_compiled_steps_of_other_lengths_use_the_graphs_there_are(name, clips):
    torch._dynamo.reset()
    config = SpeechCLConfig(**TINY, sliding_window=6, objectives={name: SMALL_OBJECTIVES[name]})
    model = SpeechCLForPreTraining(config)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for batch in make_batches(model, clips, [(0, 1), (1, 2, 3), (2, 3), (0, 4), (0, 1, 2, 3)]):
        loss = compiled(**batch).loss
        loss.backward()
        graphs.append(counter.frame_count)
    assert graphs[0] == 1
    assert graphs[2:] == [graphs[1]] * 3
