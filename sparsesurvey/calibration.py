"""Calibration: what each linear layer of a model saw, gathered by hooks while the whole model runs.

``calibrate`` is one pass. ``layer_by_layer`` lets later layers see
what pruned earlier ones give: it runs the model up to the decoder block in question, and the blocks before it, which are
done, only return what they returned last time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsesurvey.forwards import BlockGradients, Gradients, LossGradients, Replay, block_list, last_block, places_of, ready, run
from sparsesurvey.linear import MLP, linear_layers
from sparsesurvey.structure import check_int, describe

WANT = ("square", "gram", "entropy", "output_square", "gradient")
LEAST = 64  # tokens; a gram needs as many as the layer has inputs
SAMPLE = 4096  # tokens of which a channel's histogram is made, at most
BINS = 64
INTO = "down_proj"  # what gate_proj and up_proj feed


@dataclass
class Inputs:
    """What one linear layer saw, summed over tokens. Tensors may be shared by layers that are handed the same input.

    ``square`` [in], sum of x squared. ``gram`` [in, in], the sum X^T X. ``entropy`` [in], nats, of each channel's
    histogram. ``output_square`` [out], for gate_proj and up_proj: the sum of squares of what their output neurons become,
    the input of down_proj. ``gradient`` [out, in], root mean square over sequences of the gradient of the decoder block's
    output norm. What was not wanted is None.
    """

    tokens: int
    square: Tensor
    gram: Tensor | None = None
    entropy: Tensor | None = None
    output_square: Tensor | None = None
    gradient: Tensor | None = None
    sequences: int = 1

    def norms(self) -> Tensor:
        """``[in]``, the L2 norm of each input channel over all tokens."""
        return self.square.sqrt()

    def output_norms(self) -> Tensor:
        """``[out]``, the L2 norm of what each output neuron becomes; ValueError where that is not known."""
        if self.output_square is None:
            raise ValueError("inputs.output_square must be known: calibrate with want=('output_square',), for gate_proj and up_proj")
        return self.output_square.sqrt()


def inputs_of(x: Tensor, want: Sequence[str] = ("square",), dtype: torch.dtype = torch.float32) -> Inputs:
    """The ``Inputs`` of activations ``[tokens, in]`` at hand, without a model; square, gram and entropy can be wanted.

    >>> inputs_of(torch.tensor([[3.0, 0.0], [4.0, 1.0]])).norms()
    tensor([5., 1.])
    """
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point() or not x.isfinite().all():
        raise ValueError(f"x must be finite activations [tokens, in], got {describe(x)}")
    want = _check_want(want)
    if {"output_square", "gradient"} & set(want):
        raise ValueError("want may be square, gram and entropy of activations alone; calibrate a model for the others")
    sums = _Sums(x.shape[1], want, dtype, len(x), x.device)
    sums.add(x)
    return sums.inputs()


def correlated_layer(seed: int = 0, size: int = 256, tokens: int = 2048, loud: float = 15.0,
                     alike: float = 0.0) -> tuple[Tensor, Tensor]:
    """A made-up layer: Gaussian weight ``[size, size]``, correlated activations ``[tokens, size]``, four channels far larger.

    These four are ``loud`` times what they were, as the inputs of large language models are described. With ``alike`` above
    0 every eight neighbours have one log-normal scale of that spread, so that groups of neighbours are all strong or all
    weak. The default has the errors that ``tests/test_sparsegpt.py`` asserts.
    """
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=draw)
    mixing = torch.randn(size, size, generator=draw) / size**0.5
    x = torch.randn(tokens, size, generator=draw) @ mixing + 0.3 * torch.randn(tokens, size, generator=draw)
    x *= (alike * torch.randn(-(-size // 8), generator=draw)).exp().repeat_interleave(8)[:size]
    x[:, torch.randperm(size, generator=draw)[:4]] *= loud
    return weight, x


def calibrate(model: nn.Module, batches: Iterable[Tensor], modules: Iterable[str] = MLP, want: Sequence[str] = ("square",),
              dtype: torch.dtype = torch.float32, dead: str = "refuse", region: str = "block", progress: bool = True) -> dict[str, Inputs]:
    """What the linear layers named in ``modules`` saw while ``model`` ran over ``batches``, by their full names.

    One pass, without autograd except for ``gradient``; the head does not run where nothing behind the last decoder block is
    asked for. The statistics of all layers are held at once: for grams of a large model take ``layer_by_layer``.

    Args:
        batches: token ids ``[sequences, tokens]`` without padding.
        modules: last parts of names, as ``gate_proj``.
        want: any of ``WANT``; the squares always come along.
        dtype: what is summed in, float32 or float64.
        dead: "refuse" an input channel that is zero on all tokens, or "keep" it with its zeros.
        region: what ``gradient`` is of: "block", the norm of what the decoder block gives, or "model", the model's loss.

    Raises:
        ValueError: no such layer; batches that are no token ids, or too few (``LEAST`` tokens; for a gram as many as the
            layer has inputs); activations that are not finite; a dead channel; no gated MLP where ``output_square`` is
            wanted, no decoder blocks where ``gradient`` is.
    """
    layers, batches = linear_layers(model, as_names(modules)), _check_batches(batches)
    _check_possible(model, layers, want, dtype, dead, batches)
    if region not in ("block", "model"):
        raise ValueError(f"region must be 'block' or 'model', got {region!r}")
    gradients = LossGradients(layers) if region == "model" and "gradient" in want else None
    watch, last = _Watch(model, layers, want, dtype, batches, gradients), last_block(model, layers)
    with ready(model), watch:
        for batch in tqdm(batches, desc="calibrate", unit="batch", disable=not progress):
            gradients.run(model, batch) if gradients else run(model, batch, last)
    return {name: watch.inputs(name, dead) for name in layers}


def layer_by_layer(model: nn.Module, batches: Iterable[Tensor], visit: Callable[[str, nn.Linear, Inputs], object],
                   modules: Iterable[str] = MLP, want: Sequence[str] = ("square",), dtype: torch.dtype = torch.float32,
                   dead: str = "refuse", step: str = "block", done: Collection[str] = (), progress: bool = True) -> None:
    """Call ``visit(name, layer, inputs)`` for every layer in order; it may change ``layer.weight`` in place.

    Later layers see what changed earlier ones give. With ``step="block"`` the layers of a decoder block are calibrated
    together and then visited, as the released Wanda, SparseGPT and DaSS do; with "layer" each one sees those before it
    in its own block changed, too. Statistics of one block (layer) are held at a time, beside one hidden state for each
    token of ``batches``. All in all each block runs twice (once more for each layer).

    Args:
        done: names that are not visited again, as after an interruption; their weights are taken as they are.
        modules, want, dtype, dead: as for ``calibrate``.

    Raises:
        ValueError: as ``calibrate``, and a model whose layers are not all in one ModuleList of decoder blocks.
    """
    layers, batches = linear_layers(model, as_names(modules)), _check_batches(batches)
    if step not in ("block", "layer"):
        raise ValueError(f"step must be 'block' or 'layer', got {step!r}")
    strange = set(done) - set(layers)
    if strange:
        raise ValueError(f"done must name layers of the model, got {', '.join(sorted(map(str, strange)))}")
    blocks = block_list(model, layers)
    places = {name: place for name, (place, _) in places_of(model, layers).items()}
    _check_possible(model, layers, want, dtype, dead, batches)  # what is wrong is wrong before anything is changed
    stages = _stages([name for name in layers if name not in done], places, step)
    replay = Replay(blocks, len(batches))
    for place, names in tqdm(stages, desc="layer by layer", unit="block" if step == "block" else "layer", disable=not progress):
        watch = _Watch(model, {name: layers[name] for name in names}, want, dtype, batches)
        with ready(model), watch, replay.up_to(place):
            for number, batch in enumerate(batches):
                replay.number = number
                run(model, batch, blocks[place])
        replay.advance(place)
        for name in names:
            visit(name, layers[name], watch.inputs(name, dead))


def as_names(modules: str | Iterable[str]) -> tuple[str, ...]:
    """One name, or several."""
    return (modules,) if isinstance(modules, str) else tuple(modules)


class _Sums:
    """Running sums over what goes into a linear layer."""

    def __init__(self, inn: int, want: Sequence[str], dtype: torch.dtype, tokens: int, device: torch.device) -> None:
        self.tokens, self.dtype, self.stride = 0, dtype, ceil(tokens / SAMPLE)
        self.square = torch.zeros(inn, dtype=dtype, device=device)
        self.gram = torch.zeros(inn, inn, dtype=dtype, device=device) if "gram" in want else None
        self.sample: list[Tensor] | None = [] if "entropy" in want else None

    def add(self, x: Tensor) -> None:
        """One more ``[tokens, in]``."""
        x = x.detach().to(self.dtype)
        self.square += x.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)
        if self.sample is not None:
            self.sample.append(x[-self.tokens % self.stride :: self.stride].float())
        self.tokens += len(x)

    def inputs(self) -> Inputs:
        entropy = None if self.sample is None else entropies(torch.cat(self.sample)).to(self.dtype)
        return Inputs(self.tokens, self.square, self.gram, entropy)


def entropies(x: Tensor, bins: int = BINS) -> Tensor:
    """Entropy in nats ``[in]`` of each channel of ``x`` ``[tokens, in]``: its histogram of equal bins from least to largest.

    A constant channel has none; an even spread has log(bins).

    >>> entropies(torch.tensor([[1.0, 7.0], [2.0, 7.0]]), bins=2)
    tensor([0.6931, 0.0000])
    """
    check_int("bins", bins, 2)
    low, high = x.aminmax(dim=0)
    width = (high - low).where(high > low, torch.ones_like(high))
    place = ((x - low) / width * bins).long().clamp_(0, bins - 1)
    counts = torch.zeros(bins, x.shape[1], dtype=torch.float32, device=x.device)
    counts.scatter_add_(0, place, torch.ones_like(x, dtype=torch.float32))
    return torch.special.entr(counts / len(x)).sum(0)


class _Watch:
    """The hooks on some layers, and what they gather. A context: the hooks are gone when it ends."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Linear], want: Sequence[str], dtype: torch.dtype,
                 batches: list[Tensor], gradients: Gradients | None = None) -> None:
        self.want, self.dtype, self.layers = tuple(want), dtype, layers
        self.total, self.sequences = sum(batch.numel() for batch in batches), sum(map(len, batches))
        self.sums: dict[str, _Sums] = {}
        self.fed: dict[str, Tensor] = {}  # by the name of a down_proj: sum of squares of its input
        self.feeds = _feeds(model, layers) if "output_square" in self.want else {}
        self.downs = {name: model.get_submodule(name) for name in self.feeds.values()}
        self.gradients = gradients or (BlockGradients(model, layers) if "gradient" in self.want else None)
        self.latest: tuple[object, _Sums] | None = None

    def __enter__(self) -> None:
        self.hooks = [layer.register_forward_pre_hook(self._see(name)) for name, layer in self.layers.items()]
        self.hooks += [down.register_forward_pre_hook(self._feed(name)) for name, down in self.downs.items()]
        self.hooks += self.gradients.hooks() if self.gradients else []

    def __exit__(self, *_: object) -> None:
        self.latest = None
        for hook in self.hooks:
            hook.remove()
        if self.gradients:
            self.gradients.close()

    def _see(self, name: str) -> Callable:
        def hook(layer: nn.Linear, args: tuple) -> None:
            x = args[0]
            if self.latest and self.latest[0] is x and self.sums.get(name, self.latest[1]) is self.latest[1]:
                self.sums[name] = self.latest[1]  # gate_proj and up_proj are handed one tensor: its sums are made once
                return
            if name not in self.sums:
                self.sums[name] = _Sums(layer.in_features, self.want, self.dtype, self.total, x.device)
            self.sums[name].add(x.reshape(-1, x.shape[-1]))
            self.latest = x, self.sums[name]

        return hook

    def _feed(self, name: str) -> Callable:
        def hook(layer: nn.Linear, args: tuple) -> None:
            square = args[0].detach().to(self.dtype).square().reshape(-1, layer.in_features).sum(0)
            self.fed[name] = self.fed[name] + square if name in self.fed else square

        return hook

    def inputs(self, name: str, dead: str) -> Inputs:
        """What was gathered for a layer; ValueError if that is unfit."""
        if name not in self.sums:
            raise ValueError(f"batches must reach every layer, none of their tokens reached {name}")
        found = self.sums[name].inputs()
        found.sequences = self.sequences
        if name in self.feeds:
            found.output_square = self.fed[self.feeds[name]]
        if self.gradients:
            found.gradient = self.gradients.rms(name, self.sequences)
        return _check_found(name, found, dead)


def _stages(names: list[str], places: dict[str, int], step: str) -> list[tuple[int, list[str]]]:
    """What is calibrated at once, in order: the place of a block and names of layers in it."""
    names = sorted(names, key=places.get)  # stable: within a block as they were
    if step == "layer":
        return [(places[name], [name]) for name in names]
    blocks = dict.fromkeys(places[name] for name in names)
    return [(place, [name for name in names if places[name] == place]) for place in blocks]


def _feeds(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, str]:
    """For each layer whose outputs become the inputs of a down_proj beside it, that one's name."""
    found = {}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        down = getattr(model.get_submodule(parent), INTO, None)
        if last != INTO and isinstance(down, nn.Linear) and down.in_features == layer.out_features:
            found[name] = f"{parent}.{INTO}" if parent else INTO
    return found


def _check_want(want: Sequence[str]) -> tuple[str, ...]:
    if isinstance(want, str) or not set(want) <= set(WANT):
        raise ValueError(f"want must be some of {', '.join(WANT)}, got {want!r}")
    return tuple(want)


def _check_batches(batches: Iterable[Tensor]) -> list[Tensor]:
    batches = list(batches)
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 2 or batch.is_floating_point() or not batch.numel():
            raise ValueError(f"batches must be token ids [sequences, tokens] without padding, got {describe(batch)}")
    if not batches:
        raise ValueError("batches must not be empty")
    return batches


def _check_possible(model: nn.Module, layers: dict[str, nn.Linear], want: Sequence[str], dtype: torch.dtype, dead: str,
                    batches: list[Tensor]) -> None:
    """Raise ValueError for what is known to fail before the model runs."""
    _check_want(want)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if dead not in ("refuse", "keep"):
        raise ValueError(f"dead must be 'refuse' or 'keep', got {dead!r}")
    if "output_square" in want and not _feeds(model, layers):
        raise ValueError(f"model must have a gated MLP for want='output_square': gate_proj and up_proj beside {INTO}")
    if "gradient" in want:
        block_list(model, layers)
    tokens = sum(batch.numel() for batch in batches)
    for name, layer in layers.items():
        least = max(LEAST, layer.in_features) if "gram" in want else LEAST
        if tokens < least:
            why = f"the gram of {name}, which has {layer.in_features} inputs" if least > LEAST else name
            raise ValueError(f"batches must hold at least {least} tokens for {why}, got {tokens}")


def _check_found(name: str, found: Inputs, dead: str) -> Inputs:
    for part in ("square", "output_square", "gradient"):
        values = getattr(found, part)
        if values is not None and not values.isfinite().all():
            raise ValueError(f"model must give finite activations: {name} saw NaN or infinity (inputs.{part})")
    zero = int((found.square == 0).sum())
    if zero and dead == "refuse":
        first = int((found.square == 0).nonzero()[0])
        raise ValueError(f"batches leave {zero} of {len(found.square)} input channels of {name} at zero, the first is {first}: "
                         "give more data, or dead='keep'")
    return found
