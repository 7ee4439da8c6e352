"""What `torch.compile` rests on: whole graphs, and none made anew for batches of other shapes.

Of the objectives on frames cpc and data2vec are not here: their graphs are broken where frames are counted and where
the teacher begins.
"""

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
    options = {**TINY, "hidden_dropout": 0.1, "attention_dropout": 0.1, "sliding_window": 6}
    config = SpeechCLConfig(**options, objectives={name: SMALL_OBJECTIVES[name]})
    model = SpeechCLForPreTraining(config).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for batch in make_batches(model, clips, [(0, 1), (1, 2, 3), (2, 3), (0, 4), (0, 1, 2, 3)]):
        loss = compiled(**batch).loss
        loss.backward()
        graphs.append(counter.frame_count)
    assert graphs[0] == 1
    assert graphs[2:] == [graphs[1]] * 3
