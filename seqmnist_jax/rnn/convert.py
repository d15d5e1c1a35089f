"""Weights of one LSTM or GRU layer, to and from PyTorch, Keras 3 and Flax linen.

Plain functions on arrays: none of these libraries is imported. Every pair computes the same
function of x and carry in both libraries, where those keep their default activations (sigmoid
for gates, tanh for the rest):

| | LSTM gates | GRU gates | kernels | biases |
| --- | --- | --- | --- | --- |
| here | i, f, g, o | r, z, n | [features, gates * hidden] | LSTM one, GRU two |
| PyTorch 2.13 | i, f, g, o | r, z, n | transposed | two |
| Keras 3.15 | i, f, c, o | z, r, h | as here | LSTM one, GRU two in one array |
| Flax 0.12 | ii, if, ig, io | ir, iz, in | one for each gate | LSTM one, GRU one and that of hn |

All four let the GRU's z keep the past, h' = (1 - z) n + z h, and none adds a forget bias at run
time: it stands in the bias. Where biases only ever act as a sum and the other library stores
another number of them, the sum is kept but not how it was shared out, so a round trip may move
numbers between them.

GRU parameters without `recurrent_bias` are those of a GRU whose reset gate acts before the
product with h, as in Cho et al. 2014; only Keras (``reset_after=False``) has it too.

The functions copy, so later changes of the source do not show in the result. They keep dtypes;
but JAX itself makes float64 into float32 unless ``jax_enable_x64`` is set.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from seqmnist_jax.rnn.cells import Params

# One letter a gate, in the order of our kernels; their number tells the cells apart.
_LSTM = "ifgo"
_GRU = "rzn"
_KERAS_ORDER = {_LSTM: "ifgo", _GRU: "zrn"}
# Flax joins the input's (i) or the state's (h) letter to ours; these of its maps have a bias.
_FLAX_BIASED = {_LSTM: {"hi", "hf", "hg", "ho"}, _GRU: {"ir", "iz", "in", "hn"}}


class _Layer(NamedTuple):
    """A layer in our layout; an LSTM's recurrent_bias adds to its bias, a reset-before GRU has none."""

    gates: str
    kernel: np.ndarray
    recurrent_kernel: np.ndarray
    bias: np.ndarray
    recurrent_bias: np.ndarray | None


def _array(value: Any) -> np.ndarray:
    """A private copy, also of a PyTorch tensor that is on a device or needs a gradient."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value).copy()


def _check_names(where: str, found: Set[str], expected: Set[str]) -> None:
    faults = {"lacks": expected - found, "has unexpected": found - expected}
    text = " and ".join(f"{fault} {sorted(names)}" for fault, names in faults.items() if names)
    if text:
        raise ValueError(f"{where} {text}; expected {sorted(expected)}")


def _check_shape(
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


def _find_gates(name: str, array: np.ndarray, *, transposed: bool = False) -> str:
    """The gates of a recurrent kernel, by the ratio of its two sizes."""
    shape = array.shape[::-1] if transposed else array.shape
    for gates in (_LSTM, _GRU):
        if len(shape) == 2 and shape[1] == len(gates) * shape[0] > 0:
            return gates
    form = "[gates * hidden, hidden]" if transposed else "[hidden, gates * hidden]"
    raise ValueError(f"{name} has shape {array.shape}; expected {form} with 4 gates (LSTM) or 3 (GRU)")


def _split(array: np.ndarray, gates: str) -> dict[str, np.ndarray]:
    """The gates' blocks, which stand side by side in the last axis."""
    return {gate: block.copy() for gate, block in zip(gates, np.split(array, len(gates), axis=-1), strict=True)}


def _reorder(array: np.ndarray, source: str, target: str) -> np.ndarray:
    """Puts the gates' blocks from one order into another."""
    blocks = _split(array, source)
    return np.concatenate([blocks[gate] for gate in target], axis=-1)


def _to_params(layer: _Layer) -> Params:
    arrays = {"kernel": layer.kernel, "recurrent_kernel": layer.recurrent_kernel, "bias": layer.bias}
    if layer.recurrent_bias is not None:
        if layer.gates == _LSTM:
            arrays["bias"] = layer.bias + layer.recurrent_bias
        else:
            arrays["recurrent_bias"] = layer.recurrent_bias
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def _from_params(params: Mapping[str, Any]) -> _Layer:
    names = {"kernel", "recurrent_kernel", "bias"}
    _check_names("params", params.keys() - {"recurrent_bias"}, names)
    arrays = {name: _array(value) for name, value in params.items()}
    gates = _find_gates("params['recurrent_kernel']", arrays["recurrent_kernel"])
    if gates == _LSTM:
        _check_names("params of an LSTM", params.keys(), names)
    columns = arrays["recurrent_kernel"].shape[1]
    _check_shape("params['kernel']", arrays["kernel"], ("features", columns))
    for name in ("bias", "recurrent_bias"):
        if name in arrays:
            _check_shape(f"params[{name!r}]", arrays[name], (columns,))
    if gates == _LSTM:
        arrays["recurrent_bias"] = np.zeros_like(arrays["bias"])
    return _Layer(gates, arrays["kernel"], arrays["recurrent_kernel"], arrays["bias"], arrays.get("recurrent_bias"))


def _recurrent_bias(layer: _Layer, library: str) -> np.ndarray:
    if layer.recurrent_bias is None:
        raise ValueError(
            "params lacks 'recurrent_bias': a GRU whose reset gate acts before the product with h; "
            f"expected a reset-after one, as {library} has no other"
        )
    return layer.recurrent_bias


def _torch_names(layer: int, reverse: bool) -> tuple[str, ...]:
    """The names of kernel, recurrent kernel, bias and recurrent bias."""
    if layer < 0:
        raise ValueError(f"layer is {layer}; expected at least 0")
    ending = f"_l{layer}" + ("_reverse" if reverse else "")
    return tuple(name + ending for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))


def from_torch(weights: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> Params:
    """Parameters from a PyTorch `nn.LSTM` or `nn.GRU` (checked with 2.13).

    PyTorch's gates stand in our order, its kernels are transposed. Its LSTM has two biases,
    whose sum becomes ours; its GRU's two are ours. A module with ``bias=False`` gives zeros.

    Args:
      weights: the module's `state_dict()`, of tensors or arrays of a dtype that NumPy has: weight_ih_l0
        [gates * hidden, features], weight_hh_l0 [gates * hidden, hidden], bias_ih_l0 and
        bias_hh_l0 [gates * hidden], and so on. Other layers' entries play no part.
      layer: which of a stack's layers.
      reverse: take the layer's backward half, the names ending in _reverse.

    Returns:
      Parameters as `init_lstm` or `init_gru` makes them, by the ratio of weight_hh's sizes.

    Raises:
      ValueError: an entry of the layer is missing, unexpected (weight_hr, of an LSTM with
        projections) or of the wrong shape.
    """
    names = _torch_names(layer, reverse)
    found = {name for name in weights if name.endswith(names[0].removeprefix("weight_ih"))}
    has_bias = bool(found & set(names[2:]))
    _check_names("weights", found, set(names if has_bias else names[:2]))
    kernel, recurrent_kernel, *biases = (_array(weights[name]) for name in names if name in found)
    gates = _find_gates(names[1], recurrent_kernel, transposed=True)
    rows = recurrent_kernel.shape[0]
    _check_shape(names[0], kernel, (rows, "features"))
    biases = biases or [np.zeros(rows, kernel.dtype)] * 2
    for name, bias in zip(names[2:], biases, strict=True):
        _check_shape(name, bias, (rows,))
    return _to_params(_Layer(gates, kernel.T, recurrent_kernel.T, *biases))


def to_torch(params: Mapping[str, Any], *, layer: int = 0, reverse: bool = False) -> dict[str, np.ndarray]:
    """Entries of a PyTorch `nn.LSTM`'s or `nn.GRU`'s `state_dict()` (checked with 2.13).

    An LSTM's bias goes into bias_ih, and bias_hh is zero.

    Args:
      params: as `init_lstm` or `init_gru` makes them.
      layer, reverse: whose names to give, as in `from_torch`.

    Returns:
      weight_ih_l0 [gates * hidden, features], weight_hh_l0 [gates * hidden, hidden],
      bias_ih_l0 and bias_hh_l0 [gates * hidden], with the layer's own endings, as NumPy arrays.

    Raises:
      ValueError: an entry is missing, unexpected or of the wrong shape, or these are a
        reset-before GRU's, which PyTorch has not.
    """
    ours = _from_params(params)
    arrays = (ours.kernel.T, ours.recurrent_kernel.T, ours.bias, _recurrent_bias(ours, "PyTorch"))
    names = _torch_names(layer, reverse)
    return {name: np.ascontiguousarray(array) for name, array in zip(names, arrays, strict=True)}


def from_keras(weights: Sequence[Any], *, reset_after: bool | None = None) -> Params:
    """Parameters from a Keras 3 `LSTM` or `GRU` layer (checked with 3.15).

    Keras orders an LSTM's gates i, f, c, o, as we do, and a GRU's z, r, h. A GRU's bias is
    [2, 3 * hidden], the input's and the state's, with ``reset_after=True`` (the default) and
    [3 * hidden] with ``reset_after=False``. A layer with ``use_bias=False`` gives zeros.

    Args:
      weights: the layer's `get_weights()`: kernel [features, gates * hidden], recurrent_kernel
        [hidden, gates * hidden] and, unless ``use_bias=False``, bias. For `Bidirectional`
        give each half of the list alone.
      reset_after: the GRU's; None for what the bias's shape says or, without a bias, True.

    Returns:
      Parameters as `init_lstm` or `init_gru` makes them, by the ratio of recurrent_kernel's
      sizes; for a reset-before GRU without `recurrent_bias`.

    Raises:
      ValueError: there are not two or three arrays, one has the wrong shape, or the bias
        contradicts `reset_after`.
    """
    if len(weights) not in (2, 3):
        raise ValueError(f"weights has {len(weights)} arrays; expected kernel, recurrent_kernel and perhaps bias")
    kernel, recurrent_kernel, *biases = (_array(value) for value in weights)
    gates = _find_gates("recurrent_kernel", recurrent_kernel)
    columns = recurrent_kernel.shape[1]
    _check_shape("kernel", kernel, ("features", columns))
    if reset_after is None:
        reset_after = not biases or biases[0].ndim == 2
    shape = (2, columns) if gates == _GRU and reset_after else (columns,)
    bias = biases[0] if biases else np.zeros(shape, kernel.dtype)
    _check_shape("bias", bias, shape)
    kernel, recurrent_kernel, bias = (_reorder(a, _KERAS_ORDER[gates], gates) for a in (kernel, recurrent_kernel, bias))
    bias, recurrent_bias = bias if len(shape) == 2 else (bias, None)
    return _to_params(_Layer(gates, kernel, recurrent_kernel, bias, recurrent_bias))


def to_keras(params: Mapping[str, Any]) -> list[np.ndarray]:
    """What a Keras 3 `LSTM`'s or `GRU`'s `set_weights` takes (checked with 3.15).

    Args:
      params: as `init_lstm` or `init_gru` makes them. A GRU's without `recurrent_bias` are
        for a layer with ``reset_after=False``.

    Returns:
      [kernel, recurrent_kernel, bias] in the shapes and gate order of `from_keras`, as NumPy arrays.

    Raises:
      ValueError: an entry is missing, unexpected or of the wrong shape.
    """
    gates, kernel, recurrent_kernel, bias, recurrent_bias = _from_params(params)
    if gates == _GRU and recurrent_bias is not None:
        bias = np.stack([bias, recurrent_bias])
    return [_reorder(array, gates, _KERAS_ORDER[gates]) for array in (kernel, recurrent_kernel, bias)]


def _flax_entries(gates: str) -> dict[str, set[str]]:
    """What each of the cell's maps holds."""
    biased = _FLAX_BIASED[gates]
    names = [side + gate for side in "ih" for gate in gates]
    return {name: {"kernel", "bias"} if name in biased else {"kernel"} for name in names}


def from_flax(params: Mapping[str, Any]) -> Params:
    """Parameters from a Flax linen `LSTMCell`, `OptimizedLSTMCell` or `GRUCell` (checked with 0.12).

    Flax has one map for each gate, its kernel not transposed. In the LSTM the state's maps
    have biases, the input's none. In the GRU (reset-after) the input's maps have, and of the
    state's only hn; our recurrent_bias is zero for r and z.

    Args:
      params: the cell's own dict, ``variables['params']``, or with `nn.RNN`
        ``variables['params']['cell']``: for an LSTM ii, if, ig, io and hi, hf, hg, ho, for a
        GRU ir, iz, in and hr, hz, hn, each a dict with kernel [features or hidden, hidden]
        and, where there is one, bias [hidden].

    Returns:
      Parameters as `init_lstm` or `init_gru` makes them, by the names.

    Raises:
      ValueError: an entry is missing, unexpected or of the wrong shape.
    """
    # The closer cell, so that the error names what little is wrong.
    gates = max((_LSTM, _GRU), key=lambda gates: len(_flax_entries(gates).keys() & params.keys()))
    entries = _flax_entries(gates)
    _check_names("params", params.keys(), entries.keys())
    sizes: dict[int | str, int] = {}
    arrays: dict[tuple[str, str], np.ndarray] = {}
    for name, kinds in entries.items():
        found = params[name].keys() if isinstance(params[name], Mapping) else set()
        _check_names(f"params[{name!r}]", found, kinds)
        for kind in sorted(kinds):
            arrays[name, kind] = _array(params[name][kind])
            shape = ("features" if name[0] == "i" else "hidden", "hidden") if kind == "kernel" else ("hidden",)
            _check_shape(f"params[{name!r}][{kind!r}]", arrays[name, kind], shape, sizes)
    no_bias = np.zeros(sizes["hidden"], arrays["h" + gates[0], "kernel"].dtype)

    def join(side: str, kind: str) -> np.ndarray:
        return np.concatenate([arrays.get((side + gate, kind), no_bias) for gate in gates], axis=-1)

    return _to_params(_Layer(gates, *(join(side, kind) for kind in ("kernel", "bias") for side in "ih")))


def to_flax(params: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """The dict of a Flax linen `LSTMCell`, `OptimizedLSTMCell` or `GRUCell` (checked with 0.12).

    Flax's GRU has one bias each for r and z, which becomes the sum of our two.

    Args:
      params: as `init_lstm` or `init_gru` makes them.

    Returns:
      The cell's own dict as in `from_flax`, of NumPy arrays; ``{'params': ...}`` around it
      makes the cell's variables.

    Raises:
      ValueError: an entry is missing, unexpected or of the wrong shape, or these are a
        reset-before GRU's, which Flax has not.
    """
    ours = _from_params(params)
    gates, recurrent_bias = ours.gates, _recurrent_bias(ours, "Flax")
    kernels = {"i": _split(ours.kernel, gates), "h": _split(ours.recurrent_kernel, gates)}
    biases = {"i": _split(ours.bias, gates), "h": _split(recurrent_bias, gates)}
    sums = _split(ours.bias + recurrent_bias, gates)
    flax: dict[str, dict[str, np.ndarray]] = {}
    for name, kinds in _flax_entries(gates).items():
        side, gate = name[0], name[1]
        flax[name] = {"kernel": kernels[side][gate]}
        if "bias" in kinds:
            # Where only one of the two maps has a bias, it stands for both.
            both = {"i" + gate, "h" + gate} <= _FLAX_BIASED[gates]
            flax[name]["bias"] = biases[side][gate] if both else sums[gate]
    return flax
