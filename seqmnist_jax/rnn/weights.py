"""The weights of one LSTM or GRU layer in our layout, gate by gate, and what is checked of others'."""

from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from seqmnist_jax.rnn.cells import Params

# One letter a gate, in the order of our kernels; their number tells the cells apart.
LSTM = "ifgo"
GRU = "rzn"


class Layer(NamedTuple):
    """A layer in our layout; an LSTM's recurrent_bias adds to its bias, a reset-before GRU has none."""

    gates: str
    kernel: np.ndarray
    recurrent_kernel: np.ndarray
    bias: np.ndarray
    recurrent_bias: np.ndarray | None


def private_array(value: Any) -> np.ndarray:
    """A private copy, also of a PyTorch tensor that is on a device, needs a gradient or is of bfloat16."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which NumPy takes from nobody but JAX
            return np.asarray(value.float()).astype(jnp.bfloat16)
    return np.asarray(value).copy()


def check_names(where: str, found: Set[str], expected: Set[str]) -> None:
    """Checks that the names are these and no others."""
    faults = {"lacks": expected - found, "has unexpected": found - expected}
    text = " and ".join(f"{fault} {sorted(names)}" for fault, names in faults.items() if names)
    if text:
        raise ValueError(f"{where} {text}; expected {sorted(expected)}")


def check_shape(
    name: str, array: np.ndarray, expected: tuple[int | str, ...], sizes: dict[int | str, int] | None = None
) -> None:
    """Compares shapes; a word stands for its number in `sizes`, or for any where it is new, which is then noted."""
    sizes = {} if sizes is None else sizes
    known = [sizes.get(size, size) for size in expected]
    for size, found in zip(expected, array.shape, strict=False):
        if isinstance(size, str):
            sizes.setdefault(size, found)
    if list(array.shape) != [sizes.get(size, size) for size in expected]:
        raise ValueError(f"{name} has shape {array.shape}; expected [{', '.join(map(str, known))}]")


def find_gates(name: str, array: np.ndarray, *, transposed: bool = False) -> str:
    """The gates of a recurrent kernel, by the ratio of its two sizes."""
    shape = array.shape[::-1] if transposed else array.shape
    for gates in (LSTM, GRU):
        if len(shape) == 2 and shape[1] == len(gates) * shape[0] > 0:
            return gates
    form = "[gates * hidden, hidden]" if transposed else "[hidden, gates * hidden]"
    raise ValueError(f"{name} has shape {array.shape}; expected {form} with 4 gates (LSTM) or 3 (GRU)")


def split(array: np.ndarray, gates: str) -> dict[str, np.ndarray]:
    """The gates' blocks, which stand side by side in the last axis."""
    return {gate: block.copy() for gate, block in zip(gates, np.split(array, len(gates), axis=-1), strict=True)}


def reorder(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """Puts the gates' blocks from one order into another."""
    blocks = split(array, source)
    return np.concatenate([blocks[gate] for gate in target], axis=-1)


def to_params(layer: Layer) -> Params:
    """Parameters as `init_lstm` or `init_gru` makes them."""
    arrays = {"kernel": layer.kernel, "recurrent_kernel": layer.recurrent_kernel, "bias": layer.bias}
    if layer.recurrent_bias is not None:
        if layer.gates == LSTM:
            arrays["bias"] = layer.bias + layer.recurrent_bias
        else:
            arrays["recurrent_bias"] = layer.recurrent_bias
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def from_params(params: Mapping[str, Any]) -> Layer:
    """The layer whose parameters these are, checked."""
    names = {"kernel", "recurrent_kernel", "bias"}
    check_names("params", params.keys() - {"recurrent_bias"}, names)
    arrays = {name: private_array(value) for name, value in params.items()}
    gates = find_gates("params['recurrent_kernel']", arrays["recurrent_kernel"])
    if gates == LSTM:
        check_names("params of an LSTM", params.keys(), names)
    columns = arrays["recurrent_kernel"].shape[1]
    check_shape("params['kernel']", arrays["kernel"], ("features", columns))
    for name in ("bias", "recurrent_bias"):
        if name in arrays:
            check_shape(f"params[{name!r}]", arrays[name], (columns,))
    if gates == LSTM:
        arrays["recurrent_bias"] = np.zeros_like(arrays["bias"])
    return Layer(gates, arrays["kernel"], arrays["recurrent_kernel"], arrays["bias"], arrays.get("recurrent_bias"))


def recurrent_bias_of(layer: Layer, library: str) -> np.ndarray:
    """The bias that a library needs which has no GRU without it."""
    if layer.recurrent_bias is None:
        raise ValueError(
            "params lacks 'recurrent_bias': a GRU whose reset gate acts before the product with h; "
            f"expected a reset-after one, as {library} has no other"
        )
    return layer.recurrent_bias
