"""The recurrence with a hand-written backward, in plain JAX, for every platform.

Automatic differentiation of a scan multiplies the weights' gradients up in every step. Here the
loop backwards makes only the gates' gradients and what they mean for the step before;
the weights' gradients are one product for every block of steps.

The forward pass saves what the way back needs, in time-major order: the outputs, an LSTM's memories c,
and the gates, or, where they would take too much memory, no gates, which are then made anew.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmnist_jax.rnn import cells
from seqmnist_jax.rnn.scan import running_tm, where_running
from seqmnist_jax.rnn.spec import Inputs, Layer, Saved

Array = jax.Array
Carry = Any

MOST_BLOCK_STEPS = 28


class Rule(NamedTuple):
    """A cell taken apart, its carry being (h, c) with None for a GRU's c.

    The gates' gradients stand as four blocks [batch, 4 * hidden]; those of h's product are the
    `of_h` blocks from the left, those of x's product the `of_x` blocks up to the right end, both
    in the order of the weights' gates given here.

    Attributes:
      gates: ``gates(params, h, inputs, precision)``, four arrays [batch, hidden].
      update: ``update(gates, (h, c)) -> (h, c)``.
      differentiate: ``differentiate(gates, before, after, (dh, dc)) -> (gradients, (dh, dc))``: the
        gates' gradients, and what goes past the gates to the step before.
      of_h, of_x: for each block of either product, its gate's place in the weights.
    """

    gates: Callable[..., tuple[Array, ...]]
    update: Callable[..., Carry]
    differentiate: Callable[..., tuple[Array, Carry]]
    of_h: tuple[int, ...]
    of_x: tuple[int, ...]


def _lstm_update(gates: tuple[Array, ...], carry: Carry) -> Carry:
    c, h = cells.lstm_update(gates, (carry[1], carry[0]))
    return h, c


def _lstm_differentiate(gates: tuple[Array, ...], before: Carry, after: Carry, bars: Carry) -> tuple[Array, Carry]:
    i, f, g, o = gates
    dh, dc = bars
    tanh_c = jnp.tanh(after[1])
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    gradients = (
        dc * g * (i * (1.0 - i)),
        dc * before[1] * (f * (1.0 - f)),
        dc * i * (1.0 - g * g),
        dh * tanh_c * (o * (1.0 - o)),
    )
    return jnp.concatenate(gradients, axis=-1), (jnp.zeros_like(dh), dc * f)


def _gru_update(gates: tuple[Array, ...], carry: Carry) -> Carry:
    return cells.gru_update(gates, carry[0]), None


def _gru_differentiate(gates: tuple[Array, ...], before: Carry, after: Carry, bars: Carry) -> tuple[Array, Carry]:
    del after
    r, z, n, h_n = gates
    dh = bars[0]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    gradients = (dn * r, dn * h_n * (r * (1.0 - r)), dh * (before[0] - n) * (z * (1.0 - z)), dn)
    return jnp.concatenate(gradients, axis=-1), (dh * z, None)


RULES = {
    "lstm": Rule(cells.lstm_gates, _lstm_update, _lstm_differentiate, of_h=(0, 1, 2, 3), of_x=(0, 1, 2, 3)),
    # n of h's product, r, z, n of x's product
    "gru": Rule(cells.gru_gates, _gru_update, _gru_differentiate, of_h=(2, 0, 1), of_x=(0, 1, 2)),
}


def _pair(layer: Layer, carry: Any) -> Carry:
    """A layer's carry as (h, c)."""
    return (carry[1], carry[0]) if layer.cell == "lstm" else (carry, None)


def _unpair(layer: Layer, carry: Carry) -> Any:
    """(h, c) as the layer's own carry."""
    return (carry[1], carry[0]) if layer.cell == "lstm" else carry[0]


def forward(layer: Layer, save: bool, given: Inputs) -> tuple[Any, Array | None, Saved | None]:
    """Runs the layer.

    Args:
      layer: what is static.
      save: whether the way back will be gone.
      given: the arrays.

    Returns:
      (carry, outputs, saved): outputs [batch, time, hidden] or None where they are not wanted, saved
      None where nobody goes back.
    """
    rule = RULES[layer.cell]
    params, x, carry, lengths = given
    inputs_tm = cells.inputs(params, jnp.swapaxes(x, 0, 1), layer.precision)
    collect = layer.return_sequences or save

    def step(before: Carry, now: tuple[Array, Array | None]) -> tuple[Carry, Any]:
        inputs, running = now
        gates = rule.gates(params, before[0], inputs, layer.precision)
        after = where_running(running, rule.update(gates, before), before)
        h = where_running(running, after[0], jnp.zeros_like(after[0]))
        return after, (
            h if collect else None,
            jnp.concatenate(gates, axis=-1) if save and layer.save_gates else None,
            after[1] if save else None,
        )

    end, (outputs_tm, gates, memories) = jax.lax.scan(
        step, _pair(layer, carry), (inputs_tm, running_tm(x, lengths)), reverse=layer.reverse
    )
    outputs = None if outputs_tm is None else jnp.swapaxes(outputs_tm, 0, 1)
    saved = None
    if save:
        assert outputs is not None
        nothing = jnp.zeros((0, *end[0].shape), end[0].dtype)
        saved = Saved(
            outputs,
            jnp.concatenate([nothing] * 4, axis=-1) if gates is None else gates,
            nothing if memories is None else memories,
        )
    return _unpair(layer, end), outputs if layer.return_sequences else None, saved


def _before(layer: Layer, history_tm: Array, initial: Array, lengths: Array | None) -> Array:
    """The state before each step, from that after each step, [time, batch, hidden]."""
    if not layer.reverse:
        return jnp.concatenate([initial[None], history_tm[:-1]])
    shifted = jnp.concatenate([history_tm[1:], initial[None]])
    if lengths is None:
        return shifted
    # A sequence that ends early begins, backwards, behind its padding.
    is_first = jnp.arange(history_tm.shape[0], dtype=jnp.int32)[:, None] >= lengths[None, :] - 1
    return jnp.where(is_first[..., None], initial, shifted)


def _block_size(time: int) -> int:
    """How many steps share one product for the weights' gradients: a divisor of all steps if there is one.

    Few, so that it finds its operands in the caches; but not so few that the product is no
    better than one in every step.
    """
    if not isinstance(time, int):  # A symbolic number of steps has no blocks but one.
        return time
    sizes = [size for size in range(4, MOST_BLOCK_STEPS + 1) if time % size == 0]
    return max(sizes, default=min(time, MOST_BLOCK_STEPS))


def backward(
    layer: Layer, wants_dx: bool, given: Inputs, saved: Saved, d_carry: Any, d_outputs: Array | None
) -> tuple[cells.Params, Array | None, Any]:
    """Gradients of params, x (None unless wanted) and the initial carry.

    Args:
      layer: what is static.
      wants_dx: whether x has a gradient.
      given: as in `forward`.
      saved: what it gave.
      d_carry, d_outputs: the cotangents of its carry and of its outputs, None where these have none.
    """
    rule = RULES[layer.cell]
    params, x, carry, lengths = given
    hidden, precision = params["recurrent_kernel"].shape[0], layer.precision
    initial = _pair(layer, carry)
    outputs_tm, x_tm = jnp.swapaxes(saved.outputs, 0, 1), jnp.swapaxes(x, 0, 1)
    is_saved = saved.gates.shape[0] > 0
    before_tm = (
        _before(layer, outputs_tm, initial[0], lengths),
        None if initial[1] is None else _before(layer, saved.memories, initial[1], lengths),
    )
    running = running_tm(x, lengths)
    # What an empty sequence had before may be anything, and 0 times that is not always 0.
    before_tm = jax.tree.map(
        lambda part: part if running is None else jnp.where(running[..., None], part, 0.0), before_tm
    )
    # The product's operand for the way back, its blocks in the gradients' order.
    blocks = jnp.split(params["recurrent_kernel"], len(rule.of_h), axis=-1)
    transposed = jnp.concatenate([blocks[gate].T for gate in rule.of_h])
    products = len(rule.of_h) * hidden

    def step(bars: Carry, now: tuple[Any, ...]) -> tuple[Carry, Array]:
        source, before, c, d_outputs, running = now
        gates = tuple(jnp.split(source, 4, axis=-1)) if is_saved else rule.gates(params, before[0], source, precision)
        total = bars if d_outputs is None else (bars[0] + d_outputs, bars[1])
        gradients, (dh, dc) = rule.differentiate(gates, before, (None, c), total)
        dh = dh + cells.product(gradients[:, :products], transposed, precision)
        gradients = where_running(running, gradients, jnp.zeros_like(gradients))
        return where_running(running, (dh, dc), bars), gradients

    kernel_blocks = jnp.split(params["kernel"], len(rule.of_x), axis=-1)
    kernel_transposed = jnp.concatenate([kernel_blocks[gate].T for gate in rule.of_x])

    def rows(array_tm: Array) -> Array:
        return array_tm.reshape(array_tm.shape[0] * array_tm.shape[1], array_tm.shape[-1])

    def block(loop: tuple[Carry, Any], now: tuple[Array, tuple[Any, ...]]) -> tuple[tuple[Carry, Any], Array | None]:
        bars, sums = loop
        x_block, steps = now
        source = steps[0] if is_saved else cells.inputs(params, x_block, precision)
        bars, gradients_tm = jax.lax.scan(step, bars, (source, *steps[1:]), reverse=not layer.reverse)
        of_h, of_x = rows(gradients_tm)[:, :products], rows(gradients_tm)[:, -len(rule.of_x) * hidden :]
        share = {
            "kernel": cells.product(rows(x_block).T, of_x, precision),
            "recurrent_kernel": cells.product(rows(steps[1][0]).T, of_h, precision),
            "bias": of_x.sum(0),
            "recurrent_bias": of_h.sum(0),
        }
        dx = cells.product(of_x, kernel_transposed, precision).reshape(x_block.shape) if wants_dx else None
        return (bars, jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, share)), dx

    size = _block_size(x.shape[1])
    count = x.shape[1] // size
    # Steps that fill no block are the last of the way back, and a block of their own.
    first = 0 if layer.reverse else x.shape[1] - count * size

    def block_at(loop: Any, start: Any, steps: int = size) -> tuple[tuple[Carry, Any], Array | None]:
        return block(
            loop, jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, steps), (x_tm, steps_tm))
        )

    steps_tm = (
        saved.gates if is_saved else None,
        before_tm,
        None if initial[1] is None else saved.memories,
        None if d_outputs is None else jnp.swapaxes(d_outputs, 0, 1),
        running,
    )
    sums = cells.widened({name: jnp.zeros_like(value) for name, value in params.items()})
    sums.setdefault("recurrent_bias", jnp.zeros((products,), sums["bias"].dtype))
    starts = first + size * jnp.arange(count, dtype=jnp.int32)
    loop, dx_tm = jax.lax.scan(block_at, (_pair(layer, d_carry), sums), starts, reverse=not layer.reverse)
    dx_tm = None if dx_tm is None else dx_tm.reshape(count * size, *x_tm.shape[1:])
    if count * size != x.shape[1]:
        loop, dx_rest = block_at(loop, count * size if layer.reverse else 0, x.shape[1] - count * size)
        if dx_tm is not None and dx_rest is not None:
            dx_tm = jnp.concatenate([dx_tm, dx_rest] if layer.reverse else [dx_rest, dx_tm])
    end, sums = loop

    def in_order(name: str) -> Array:
        gates = rule.of_x if name in ("kernel", "bias") else rule.of_h
        blocks = jnp.split(sums[name], len(gates), axis=-1)
        return jnp.concatenate([blocks[gates.index(gate)] for gate in range(len(gates))], axis=-1).astype(x.dtype)

    dx = None if dx_tm is None else jnp.swapaxes(dx_tm, 0, 1)
    return {name: in_order(name) for name in params}, dx, _unpair(layer, end)
