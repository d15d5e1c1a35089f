"""One recurrent layer in each library, with the same weights: its forward pass and its training step.

A layer reads x [batch, steps, features] from a zero state; its loss is the sum of squares of its
last output. A training step makes the gradients of all weights (not of x) and takes a very small
part of them off the weights; a forward pass adds as small a part of its loss to them. So each
repetition depends on the one before it, and a compiler can move nothing out of the loop.

The JAX libraries run many repetitions in one dispatch, as training does: XLA maps its buffers anew
at every dispatch, which costs more than a short step. PyTorch repeats in Python.

Haiku's GRU lets the reset gate act before the recurrent product, a cell with the same number of
products; the others are all the reset-after GRU.

Libraries are imported when a layer of theirs is built; `build` says which are missing.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from seqmnist_jax import rnn

Array = jax.Array
Params = dict[str, Array]
# (weights, x) -> the last output [batch, hidden]
Apply = Callable[[Any, Array], Array]

CELLS = {"gru": rnn.GRU, "lstm": rnn.LSTM}
KINDS = ("forward", "step")
# The part of a gradient (or a loss) that goes into the weights between repetitions.
FEEDBACK = 1e-9


class Unavailable(Exception):
    """A library can't do what is asked here."""


class Case(NamedTuple):
    """A layer's kind and sizes; several `replicas` have weights and inputs of their own."""

    cell: str
    hidden: int
    features: int
    steps: int
    batch: int
    replicas: int = 1


class Measurable(NamedTuple):
    """A program to be timed, and the bytes of its temporary buffers where they are known."""

    run: timing.Program
    temp_bytes: int | None


class Layer(Protocol):
    """A layer of some library, with weights and input."""

    def loss(self) -> float:
        """The sum of squares of the last output."""

    def measurable(self, kind: str) -> Measurable:
        """The program of the forward pass or of the training step."""


def draw(case: Case, replica: int = 0) -> tuple[Params, Array]:
    """Weights and x; time scales up to the sequence's length, so that gradients live, and no bias is zero."""
    init_key, bias_key, x_key = jax.random.split(jax.random.key(replica), 3)
    scales = "log_uniform", case.steps
    params = CELLS[case.cell].init(init_key, case.features, case.hidden, time_scales=scales)
    for index, name in enumerate(name for name in sorted(params) if name.endswith("bias")):
        params[name] += 0.1 * jax.random.normal(jax.random.fold_in(bias_key, index), params[name].shape)
    return params, jax.random.uniform(x_key, (case.batch, case.steps, case.features))


# The JAX libraries: each builder takes a case and our weights, and gives an apply function and its own weights.


def ours(case: Case, params: Params, *, remat: bool = False, **options: Any) -> tuple[Apply, Any]:
    """This repository's layer; `options` are its backend, its precision and so on."""
    layer = CELLS[case.cell].layer
    if remat:
        layer = rnn.remat(layer, math.isqrt(case.steps))
    return lambda weights, x: layer(weights, x, return_sequences=False, **options)[1], params


def _gates(array: Array, names: str) -> dict[str, Array]:
    """The blocks of an array that holds gates side by side."""
    return dict(zip(names, jnp.split(array, len(names), axis=-1), strict=True))


def flax(case: Case, params: Params) -> tuple[Apply, Any]:
    """Flax linen's nn.RNN."""
    import flax.linen as nn

    is_lstm = case.cell == "lstm"
    layer = nn.RNN(nn.OptimizedLSTMCell(case.hidden) if is_lstm else nn.GRUCell(case.hidden), return_carry=True)

    def apply(weights: Any, x: Array) -> Any:
        carry, _ = layer.apply({"params": {"cell": weights}}, x)
        return carry[1] if is_lstm else carry

    return apply, jax.tree.map(jnp.asarray, rnn.to_flax(params))


def keras(case: Case, params: Params) -> tuple[Apply, Any]:
    """Keras 3 on JAX."""
    import os

    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        raise Unavailable(f"Keras runs on {keras.backend.backend()} here, not on JAX")
    layer = keras.layers.LSTM(case.hidden) if case.cell == "lstm" else keras.layers.GRU(case.hidden, reset_after=True)
    layer.build((case.batch, case.steps, case.features))

    weights = [jnp.asarray(weight) for weight in rnn.to_keras(params)]
    fixed = [variable.value for variable in layer.non_trainable_variables]
    return lambda weights, x: layer.stateless_call(weights, fixed, x)[0], weights


def haiku(case: Case, params: Params) -> tuple[Apply, Any]:
    """Haiku's cells in hk.dynamic_unroll. The GRU's reset gate acts before the product."""
    import haiku as hk

    is_lstm = case.cell == "lstm"

    def last(x: Array) -> Array:
        core = hk.LSTM(case.hidden) if is_lstm else hk.GRU(case.hidden)
        _, state = hk.dynamic_unroll(core, x, core.initial_state(x.shape[0]), time_major=False)
        return state.hidden if is_lstm else state

    def reordered(array: Array) -> Array:
        """Haiku's gates are i, g, f, o, and z, r, a; its z is one minus ours."""
        blocks = _gates(array, "ifgo" if is_lstm else "rzn")
        order = [blocks[name] for name in "igfo"] if is_lstm else [-blocks["z"], blocks["r"], blocks["n"]]
        return jnp.concatenate(order, axis=-1)

    kernel, recurrent = reordered(params["kernel"]), reordered(params["recurrent_kernel"])
    if is_lstm:
        # Haiku adds one to the forget gate's bias.
        bias = params["bias"].at[case.hidden : 2 * case.hidden].add(-1.0)
        weights = {"lstm/linear": {"w": jnp.concatenate([kernel, recurrent]), "b": reordered(bias)}}
    else:
        bias = reordered(params["bias"] + params["recurrent_bias"])
        weights = {"gru": {"w_i": kernel, "w_h": recurrent, "b": bias}}
    return hk.without_apply_rng(hk.transform(last)).apply, weights


def equinox(case: Case, params: Params) -> tuple[Apply, Any]:
    """Equinox's cells in lax.scan, one sequence at a time under vmap."""
    import equinox as eqx

    is_lstm = case.cell == "lstm"
    cell: Any = (eqx.nn.LSTMCell if is_lstm else eqx.nn.GRUCell)(case.features, case.hidden, key=jax.random.key(0))
    values = {"weight_ih": params["kernel"].T, "weight_hh": params["recurrent_kernel"].T, "bias": params["bias"]}
    if not is_lstm:
        first, second = params["recurrent_bias"][: 2 * case.hidden], params["recurrent_bias"][2 * case.hidden :]
        values |= {"bias": params["bias"].at[: 2 * case.hidden].add(first), "bias_n": second}
    cell = eqx.tree_at(lambda cell: [getattr(cell, name) for name in values], cell, list(values.values()))

    def apply(cell: Any, x: Array) -> Array:
        zeros = jnp.zeros(case.hidden)
        start = (zeros, zeros) if is_lstm else zeros

        def one(sequence: Array) -> Any:
            state, _ = jax.lax.scan(lambda state, x_t: (cell(x_t, state), None), start, sequence)
            return state[0] if is_lstm else state

        return jax.vmap(one)(x)

    return apply, cell


class JaxLayer:
    """A layer of a JAX library; its replicas run under vmap."""

    def __init__(self, builder: Callable[[Case, Params], tuple[Apply, Any]], case: Case):
        drawn = [draw(case, replica) for replica in range(case.replicas)]
        built = [builder(case, params) for params, _ in drawn]
        apply, self._weights, self._x = built[0][0], built[0][1], drawn[0][1]
        if case.replicas > 1:
            apply = jax.vmap(apply)
            self._weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weights for _, weights in built))
            self._x = jnp.stack([x for _, x in drawn])

        def loss(weights: Any, x: Array) -> Array:
            return jnp.sum(jnp.square(apply(weights, x).astype(jnp.float32)))

        jax.eval_shape(loss, self._weights, self._x)  # a backend that can't be had says so here
        self._loss = loss

    def loss(self) -> float:
        """The sum of squares of the last output."""
        return float(jax.jit(self._loss)(self._weights, self._x))

    def _once(self, kind: str, weights: Any, x: Array) -> Any:
        """The weights after one repetition."""
        if kind == "forward":
            value = FEEDBACK * self._loss(weights, x)
            return jax.tree.map(lambda weight: weight + value, weights)
        gradients = jax.grad(self._loss)(weights, x)
        return jax.tree.map(lambda weight, gradient: weight - FEEDBACK * gradient, weights, gradients)

    def measurable(self, kind: str) -> Measurable:
        """The compiled program, all repetitions in one dispatch."""

        @jax.jit
        def many(weights: Any, x: Array, count: Array) -> Any:
            return jax.lax.fori_loop(0, count, lambda _, weights: self._once(kind, weights, x), weights)

        weights, x = self._weights, self._x
        program = many.lower(weights, x, jnp.int32(1)).compile()
        analysis = program.memory_analysis()
        return Measurable(
            lambda count: jax.block_until_ready(program(weights, x, np.int32(count))),
            None if analysis is None else int(analysis.temp_size_in_bytes),
        )


# Our names of weights, and PyTorch's, which are transposed.
TORCH_NAMES = {
    "kernel": "weight_ih_l0",
    "recurrent_kernel": "weight_hh_l0",
    "bias": "bias_ih_l0",
    "recurrent_bias": "bias_hh_l0",
}


def torch_layer(cell: str, params: Any, *, batch_first: bool = True) -> tuple[Any, dict[str, Any]]:
    """PyTorch's layer on the CPU with our weights, and its tensors by our names.

    The second bias of its LSTM, which ours does not have, is zero and has no gradient.
    """
    import torch

    torch.set_num_threads(timing.cores())
    features, hidden = params["kernel"].shape[0], params["recurrent_kernel"].shape[0]
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](features, hidden, batch_first=batch_first)
    tensors = {ours: getattr(module, theirs) for ours, theirs in TORCH_NAMES.items() if ours in params}
    with torch.no_grad():
        for ours, tensor in tensors.items():
            tensor.copy_(torch.tensor(np.asarray(params[ours]).T))
        if "recurrent_bias" not in params:
            module.bias_hh_l0.zero_()
            module.bias_hh_l0.requires_grad_(False)
    return module, tensors


def need_cpu() -> None:
    """PyTorch trains on the CPU, which is compared with JAX there alone (on a GPU: `benchmarks.gpu_layers`).

    Raises:
      Unavailable: JAX runs elsewhere.
    """
    if jax.default_backend() != "cpu":
        raise Unavailable("PyTorch is measured on CPUs only")


class TorchLayer:
    """PyTorch's nn.LSTM or nn.GRU, on all cores that the process may use."""

    def __init__(self, case: Case):
        import torch

        need_cpu()
        if case.replicas > 1:
            raise Unavailable("PyTorch's layers have no replicas")
        params, x = draw(case)
        self._x = torch.tensor(np.asarray(x))
        self._module, tensors = torch_layer(case.cell, params)
        self._weights = list(tensors.values())

    def _loss(self) -> Any:
        # The final state, because the way back from the outputs' last step is a little slower.
        _, state = self._module(self._x)
        return (state[0] if isinstance(state, tuple) else state).square().sum()

    def loss(self) -> float:
        """The sum of squares of the last output."""
        return self._loss().item()

    def measurable(self, kind: str) -> Measurable:
        """The program, a loop in Python."""
        import torch

        def forward() -> None:
            with torch.no_grad():
                value = FEEDBACK * self._loss()
                torch._foreach_add_(self._weights, value.item())

        def step() -> None:
            gradients = torch.autograd.grad(self._loss(), self._weights)
            with torch.no_grad():
                torch._foreach_add_(self._weights, gradients, alpha=-FEEDBACK)

        return Measurable(timing.repeated({"forward": forward, "step": step}[kind]), None)


def _jax(builder: Callable[..., tuple[Apply, Any]], **options: Any) -> Callable[[Case], Layer]:
    return functools.partial(JaxLayer, functools.partial(builder, **options))


# What can be measured: name -> builder.
LIBRARIES: dict[str, Callable[[Case], Layer]] = {
    "ours": _jax(ours, backend="auto", precision="float32"),
    "ours_bfloat16": _jax(ours, backend="auto", precision="bfloat16"),
    "ours_scan": _jax(ours, backend="scan", precision="float32"),
    "ours_fused": _jax(ours, backend="fused", precision="float32"),
    "ours_remat": _jax(ours, backend="auto", precision="float32", remat=True),
    "ours_native": _jax(ours, backend="native", precision="float32"),
    "torch": TorchLayer,
    "flax": _jax(flax),
    "keras": _jax(keras),
    "haiku": _jax(haiku),
    "equinox": _jax(equinox),
}


def build(library: str, case: Case, say: timing.Say = print) -> Layer | None:
    """A library's layer; None, and a reason said, where it can't be had."""
    try:
        return LIBRARIES[library](case)
    except (ImportError, Unavailable, ValueError) as error:
        say(f"  {library} left out: {error}")
        return None


def _reset_before(case: Case, params: Params, **options: Any) -> tuple[Apply, Any]:
    """Our GRU whose reset gate acts before the product; its one bias is the sum of the other's two."""
    folded = {name: params[name] for name in ("kernel", "recurrent_kernel")}
    folded["bias"] = params["bias"] + params["recurrent_bias"]
    return ours(case, folded, reset_after=False, **options)


def disagreement(library: str, case: Case) -> float:
    """How far a library's loss is from that of our plain scan, relative to it."""
    # Haiku's GRU is compared with the cell that it is.
    reference = _reset_before if (library, case.cell) == ("haiku", "gru") else ours
    expected = JaxLayer(functools.partial(reference, backend="scan"), case).loss()
    return abs(LIBRARIES[library](case).loss() - expected) / expected
