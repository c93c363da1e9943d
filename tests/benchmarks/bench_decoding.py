"""Lists of ten titles by our search down the tree, against transformers' search without one."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import GenerationConfig

from flowerlib.tree import Beams, beam_search


@pytest.mark.parametrize("child_renormalised", [False, True])
def test_constrained_beams_against_generate(side_by_side, model, catalogue, child_renormalised):
    """The same prompts, the same number of steps: `generate` has no tree, so that it is told when to stop.

    It does more: it reads every prompt once a beam, and keeps all beams to the last step, where ours end with their
    titles. Both are what one gets who asks for ten lists.
    """
    rng = np.random.default_rng(0)
    histories = rng.integers(len(catalogue.titles), size=(8, 9)).tolist()
    search = Beams(10, child_renormalised=child_renormalised)
    model.eval()
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))

    def ours():
        beam_search(model, catalogue, histories, [search], batch_size=8)

    ours()
    hook.remove()
    contexts = [torch.tensor(catalogue.context(history)) for history in histories]
    ids, mask = (pad_sequence(rows, True, padding_side="left")
                 for rows in (contexts, list(map(torch.ones_like, contexts))))
    config = GenerationConfig(num_beams=10, num_return_sequences=10, max_new_tokens=len(calls), do_sample=False,
                              eos_token_id=None, pad_token_id=0)

    @torch.no_grad()
    def generate():
        model.generate(input_ids=ids, attention_mask=mask, generation_config=config)

    scored = "children" if child_renormalised else "vocabulary"
    side_by_side(f"10 constrained beams, softmax over {scored}, {len(calls)} steps / unconstrained generate", 1.1, ours,
                 generate, rounds=3)


def test_lists_against_the_work_that_they_need(side_by_side, model, catalogue):
    """Ten beams behind 16 prompts, and a matrix product of as many operations as PyTorch counts in their products."""
    histories = np.random.default_rng(0).integers(len(catalogue.titles), size=(16, 9)).tolist()
    model.eval()

    def ours():
        beam_search(model, catalogue, histories, [Beams(10)])

    with FlopCounterMode(display=False) as counter:
        ours()
    a = torch.ones(1024, 1024)
    side_by_side("10 beams for 16 prompts / one matrix product of as many operations as theirs", None, ours, lambda: a @ a, rounds=3,
                 worth=counter.get_total_flops() / (2 * 1024**3))
