"""Steps whose output has products that no carry waits for: the loop without them, and they behind it, are the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax import rnn
from seqmnist_jax.models.cells import lru, s5
from seqmnist_jax.rnn import recurrence
from seqmnist_jax.rnn.readout import Inner, taken_out
from seqmnist_jax.rnn.recurrence import Call, Given, plain
from seqmnist_jax.rnn.stages import Options

HIDDEN, FEATURES = 5, 6
LENGTHS = jnp.array([6, 2, 0, 1], jnp.int32)


def recurrent(p, h, x):
    return jnp.tanh(x @ p["W"] + h @ p["U"] + p["b"])


def squashed(p, h, x):
    """What the product reads is made in the loop; of zeros, which no step makes, the root has an infinite slope."""
    h = recurrent(p, h, x)
    y = jnp.sqrt(jnp.abs(jnp.exp(h) @ p["V"]))
    return h, y * p["b"] + x @ p["W"]


def both_states(p, h, x):
    """The old state and the new one, side by side, and an output of two blocks."""
    new = recurrent(p, h, x)
    y = jnp.concatenate([new, h], axis=1) @ p["C"]
    return new, jnp.concatenate([jax.nn.relu(y), new * y], axis=1)


def one_after_the_other(p, h, x):
    h = recurrent(p, h, x)
    return h, (jnp.tanh(h @ p["V"]) + x[:, :1]) @ p["V"].T


def params():
    rng = np.random.default_rng(0)
    sizes = {"W": (FEATURES, HIDDEN), "U": (HIDDEN, HIDDEN), "V": (HIDDEN, HIDDEN), "C": (2 * HIDDEN, HIDDEN)}
    return {name: rng.standard_normal(size) / 2 for name, size in sizes.items()} | {"b": rng.standard_normal(HIDDEN)}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("step", [squashed, both_states, one_after_the_other], ids=lambda step: step.__name__)
@pytest.mark.parametrize(
    ("outputs", "reverse", "lengths"), [("all", False, LENGTHS), ("last", True, LENGTHS), ("last", False, None)]
)
def test_the_loop_and_what_stands_behind_it_are_the_step(step, outputs, reverse, lengths):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        given = (params(), rng.standard_normal((4, 6, FEATURES)), rng.standard_normal((4, HIDDEN)))
        given = jax.tree.map(jnp.asarray, given)
        options = Options(outputs, reverse, "float32")
        inner = taken_out(step, "float32", given[0], given[2], given[1])
        assert isinstance(inner, Inner)

        def loss(run, step):
            def of(*arrays):
                return sum(
                    jnp.sin(leaf).sum()
                    for leaf in jax.tree.leaves(run(Call(step, options, "derived"), Given(*arrays, lengths)))
                )

            return jax.jit(jax.value_and_grad(of, (0, 1, 2)))(*given)

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11),
            loss(recurrence.run, inner),
            loss(plain, step),
        )


def test_a_step_whose_products_the_carry_needs_stays_as_it_is():
    def step(p, h, x):
        h = recurrent(p, h, x)
        return h, 2 * h + x @ p["W"]

    given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params())
    assert taken_out(step, "float32", given, jnp.zeros((2, HIDDEN)), jnp.zeros((2, 1, FEATURES))) is step


def test_outputs_of_different_steps_are_not_put_together(need_native):
    need_native()

    def centred(p, h, x):
        h = recurrent(p, h, x)
        y = h @ p["V"]
        return h, y - y.mean(0) + x.mean(0)[:HIDDEN]

    rng = np.random.default_rng(1)
    given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params())
    carry, x = (jnp.asarray(rng.standard_normal(size), jnp.float32) for size in ((4, HIDDEN), (4, 6, FEATURES)))
    for step, is_ragged in ((squashed, True), (both_states, True), (one_after_the_other, True), (centred, False)):
        assert isinstance(taken_out(step, "float32", given, carry, x, is_ragged), Inner)
    assert taken_out(centred, "float32", given, carry, x, True) is centred
    options = {"lengths": LENGTHS, "return_sequences": False}
    found, wanted = (rnn.scan(centred, given, x, carry, **options, backend=b)[1] for b in ("auto", "scan"))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for cell in (lru, s5):
        of_cell = cell.init(jax.random.key(0), FEATURES, HIDDEN)
        assert isinstance(taken_out(cell.step, "float32", of_cell, (carry, carry), x, True), Inner)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_kernel_of_the_last_output_leaves_them_out_too(need_native, reverse):
    need_native()
    x = jax.random.normal(jax.random.key(0), (4, 6, FEATURES))
    given = s5.init(jax.random.key(1), FEATURES, HIDDEN), x, (jnp.ones((4, HIDDEN)), jnp.zeros((4, HIDDEN)))
    assert "behind the loop" in rnn.explain_step(s5.step, *given, return_sequences=False)
    assert "behind the loop" not in rnn.explain_step(s5.step, *given)

    def loss(given, lengths, backend):
        options = {"return_sequences": False, "lengths": lengths, "reverse": reverse, "backend": backend}
        (re, im), y = rnn.scan(s5.step, *given, **options)
        return jnp.sin(y).sum() + (re * im).sum()

    for lengths in (None, LENGTHS):
        found, wanted = (jax.value_and_grad(loss)(given, lengths, backend) for backend in ("native", "scan"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
