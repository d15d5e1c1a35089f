"""Weights of one LSTM or GRU layer, to and from PyTorch, Keras 3 and Flax, linen and nnx.

Plain functions on arrays: none of these libraries is imported. Every pair computes the same
function of x and carry in both libraries, where those keep their default activations (sigmoid
for gates, tanh for the rest):

| | LSTM gates | GRU gates | kernels | biases |
| --- | --- | --- | --- | --- |
| here | i, f, g, o | r, z, n | [features, gates * hidden] | LSTM one, GRU two |
| PyTorch 2.13 | i, f, g, o | r, z, n | transposed | two |
| Keras 3.15 | i, f, c, o | z, r, h | as here | LSTM one, GRU two in one array |
| Flax linen 0.12 | ii, if, ig, io | ir, iz, in | one for each gate | LSTM one, GRU one and that of hn |
| Flax nnx 0.12 | i, f, g, o | r, z, n | as here, or an LSTM's one for each gate | one |

All let the GRU's z keep the past, h' = (1 - z) n + z h, and none adds a forget bias at run
time: it stands in the bias. Where biases only ever act as a sum and the other library stores
another number of them, the sum is kept but not how it was shared out, so a round trip may move
numbers between them.

GRU parameters without `recurrent_bias` are those of a GRU whose reset gate acts before the
product with h, as in Cho et al. 2014; only Keras (``reset_after=False``) has it too.

The functions copy, so later changes of the source do not show in the result. They keep dtypes;
but JAX itself makes float64 into float32 unless ``jax_enable_x64`` is set.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from seqmnist_jax.rnn.cells import Params
from seqmnist_jax.rnn.weights import (
    GRU,
    LSTM,
    Layer,
    check_names,
    check_shape,
    find_gates,
    from_params,
    private_array,
    recurrent_bias_of,
    reorder,
    split,
    to_params,
)

_KERAS_ORDER = {LSTM: "ifgo", GRU: "zrn"}
# Flax joins the input's (i) or the state's (h) letter to ours; these of its maps have a bias.
_FLAX_BIASED = {LSTM: {"hi", "hf", "hg", "ho"}, GRU: {"ir", "iz", "in", "hn"}}


_TORCH = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _torch_names(layer: int | None, reverse: bool, prefix: str) -> tuple[str, ...]:
    """The names of kernel, recurrent kernel, bias and recurrent bias."""
    if layer is not None and layer < 0:
        raise ValueError(f"layer is {layer}; expected at least 0, or None for a cell")
    if layer is None and reverse:
        raise ValueError("reverse is True; expected False for a cell, which has no direction")
    start = prefix and prefix.removesuffix(".") + "."
    ending = "" if layer is None else f"_l{layer}" + ("_reverse" if reverse else "")
    return tuple(start + name + ending for name in _TORCH)


def from_torch(weights: Any, *, layer: int | None = 0, reverse: bool = False, prefix: str = "") -> Params:
    """Parameters from a PyTorch `nn.LSTM`, `nn.GRU`, `nn.LSTMCell` or `nn.GRUCell` (checked with 2.13).

    PyTorch's gates stand in our order, its kernels are transposed. Its LSTM has two biases,
    whose sum becomes ours; its GRU's two are ours. A module with ``bias=False`` gives zeros.

    Args:
      weights: the module, or its `state_dict()`, of tensors or arrays: weight_ih_l0 [gates * hidden, features],
        weight_hh_l0 [gates * hidden, hidden], bias_ih_l0 and bias_hh_l0 [gates * hidden], and so on; a
        cell's without _l0. Other entries play no part.
      layer: which of a stack's layers; None for a cell, which 0 finds too.
      reverse: take the layer's backward half, the names ending in _reverse.
      prefix: where the layer is in a larger model, as 'encoder.lstm' in encoder.lstm.weight_ih_l0.

    Returns:
      Parameters as `init_lstm` or `init_gru` makes them, by the ratio of weight_hh's sizes.

    Raises:
      ValueError: an entry of the layer is missing, unexpected (weight_hr, of an LSTM with
        projections) or of the wrong shape; the message names the prefixes under which there are such entries.
    """
    weights = weights.state_dict() if hasattr(weights, "state_dict") else weights
    if not isinstance(weights, Mapping):
        raise ValueError(f"weights is a {type(weights).__name__}; expected a module of PyTorch or its state_dict()")
    names = _torch_names(layer, reverse, prefix)
    cell = _torch_names(None, False, prefix)
    if layer == 0 and not reverse and names[0] not in weights and cell[0] in weights:
        names = cell
    # Of this layer, whatever it is that stands there.
    start, ending = names[0].split(_TORCH[0])
    found = {name for name in weights if re.fullmatch(f"{re.escape(start)}(weight|bias)_[a-z]+{ending}", name)}
    has_bias = bool(found & set(names[2:]))
    try:
        check_names("weights", found, set(names if has_bias else names[:2]))
    except ValueError as error:
        endings = f"(?:{ending}|)" if layer == 0 else ending  # a cell's too
        elsewhere = [re.fullmatch(rf"(|.*\.){_TORCH[0]}{endings}", name) for name in weights]
        prefixes = sorted({match[1] for match in elsewhere if match} - {start})
        hint = f"; there is one at prefix={' or '.join(map(repr, prefixes))}" if prefixes else ""
        raise ValueError(f"{error}{hint}") from None
    kernel, recurrent_kernel, *biases = (private_array(weights[name]) for name in names if name in found)
    gates = find_gates(names[1], recurrent_kernel, transposed=True)
    rows = recurrent_kernel.shape[0]
    check_shape(names[0], kernel, (rows, "features"))
    biases = biases or [np.zeros(rows, kernel.dtype)] * 2
    for name, bias in zip(names[2:], biases, strict=True):
        check_shape(name, bias, (rows,))
    return to_params(Layer(gates, kernel.T, recurrent_kernel.T, *biases))


def to_torch(
    params: Mapping[str, Any], *, layer: int | None = 0, reverse: bool = False, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Entries of the `state_dict()` of what `from_torch` reads (checked with 2.13).

    An LSTM's bias goes into bias_ih, and bias_hh is zero.

    Args:
      params: as `init_lstm` or `init_gru` makes them.
      layer, reverse, prefix: whose names to give, as in `from_torch`; with None a cell's.

    Returns:
      weight_ih_l0 [gates * hidden, features], weight_hh_l0 [gates * hidden, hidden],
      bias_ih_l0 and bias_hh_l0 [gates * hidden], with the layer's own endings, as NumPy arrays.
      `torch.from_numpy` takes no bfloat16, but the same as float32.

    Raises:
      ValueError: an entry is missing, unexpected or of the wrong shape, or these are a
        reset-before GRU's, which PyTorch has not.
    """
    ours = from_params(params)
    arrays = (ours.kernel.T, ours.recurrent_kernel.T, ours.bias, recurrent_bias_of(ours, "PyTorch"))
    names = _torch_names(layer, reverse, prefix)
    return {name: np.ascontiguousarray(array) for name, array in zip(names, arrays, strict=True)}


def from_keras(weights: Sequence[Any], *, reset_after: bool | None = None) -> Params:
    """Parameters from a Keras 3 `LSTM` or `GRU` layer (checked with 3.15), or a `CuDNNLSTM` or `CuDNNGRU` of before.

    Keras orders an LSTM's gates i, f, c, o, as we do, and a GRU's z, r, h. A GRU's bias is
    [2, 3 * hidden], the input's and the state's, with ``reset_after=True`` (the default) and
    [3 * hidden] with ``reset_after=False``. A layer with ``use_bias=False`` gives zeros.

    A flat bias of [2 * gates * hidden] is that of a CuDNN layer, by which Keras 2 too knows one: the input's biases,
    then the state's. The kernels of such a layer hold each gate's numbers in cuDNN's order, [hidden, features], though
    not in that shape.

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
    if not hasattr(weights, "__len__"):
        raise ValueError(f"weights is a {type(weights).__name__}; expected what a layer's get_weights() gives")
    if len(weights) not in (2, 3):
        raise ValueError(f"weights has {len(weights)} arrays; expected kernel, recurrent_kernel and perhaps bias")
    kernel, recurrent_kernel, *biases = (private_array(value) for value in weights)
    gates = find_gates("recurrent_kernel", recurrent_kernel)
    columns = recurrent_kernel.shape[1]
    check_shape("kernel", kernel, ("features", columns))
    if biases and biases[0].shape == (2 * columns,) and reset_after is not False:
        kernel, recurrent_kernel = (
            np.concatenate([block.reshape(block.shape[::-1]).T for block in split(array, gates).values()], axis=-1)
            for array in (kernel, recurrent_kernel)
        )
        biases = [biases[0].reshape(2, columns)]
        if gates == LSTM:
            biases = [biases[0].sum(axis=0)]
    if reset_after is None:
        reset_after = not biases or biases[0].ndim == 2
    shape = (2, columns) if gates == GRU and reset_after else (columns,)
    bias = biases[0] if biases else np.zeros(shape, kernel.dtype)
    check_shape("bias", bias, shape)
    kernel, recurrent_kernel, bias = (reorder(a, _KERAS_ORDER[gates], gates) for a in (kernel, recurrent_kernel, bias))
    bias, recurrent_bias = bias if len(shape) == 2 else (bias, None)
    return to_params(Layer(gates, kernel, recurrent_kernel, bias, recurrent_bias))


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
    gates, kernel, recurrent_kernel, bias, recurrent_bias = from_params(params)
    if gates == GRU and recurrent_bias is not None:
        bias = np.stack([bias, recurrent_bias])
    return [reorder(array, gates, _KERAS_ORDER[gates]) for array in (kernel, recurrent_kernel, bias)]


def _flax_entries(gates: str) -> dict[str, set[str]]:
    """What each of the cell's maps holds."""
    biased = _FLAX_BIASED[gates]
    names = [side + gate for side in "ih" for gate in gates]
    return {name: {"kernel", "bias"} if name in biased else {"kernel"} for name in names}


def _joined_entries(gates: str) -> dict[str, set[str]]:
    """The same of a cell of nnx with one map for each side, of which one has the bias."""
    biased = {LSTM: "dense_h", GRU: "dense_i"}[gates]
    return {name: {"kernel", "bias"} if name == biased else {"kernel"} for name in ("dense_i", "dense_h")}


def _find_flax_cell(params: Any) -> tuple[str, dict[str, Any]]:
    """The cell's own maps within what a library's user has at hand, and what to call them in messages."""
    where = "params"
    while isinstance(params, Mapping):
        params = {name: value for name, value in params.items() if name != "rngs"}
        inner = {"params", "cell"} & params.keys()
        if len(params) > 1 or not inner:
            return where, params
        where, params = f"{where}[{min(inner)!r}]", params[min(inner)]
    raise ValueError(
        f"{where} is a {type(params).__name__}; expected a mapping, as variables['params'] of linen or "
        "nnx.state(cell, nnx.Param)"
    )


def _read_flax_maps(
    where: str, params: Mapping[str, Any], entries: Mapping[str, set[str]], columns: str
) -> dict[tuple[str, str], np.ndarray]:
    """The arrays by map and kind, checked; `columns` is the word for the size of their last axis."""
    check_names(where, params.keys(), entries.keys())
    sizes: dict[int | str, int] = {}
    arrays: dict[tuple[str, str], np.ndarray] = {}
    for name, kinds in entries.items():
        found = params[name].keys() if isinstance(params[name], Mapping) else set()
        check_names(f"{where}[{name!r}]", found, kinds)
        for kind in sorted(kinds):
            arrays[name, kind] = private_array(params[name][kind])
            side = name.removeprefix("dense_")[0]
            shape = ("features" if side == "i" else "hidden", columns) if kind == "kernel" else (columns,)
            check_shape(f"{where}[{name!r}][{kind!r}]", arrays[name, kind], shape, sizes)
    return arrays


def from_flax(params: Mapping[str, Any]) -> Params:
    """Parameters from a Flax `LSTMCell`, `OptimizedLSTMCell` or `GRUCell`, of linen or of nnx (checked with 0.12).

    Flax has one map for each gate, its kernel not transposed. In the LSTM the state's maps
    have biases, the input's none. In the GRU (reset-after) the input's maps have, and of the
    state's only hn; our recurrent_bias is zero for r and z. The `OptimizedLSTMCell` and `GRUCell`
    of nnx join the gates in two maps, dense_i and dense_h; that GRU has no bias of hn either, so
    our recurrent_bias is zero.

    Args:
      params: of linen ``variables['params']``, with `nn.RNN` or without, of nnx
        ``nnx.state(layer, nnx.Param)`` of the cell or of an `nnx.RNN`: for an LSTM ii, if (nnx: if_),
        ig, io and hi, hf, hg, ho, for a GRU ir, iz, in and hr, hz, hn, each a mapping with kernel
        [features or hidden, hidden] and, where there is one, bias [hidden]; or dense_i and dense_h with
        kernel [features or hidden, gates * hidden] and bias [gates * hidden].

    Returns:
      Parameters as `init_lstm` or `init_gru` makes them, by the names.

    Raises:
      ValueError: an entry is missing, unexpected or of the wrong shape.
    """
    where, params = _find_flax_cell(params)
    if params.keys() & {"dense_i", "dense_h"}:
        state_map = params.get("dense_h")
        kernel = state_map.get("kernel") if isinstance(state_map, Mapping) else None
        gates = GRU if kernel is None else find_gates(f"{where}['dense_h']['kernel']", private_array(kernel))
        arrays = _read_flax_maps(where, params, _joined_entries(gates), "gates * hidden")
        no_bias = np.zeros_like(arrays["dense_h", "kernel"][0])
        biases = (arrays.get((name, "bias"), no_bias) for name in ("dense_i", "dense_h"))
        return to_params(Layer(gates, arrays["dense_i", "kernel"], arrays["dense_h", "kernel"], *biases))
    # The closer cell, so that the error names what little is wrong.
    found = {"if" if name == "if_" else name for name in params}
    known = {gates: len(_flax_entries(gates).keys() & found) for gates in (LSTM, GRU)}
    if known[LSTM] == known[GRU]:
        expected = [sorted(_flax_entries(gates)) for gates in (LSTM, GRU)]
        raise ValueError(
            f"{where} has {sorted(params)}; expected the maps of one cell: of an LSTM {expected[0]}, of a GRU "
            f"{expected[1]}, or of a cell of nnx that joins them ['dense_h', 'dense_i']"
        )
    gates = max(known, key=known.__getitem__)
    spelled = {"if": "if_"} if "if_" in params else {}
    entries = {spelled.get(name, name): kinds for name, kinds in _flax_entries(gates).items()}
    arrays = _read_flax_maps(where, params, entries, "hidden")
    no_bias = np.zeros_like(arrays["h" + gates[0], "kernel"][0])

    def join(side: str, kind: str) -> np.ndarray:
        names = [spelled.get(side + gate, side + gate) for gate in gates]
        return np.concatenate([arrays.get((name, kind), no_bias) for name in names], axis=-1)

    return to_params(Layer(gates, *(join(side, kind) for kind in ("kernel", "bias") for side in "ih")))


def to_flax(params: Mapping[str, Any], *, cell: str = "linen") -> dict[str, dict[str, np.ndarray]]:
    """The dict of a Flax cell (checked with 0.12).

    Flax's GRU has one bias each for r and z, which becomes the sum of our two.

    Args:
      params: as `init_lstm` or `init_gru` makes them.
      cell: 'linen' for an `LSTMCell`, `OptimizedLSTMCell` or `GRUCell` of linen; else which of nnx:
        'nnx.LSTMCell', 'nnx.OptimizedLSTMCell' or 'nnx.GRUCell'.

    Returns:
      The cell's own dict as in `from_flax`, of NumPy arrays. For linen, ``{'params': ...}`` around it
      makes the cell's variables; for nnx, ``nnx.update(cell, ...)`` takes it.

    Raises:
      ValueError: an entry is missing, unexpected or of the wrong shape, these are not the cell's, or are a
        reset-before GRU's, which Flax has not; or 'nnx.GRUCell', which has no bias of hn, is to hold one
        that is not zero.
    """
    ours = from_params(params)
    gates, recurrent_bias = ours.gates, recurrent_bias_of(ours, "Flax")
    cells = ("linen", *{LSTM: ("nnx.LSTMCell", "nnx.OptimizedLSTMCell"), GRU: ("nnx.GRUCell",)}[gates])
    if cell not in cells:
        raise ValueError(f"cell is {cell!r}; expected one of {cells} for params of {len(gates)} gates")
    sums = ours.bias + recurrent_bias
    if cell in ("nnx.OptimizedLSTMCell", "nnx.GRUCell"):
        if gates == GRU and recurrent_bias[-len(recurrent_bias) // 3 :].any():
            raise ValueError(
                "params['recurrent_bias'] is not zero for n, in its last third; expected zeros, as nnx.GRUCell has no "
                "bias b_hn (linen's GRUCell has)"
            )
        whole = {"dense_i": ours.kernel, "dense_h": ours.recurrent_kernel}
        return {
            name: {"kernel": whole[name], **({"bias": sums} if "bias" in kinds else {})}
            for name, kinds in _joined_entries(gates).items()
        }
    kernels = {"i": split(ours.kernel, gates), "h": split(ours.recurrent_kernel, gates)}
    biases = {"i": split(ours.bias, gates), "h": split(recurrent_bias, gates)}
    flax: dict[str, dict[str, np.ndarray]] = {}
    for name, kinds in _flax_entries(gates).items():
        side, gate = name[0], name[1]
        maps = flax["if_" if name == "if" and cell == "nnx.LSTMCell" else name] = {"kernel": kernels[side][gate]}
        if "bias" in kinds:
            # Where only one of the two maps has a bias, it stands for both.
            both = {"i" + gate, "h" + gate} <= _FLAX_BIASED[gates]
            maps["bias"] = (biases[side] if both else split(sums, gates))[gate]
    return flax
