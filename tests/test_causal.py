"""Attention without a mask: the same numbers, and torch is told that it is causal, compiled or not."""

import pytest
import torch

from sparsesurvey.causal import without_mask
from sparsesurvey.mistral import build


def attention_calls(model, x):
    """(is a mask given, is it called causal) of every attention that torch.compile sees."""
    seen = []

    def backend(graph, inputs):
        seen.extend((node.kwargs.get("attn_mask") is not None, node.kwargs.get("is_causal"))
                    for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph

    torch.compiler.reset()
    torch.compile(model.base_model, backend=backend, fullgraph=True)(input_ids=x)
    return seen


def test_compiled_or_not_it_is_causal_without_a_mask():
    x = torch.randint(0, 32, (2, 24), generator=torch.Generator().manual_seed(0))
    model = build("markov")
    before = model(input_ids=x).logits
    assert without_mask(without_mask(model)) is model
    assert torch.equal(model(input_ids=x).logits, before)
    assert attention_calls(model, x) == [(False, True)] * 2


@pytest.mark.parametrize("change", [{"_attn_implementation": "eager"}, {"sliding_window": 8}])
def test_what_needs_a_mask(change):
    model = build("markov")
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match="model must attend by sdpa and without a window"):
        without_mask(model)
