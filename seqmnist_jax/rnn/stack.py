"""Several recurrent layers, one or both directions, with variational dropout."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.rnn.cell import Cell, cell, first_carry, hidden_size
from seqmnist_jax.rnn.cells import PRECISIONS
from seqmnist_jax.rnn.checks import as_array, check_sequences, choice, flag, is_known, is_real, whole
from seqmnist_jax.rnn.eager import at_precision, compiled, is_key
from seqmnist_jax.rnn.gaps import pressed, spread
from seqmnist_jax.rnn.remat import remat
from seqmnist_jax.rnn.scan import without_padding

Array = jax.Array
Layers = dict[str, dict[str, dict[str, Array]]]

DIRECTIONS = ("forward", "backward")


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

    Raises:
      ValueError: keep has not three parts, or a probability is known and outside (0, 1].
    """
    if not isinstance(keep, tuple | list) or len(keep) != len(Masks._fields):
        raise ValueError(f"keep is {keep!r}; expected a probability or None for each of {', '.join(Masks._fields)}")

    def draw(key: Array, keep: Any, size: int) -> Array | None:
        if keep is None:
            return None
        keep = as_array("keep", keep)
        if not is_real(keep.dtype) or (is_known(keep) and not np.all((np.asarray(keep) > 0) & (np.asarray(keep) <= 1))):
            raise ValueError(f"keep is {keep}; expected a probability in (0, 1], or None")
        keep = keep if jnp.issubdtype(keep.dtype, jnp.floating) else jnp.asarray(keep, float)
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


def _direction(kind: Cell, params: Any, x: Array, masks: Masks, engine: Engine, **options: Any) -> Array:
    """The outputs of one layer in one direction, dropout included."""
    steps = masks.state is not None or engine.unroll != 1
    if steps or any(mask is not None for mask in masks):
        # What the layer refuses is refused first, though its own loop has no place for a mask.
        jax.eval_shape(lambda x: kind.layer(params, x, precision=engine.precision, backend=engine.backend), x)
    for name, mask in masks._asdict().items():
        if mask is not None:
            expected = (x.shape[0], x.shape[2] if name == "inputs" else hidden_size(kind, params, x.shape[2]))
            # One row for the whole batch is TF1's way.
            if mask.shape not in (expected, (1, expected[1])):
                raise ValueError(f"masks.{name} has shape {mask.shape}; expected {expected}")
    if masks.inputs is not None:
        x, _ = without_padding(x, options["lengths"])  # which may be NaN, and so would be the mask's gradient
        x = x * masks.inputs[:, None, :]
    layer, given = kind.layer, params
    if steps:
        make = _by_steps if is_key(kind.step) else _by_steps.__wrapped__
        stepped = make(kind, masks.state is not None)
        layer = functools.partial(stepped.layer, unroll=engine.unroll)
        given = params if masks.state is None else (params, masks.state)
    if engine.remat:
        layer = remat(layer, engine.remat)
    _, y = layer(given, x, precision=engine.precision, backend=engine.backend, **options)
    if masks.outputs is not None:
        y = y * (masks.outputs[:, None, :] if y.ndim == 3 else masks.outputs)
    return y


@functools.lru_cache(maxsize=256)
def _by_steps(kind: Cell, drops: bool) -> Cell:
    """The layer of a cell's step; where it drops units of the state, parameters and their mask are given together."""
    if not drops:
        return cell(kind.step, kind.init, kind.zero_carry)

    def step(given: Any, carry: Any, x_t: Array, precision: str = "float32") -> tuple[Any, Array]:
        params, state = given
        carry, y = at_precision(kind.step, precision)(params, carry, x_t)
        return _masked(carry, y, state), y

    def init(key: Array, features: int, hidden_size: int) -> Any:
        return kind.init(key, features, hidden_size), jnp.ones((1, hidden_size))

    def zero_carry(zero: Array, params: Any) -> Any:
        return first_carry(kind, params[0], zero)

    return cell(step, init, zero_carry)


def explain_layer(kind: Cell, params: Any, x: Any, engine: Engine, drops_state: bool) -> str:
    """What would run a layer of a stack, and why.

    Args:
      kind, engine: as in `stack`.
      params: one layer's, of one direction, or their shapes.
      x: what it reads, [batch, time, features], or its shape.
      drops_state: whether there is a mask of the state.

    Raises:
      ValueError: as in the cell's layer.
    """
    if engine.unroll > 1:
        return "scan: steps are unrolled"
    if drops_state:
        params = params, jax.ShapeDtypeStruct((x.shape[0], hidden_size(kind, params, x.shape[2])), x.dtype)
        kind = _by_steps(kind, True)
    if kind.explain is None or "scan" not in kind.backends:
        return "the cell's own layer"
    return str(kind.explain(params, x, backend=engine.backend, precision=engine.precision))


def _masked(carry: Any, y: Array, state: Array) -> Any:
    """A carry with its h masked: what is also the step's output, or all that there is."""
    leaves, tree = jax.tree.flatten(carry)
    places = [place for place, leaf in enumerate(leaves) if leaf is y or len(leaves) == 1]
    if not places:
        raise ValueError(
            f"masks.state is given, but of the {len(leaves)} arrays of the step's carry none is its output; expected "
            "that the h which is dropped is handed on as it is, by a step that is not jitted itself"
        )
    return jax.tree.unflatten(tree, [leaf * state if place in places else leaf for place, leaf in enumerate(leaves)])


def stack(
    cell: Cell,
    params: Layers,
    x: Array,
    *,
    lengths: Array | None = None,
    mask: Array | None = None,
    resets: Array | None = None,
    masks: dict[str, dict[str, Masks]] | None = None,
    engine: Engine = Engine(),  # noqa: B008  (a tuple: nobody can change it)
    return_sequences: bool = False,
    zero_output_for_mask: bool = False,
) -> Array:
    """Layers one above the other, each reading the outputs of the one below.

    Args:
      cell: `LSTM`, `GRU`, `GRU_RESET_BEFORE`, or one of your own, made by `cell`.
      params: as `init_stack` makes them: ``params['layer_0']['forward']`` and so on; a layer
        with 'backward' too reads both ways and hands on both outputs side by side.
      x: [batch, time, features].
      lengths, mask, zero_output_for_mask: as in `scan`.
      resets: as in `scan`, the first steps of sequences that follow one another; the backward direction starts anew at
        the steps before them. Not with the engine's `remat`.
      masks: dropout masks by layer and direction; None for none.
      engine: how the layers run.
      return_sequences: give all steps' outputs, or only each direction's last.

    Returns:
      [batch, time, directions * hidden], or [batch, directions * hidden].

    Raises:
      ValueError: the cell's layer does not know the engine's backend; else as in `lstm`.
    """
    if not isinstance(cell, Cell) or not isinstance(engine, Engine):
        what, found = ("engine", engine) if isinstance(cell, Cell) else ("cell", cell)
        raise ValueError(f"{what} is {found!r}; expected an rnn.{what.capitalize()}, as rnn.GRU or rnn.Engine()")
    engine = Engine(
        choice("backend", engine.backend, cell.backends),
        choice("precision", engine.precision, PRECISIONS),
        whole("remat", engine.remat, 0),
        whole("unroll", engine.unroll, 1),
    )
    _check_layers(params, masks)
    x, lengths, mask, resets = check_sequences(x, lengths, mask, resets)
    flags = flag("return_sequences", return_sequences), flag("zero_output_for_mask", zero_output_for_mask)
    # The layer, by which a program is known, must not be held by it, nor what may hold the layer.
    rest = cell._replace(layer=_stack, explain=_stack)
    return compiled(_stack, cell.layer, (params, x, lengths, mask, resets, masks), (rest, engine, *flags))


def _check_layers(params: Any, masks: Any) -> None:
    """Checks the names of layers and directions."""
    if not isinstance(params, Mapping) or not params or set(params) != {f"layer_{i}" for i in range(len(params))}:
        raise ValueError(
            f"params has {sorted(map(str, params))}; expected 'layer_0' and so on, as `init_stack` makes them"
        )
    if masks is not None and not isinstance(masks, Mapping):
        raise ValueError(f"masks is a {type(masks).__name__}; expected masks by layer and direction, as params")
    for name, layer in params.items():
        has = sorted(map(str, layer)) if isinstance(layer, Mapping) else [type(layer).__name__]
        if not has or not set(has) <= set(DIRECTIONS):
            raise ValueError(f"params[{name!r}] has {has}; expected 'forward', 'backward' or both")
        if masks is not None and not set(has) <= set(masks.get(name, ())):
            raise ValueError(f"masks[{name!r}] has {sorted(masks.get(name, ()))}; expected {has}, as params has")


def _stack(
    layer: Any,
    params: Any,
    x: Array,
    lengths: Any,
    mask: Any,
    resets: Any,
    masks: Any,
    cell: Cell,
    engine: Engine,
    return_sequences: bool,
    zero: bool,
) -> Array:
    cell = cell._replace(layer=layer)
    x, lengths, resets = pressed(x, lengths, mask, resets)
    anew: dict[str, dict[str, Any]] = {direction: {} for direction in DIRECTIONS}
    if resets is not None:
        anew = {
            "forward": {"resets": resets},
            "backward": {"resets": jnp.roll(resets, -1, axis=1).at[:, -1].set(False)},
        }
    for index in range(len(params)):
        name = f"layer_{index}"
        outputs = [
            _direction(
                cell,
                params[name][direction],
                x,
                Masks() if masks is None else masks[name][direction],
                engine,
                lengths=lengths,
                reverse=direction == "backward",
                return_sequences=return_sequences or index < len(params) - 1,
                **anew[direction],
            )
            for direction in DIRECTIONS
            if direction in params[name]
        ]
        if return_sequences and index == len(params) - 1:
            ways = [direction == "backward" for direction in DIRECTIONS if direction in params[name]]
            outputs = [spread(y, mask, reverse, zero) for y, reverse in zip(outputs, ways, strict=True)]
        x = jnp.concatenate(outputs, axis=-1)
    return x


def init_stack(
    key: Array, cell: Cell, features: int, hidden_size: int, *, num_layers: int, bidirectional: bool, **options: Any
) -> Layers:
    """Parameters of a stack; `options` go to the cell's own initialiser."""
    directions = DIRECTIONS if bidirectional else DIRECTIONS[:1]
    params: Layers = {}
    for index in range(whole("num_layers", num_layers, 1)):
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
