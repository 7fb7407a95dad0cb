"""The Mistral of the survey: a 162M one and small siblings, all on transformers' ``MistralForCausalLM``.

The MLP of a layer is ``down_proj(silu(gate_proj(x)) * up_proj(x))``; ``gate_proj`` and ``up_proj`` are
``[intermediate, hidden]``, ``down_proj`` is ``[hidden, intermediate]`` (Jiang et al. 2023). Configurations are built
without weights, so that counting the 7B one costs nothing.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

SHAPES = {  # hidden, intermediate, layers, heads, key/value heads, vocabulary, tied embeddings, positions
    "7b": (4096, 14336, 32, 32, 8, 32000, False, 32768),
    "162m": (768, 3072, 12, 12, 12, 32000, False, 2048),
    "5m": (256, 768, 6, 4, 2, 1024, True, 2048),
    "1m": (128, 384, 5, 4, 2, 256, True, 2048),
    "bytes": (96, 256, 3, 3, 3, 256, True, 2048),
    "markov": (64, 192, 2, 2, 2, 32, True, 2048),
}
PARTS = ("embedding", "attention", "gate_proj", "up_proj", "down_proj", "norms", "head")


def config(name: str = "162m", kv_heads: int | None = None, vocab: int | None = None) -> MistralConfig:
    """The configuration called ``name``: "7b", "162m", "5m", "1m", "bytes" or "markov".

    Args:
        kv_heads: key/value heads of the attention; the 162M has 12 (multi-head), 4 gives the grouped-query variant of
            152,980,224 parameters.
        vocab: size of the vocabulary, if it is to differ (another tokenizer).

    Raises:
        ValueError: an unknown name, or ``kv_heads`` that does not divide the heads.
    """
    if name not in SHAPES:
        raise ValueError(f"name must be one of {', '.join(SHAPES)}, got {name!r}")
    hidden, intermediate, layers, heads, kv, words, tied, positions = SHAPES[name]
    kv = kv if kv_heads is None else kv_heads
    if isinstance(kv, bool) or not isinstance(kv, int) or kv < 1 or heads % kv:
        raise ValueError(f"kv_heads must divide the {heads} heads of {name!r}, got {kv!r}")
    return MistralConfig(
        vocab_size=words if vocab is None else vocab, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=hidden // heads,
        max_position_embeddings=positions, tie_word_embeddings=tied, sliding_window=None, use_cache=False,
        attn_implementation="sdpa",
    )


def build(which: str | MistralConfig = "162m", seed: int = 0, **options) -> MistralForCausalLM:
    """The model with fresh weights: the same ones for the same seed, whatever the global random state is.

    Matrices and embeddings are normal with std 0.02 * sqrt(768 / hidden): 0.02 is right at 768 and far too small for
    a narrow model, which then lags so much that a rescaled sparse one seems to beat it. ``o_proj`` and ``down_proj``,
    which write into the residual stream, are scaled by 1 / sqrt(2 layers) (Radford et al. 2019). Norms are one.

    Args:
        which: a name or a configuration; ``options`` go to ``config``.
    """
    shape = config(which, **options) if isinstance(which, str) else which
    with torch.random.fork_rng(devices=[]):  # transformers draws weights of its own; they are replaced below
        model = MistralForCausalLM(shape)
    generator = torch.Generator().manual_seed(seed)
    std = 0.02 * sqrt(768 / shape.hidden_size)
    residual = 1 / sqrt(2 * shape.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(weight, std=std * scale, generator=generator)
            else:
                weight.fill_(1.0)
    return model.train()


def projections(model: nn.Module, modules=("gate_proj", "up_proj", "down_proj")) -> dict[str, nn.Module]:
    """The MLP projections of a model, by their full name, in the order of the layers."""
    return {name: part for name, part in model.named_modules() if name.rpartition(".")[2] in modules}


def parameters(shape: MistralConfig) -> dict[str, int]:
    """Parameters by part; the sum is the size of the model.

    With hidden h, intermediate i, layers L, heads H of size d, key/value heads K, vocabulary V::

        embedding  V h                           attention  L (2 h H d + 2 h K d)     (q, o and k, v)
        gate_proj  L i h                         up_proj    L i h
        down_proj  L h i                         norms      (2 L + 1) h
        head       V h, or 0 where it is tied to the embedding

    >>> sum(parameters(config("162m")).values())
    162417408
    """
    h, i, layers, vocab = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.vocab_size
    d = shape.head_dim
    attention = 2 * h * d * (shape.num_attention_heads + shape.num_key_value_heads)
    sizes = (vocab * h, layers * attention, layers * i * h, layers * i * h, layers * h * i, (2 * layers + 1) * h,
             0 if shape.tie_word_embeddings else vocab * h)
    return dict(zip(PARTS, sizes))


def flops(shape: MistralConfig, seq: int, training: bool = False) -> dict[str, int]:
    """FLOP per token by part, for sequences of ``seq`` tokens: a multiplication and an addition are two.

    A matrix of P weights takes 2 P per token forward; training takes 6 P, since the input gradient and the weight
    gradient cost as much again each. Attention adds its scores and their product with the values: 4 H d per pair of
    a query and a key it may see, of which a causal query sees seq / 2 on average, so 2 H d seq per token and layer.
    The embedding is a look-up (0), norms and activations are not counted (under 1 %).
    """
    size = parameters(shape)
    size["embedding"] = size["norms"] = 0
    size["head"] = shape.vocab_size * shape.hidden_size  # a tied head still multiplies
    forward = {part: 2 * number for part, number in size.items()}
    forward["attention"] += 2 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * seq
    return {part: (3 if training else 1) * number for part, number in forward.items()}


def weight_bytes(shape: MistralConfig, itemsize: int = 2) -> dict[str, int]:
    """Bytes of the weights by part, ``itemsize`` bytes each (2 = bfloat16): what decoding one token must read.

    The embedding is read in one row only; it is listed with its full size, which is what it occupies.
    """
    return {part: number * itemsize for part, number in parameters(shape).items()}
