"""The kernel's two calls, in the form that every backend has (see `fused`)."""

from typing import Any

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import cells
from seqmnist_jax.rnn.native import build
from seqmnist_jax.rnn.spec import Inputs, Layer, Saved

Array = jax.Array


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _nothing(*shape: int) -> Array:
    """An empty array: what is not given keeps its place."""
    return jnp.zeros(shape, jnp.float32)


def _call(name: str, layer: Layer, results: tuple[jax.ShapeDtypeStruct, ...], arguments: tuple[Array, ...]) -> Any:
    build.load()
    # 'expand_dims': axes that vmap adds arrive in front, of size 1 where an array has none. To
    # the kernel they are replicas.
    call = jax.ffi.ffi_call(name, results, vmap_method="expand_dims")
    return call(
        *arguments,
        lstm=layer.cell == "lstm",
        reverse=layer.reverse,
        bfloat16=layer.precision == "bfloat16",
    )


def _sizes(given: Inputs) -> tuple[int, int, int, int]:
    """Batch, time, features and hidden."""
    batch, time, features = given.x.shape
    return batch, time, features, given.params["recurrent_kernel"].shape[0]


def _operands(layer: Layer, given: Inputs, *others: Array) -> tuple[Array, ...]:
    """The arrays in the kernel's order: the layer's, then others, the lengths last."""
    batch, time, _, hidden = _sizes(given)
    params, x, carry, lengths = given
    c, h = carry if layer.cell == "lstm" else (_nothing(0, hidden), carry)
    biases = params["bias"], params.get("recurrent_bias", _nothing(0))
    if lengths is None:
        lengths = jnp.full((batch,), time, jnp.int32)
    return x, params["kernel"], params["recurrent_kernel"], *biases, h, c, *others, lengths


def forward(layer: Layer, save: bool, given: Inputs) -> tuple[Any, Array | None, Saved | None]:
    """As `fused.forward`."""
    batch, time, _, hidden = _sizes(given)
    is_lstm = layer.cell == "lstm"
    h, c, outputs, gates, memories = _call(
        build.FORWARD,
        layer,
        (
            _floats(batch, hidden),
            _floats(batch if is_lstm else 0, hidden),
            _floats(batch, time if save or layer.return_sequences else 0, hidden),
            _floats(time if save and layer.save_gates else 0, batch, 4 * hidden),
            _floats(time if save and is_lstm else 0, batch, hidden),
        ),
        _operands(layer, given),
    )
    end = (c, h) if is_lstm else h
    return end, outputs if layer.return_sequences else None, Saved(outputs, gates, memories) if save else None


def backward(
    layer: Layer, wants_dx: bool, given: Inputs, saved: Saved, d_carry: Any, d_outputs: Array | None
) -> tuple[cells.Params, Array | None, Any]:
    """As `fused.backward`."""
    batch, time, features, hidden = _sizes(given)
    columns = given.params["recurrent_kernel"].shape[1]
    is_lstm = layer.cell == "lstm"
    d_c, d_h = d_carry if is_lstm else (_nothing(0, hidden), d_carry)
    dh0, dc0, dx, kernel, recurrent_kernel, bias, recurrent_bias = _call(
        build.BACKWARD,
        layer,
        (
            _floats(batch, hidden),
            _floats(batch if is_lstm else 0, hidden),
            _floats(batch if wants_dx else 0, time, features),
            _floats(features, columns),
            _floats(hidden, columns),
            _floats(columns),
            _floats(0 if is_lstm else columns),
        ),
        _operands(layer, given, *saved, d_h, d_c, _nothing(batch, 0, hidden) if d_outputs is None else d_outputs),
    )
    gradients = {"kernel": kernel, "recurrent_kernel": recurrent_kernel, "bias": bias}
    if not is_lstm:
        gradients["recurrent_bias"] = recurrent_bias
    return gradients, dx if wants_dx else None, (dc0, dh0) if is_lstm else dh0
