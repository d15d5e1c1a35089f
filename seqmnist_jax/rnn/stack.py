"""Several recurrent layers, one or both directions, with variational dropout."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import cells
from seqmnist_jax.rnn.layers import BACKENDS, gru, lstm, remat
from seqmnist_jax.rnn.min_gru import init_min_gru, min_gru, min_gru_step
from seqmnist_jax.rnn.scan import scan

Array = jax.Array
Layers = dict[str, dict[str, dict[str, Array]]]

DIRECTIONS = ("forward", "backward")


class Cell(NamedTuple):
    """A kind of recurrent layer, in the parts that a stack needs.

    Attributes:
      layer: the layer over a whole sequence, with the arguments of `lstm`.
      step: one step of it, ``step(params, carry, x, precision) -> (carry, h)``.
      init: ``init(key, features, hidden_size, **options)`` makes its parameters.
      zero_carry: the carry of a new sequence, from a zero h [batch, hidden]; its last array is h.
      map_state: ``map_state(change, carry)`` is the carry with its h changed.
      hidden_size: ``hidden_size(params)`` is the number of units of h.
      backends: the names that `layer` takes for its backend.
    """

    layer: Callable[..., Any]
    step: Callable[..., Any]
    init: Callable[..., dict[str, Array]]
    zero_carry: Callable[[Array], Any]
    map_state: Callable[[Callable[[Array], Array], Any], Any]
    hidden_size: Callable[[dict[str, Array]], int]
    backends: tuple[str, ...]


def _rows_of_recurrent_kernel(params: dict[str, Array]) -> int:
    return params["recurrent_kernel"].shape[0]


LSTM = Cell(
    layer=lstm,
    step=cells.lstm_step,
    init=cells.init_lstm,
    zero_carry=lambda zero: (zero, zero),
    map_state=lambda change, carry: (carry[0], change(carry[1])),
    hidden_size=_rows_of_recurrent_kernel,
    backends=BACKENDS,
)
GRU = Cell(
    layer=gru,
    step=cells.gru_step,
    init=cells.init_gru,
    zero_carry=lambda zero: zero,
    map_state=lambda change, carry: change(carry),
    hidden_size=_rows_of_recurrent_kernel,
    backends=BACKENDS,
)
GRU_RESET_BEFORE = GRU._replace(
    layer=functools.partial(gru, reset_after=False),
    init=functools.partial(cells.init_gru, reset_after=False),
    backends=("auto", "scan"),
)
MIN_GRU = Cell(
    layer=min_gru,
    step=min_gru_step,
    init=init_min_gru,
    zero_carry=lambda zero: zero,
    map_state=lambda change, carry: change(carry),
    hidden_size=lambda params: params["bias"].shape[0] // 2,
    backends=("auto",),
)


class Masks(NamedTuple):
    """Dropout masks of one layer and direction, each [batch, size], or None: not dropped.

    A mask holds 0 or 1 / keep, one number for each sequence and unit, and serves all of its
    steps (Gal & Ghahramani 2016). TF1's DropoutWrapper, whose places these are, shares
    one mask among the batch instead.

    Attributes:
      inputs: on x, [batch, features].
      outputs: on what the layer hands on, [batch, hidden]; its own next step sees it undropped.
      state: on the h that the next step sees, [batch, hidden]; never on an LSTM's c.
    """

    inputs: Array | None = None
    outputs: Array | None = None
    state: Array | None = None


Probability = float | Array | None
Keep = tuple[Probability, Probability, Probability]


def draw_masks(key: Array, keep: Keep, batch: int, features: int, hidden_size: int, dtype: Any) -> Masks:
    """Fresh masks.

    Args:
      key: a PRNG key.
      keep: for each mask in order, the probability to keep a unit, a number in (0, 1],
        perhaps traced; None where nothing is dropped.
      batch, features, hidden_size, dtype: of the masks.
    """

    def draw(key: Array, keep: Probability, size: int) -> Array | None:
        if keep is None:
            return None
        return jax.random.bernoulli(key, keep, (batch, size)).astype(dtype) / jnp.asarray(keep, dtype)

    keys = jax.random.split(key, 3)
    sizes = (features, hidden_size, hidden_size)
    return Masks(*(draw(k, p, size) for k, p, size in zip(keys, keep, sizes, strict=True)))


class Engine(NamedTuple):
    """How layers run, not what they compute.

    Attributes:
      backend: as in `lstm`.
      precision: as in `lstm`.
      remat: 0, or how many steps stand between two remembered carries, as in `rnn.remat`.
      unroll: as in `rnn.scan`; other than 1 it means the 'scan' backend.
    """

    backend: str = "auto"
    precision: str = "float32"
    remat: int = 0
    unroll: int = 1


def _direction(cell: Cell, params: dict[str, Array], x: Array, mask: Masks, engine: Engine, **options: Any) -> Array:
    """The outputs of one layer in one direction, dropout included."""
    if mask.inputs is not None:
        x = x * mask.inputs[:, None, :]
    if mask.state is None and engine.unroll == 1:
        layer = remat(cell.layer, engine.remat) if engine.remat else cell.layer
        _, y = layer(params, x, precision=engine.precision, backend=engine.backend, **options)
    else:
        # The layer's own loop has no place for either, so the cell's single step is scanned.
        state = mask.state
        shape = (x.shape[0], cell.hidden_size(params))
        carry = cell.zero_carry(jnp.zeros(shape, jnp.result_type(x, *params.values())))

        def step(params: dict[str, Array], carry: Any, x_t: Array) -> tuple[Any, Array]:
            carry, y = cell.step(params, carry, x_t, engine.precision)
            return carry if state is None else cell.map_state(lambda h: h * state, carry), y

        _, y = scan(step, params, x, carry, unroll=engine.unroll, **options)
    if mask.outputs is not None:
        y = y * (mask.outputs[:, None, :] if y.ndim == 3 else mask.outputs)
    return y


def stack(
    cell: Cell,
    params: Layers,
    x: Array,
    *,
    lengths: Array | None = None,
    masks: dict[str, dict[str, Masks]] | None = None,
    engine: Engine = Engine(),  # noqa: B008  (a tuple: nobody can change it)
    return_sequences: bool = False,
) -> Array:
    """Layers one above the other, each reading the outputs of the one below.

    Args:
      cell: `LSTM`, `GRU`, `GRU_RESET_BEFORE`, `MIN_GRU`, or one of your own.
      params: as `init_stack` makes them: ``params['layer_0']['forward']`` and so on; a layer
        with 'backward' too reads both ways and hands on both outputs side by side.
      x: [batch, time, features].
      lengths: as in `scan`.
      masks: dropout masks by layer and direction; None for none.
      engine: how the layers run.
      return_sequences: give all steps' outputs, or only each direction's last.

    Returns:
      [batch, time, directions * hidden], or [batch, directions * hidden].

    Raises:
      ValueError: the cell's layer does not know the engine's backend; else as in `lstm`.
    """
    if engine.backend not in cell.backends:
        raise ValueError(
            f"backend is {engine.backend!r}; this cell's layer knows only {', '.join(map(repr, cell.backends))}"
        )
    for index in range(len(params)):
        name = f"layer_{index}"
        whole = return_sequences or index < len(params) - 1
        x = jnp.concatenate(
            [
                _direction(
                    cell,
                    params[name][direction],
                    x,
                    Masks() if masks is None else masks[name][direction],
                    engine,
                    lengths=lengths,
                    reverse=direction == "backward",
                    return_sequences=whole,
                )
                for direction in DIRECTIONS
                if direction in params[name]
            ],
            axis=-1,
        )
    return x


def init_stack(
    key: Array, cell: Cell, features: int, hidden_size: int, *, num_layers: int, bidirectional: bool, **options: Any
) -> Layers:
    """Parameters of a stack; `options` go to the cell's own initialiser."""
    directions = DIRECTIONS if bidirectional else DIRECTIONS[:1]
    params: Layers = {}
    for index in range(num_layers):
        params[f"layer_{index}"] = {
            # The first layer's key is the stack's own, so one layer alone starts the same.
            direction: cell.init(_fold(key, index, place), features, hidden_size, **options)
            for place, direction in enumerate(directions)
        }
        features = hidden_size * len(directions)
    return params


def _fold(key: Array, layer: int, direction: int) -> Array:
    place = layer * len(DIRECTIONS) + direction
    return key if place == 0 else jax.random.fold_in(key, place)
