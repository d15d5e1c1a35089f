"""Deep stacks, MLPs and what is read of a sequence, against NumPy and in runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, special

from seqmnist_jax import load
from seqmnist_jax.errors import UsageError
from seqmnist_jax.models.build import build_model
from seqmnist_jax.models.head import drop_units, read_out
from seqmnist_jax.models.legendre import with_memory
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.state import restore_state
from seqmnist_jax.training.train import Stopped, train
from seqmnist_jax.workdir.checkpoints import Checkpoints
from tests import tiny

TIME, BATCH = 16, 3
# Without what the tiny run's config sets for its LSTM.
PLAIN = {"model.norm": "none", "model.dense_init": "glorot_uniform"}
DEEP = {**PLAIN, "model.name": "deep", "model.cell": "diagonal", "data.view": "pixel"}
STAGES = {"model.stages": "4x1, 6x2", "model.cell_options": "{'states': 3}"}


def made(**changes):
    """A model for 16 steps of one feature and three classes, variables drawn for it, and an x."""
    model = build_model(tiny.config(**{"runtime.backend": "scan", **changes}), TIME, 3)
    draw = np.random.default_rng(1)
    x = jnp.asarray(draw.standard_normal((BATCH, TIME, 1)), jnp.float32)

    def drawn(path, leaf):
        size = 0.2 if leaf.ndim < 2 else 1 / np.sqrt(leaf.shape[0])
        centre = {"scale": 1, "var": 1, "nu": -3, "theta": 1}.get(path[-1].key, 0)  # of poles near the circle
        return jnp.asarray(centre + size * draw.standard_normal(leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return model, jax.tree_util.tree_map_with_path(drawn, shapes), x


def deep(**changes):
    return made(**{**DEEP, **STAGES, **changes})


def logits(model, variables, x, **options):
    """What the model says, as one compiled program: operation by operation each is one to compile."""
    return jax.jit(model.apply, static_argnames="every_step")(variables, x, **options)


def normed(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def states(p, x):
    (b_re, b_im), (c_re, c_im) = np.split(p["kernel"], 2, axis=1), np.split(p["output_kernel"], 2)
    poles, s, y = np.exp(-np.exp(p["nu"]) + 1j * p["theta"]), 0.0, []
    for t in range(x.shape[1]):
        s = poles * s + np.sqrt(1 - abs(poles) ** 2) * (x[:, t] @ (b_re + 1j * b_im))
        y.append((s @ (c_re + 1j * c_im)).real)
    return np.stack(y, axis=1)


def block(p, x):
    y = gelu(states(p["rnn"]["layer_0"]["forward"], normed(p["norm"], x)))
    value, opened = np.split(dense(p["gate"], y), 2, axis=-1)
    return x + value * special.expit(opened)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("reading", ["last", "mean"])
def test_a_deep_stack_is_its_equations(reading):
    model, variables, x = deep(**{"model.reading": reading})
    p = jax.tree.map(np.float64, variables["params"])
    y = block(p["stage_0_block_0"], dense(p["stage_0_input"], np.float64(x)))
    y = dense(p["stage_1_input"], y.reshape(BATCH, TIME // 4, 16))
    y = block(p["stage_1_block_1"], block(p["stage_1_block_0"], y))
    y = y.mean(1) if reading == "mean" else y[:, -1]
    np.testing.assert_allclose(logits(model, variables, x), dense(p["dense"], normed(p["norm"], y)), atol=2e-5)


CASES = [{}, {"model.reading": "mean"}, {"model.cell": "gru", "model.cell_options": "", "model.head_layers": 1}]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("changes", CASES)
def test_a_step_depends_on_no_later_one(changes):
    model, variables, x = deep(**changes)
    every = logits(model, variables, x, every_step=True)
    np.testing.assert_allclose(every[:, -1], logits(model, variables, x), atol=1e-5)
    for t in (2, 7, 11):
        other = logits(model, variables, x.at[:, t + 1 :].set(9.0), every_step=True)
        np.testing.assert_array_equal(other[:, : t + 1], every[:, : t + 1])
    # The second stage's first step is full after four.
    assert np.ptp(every[:, :3], axis=(0, 1)).max() == 0
    assert np.ptp(every[:, 3:], axis=1).max() > 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize("reading", ["last", "mean"])
@pytest.mark.parametrize("make", [deep, made, functools.partial(made, **{"model.memory": 5, "model.cell": "gru"})])
def test_ragged_sequences_read_as_whole_ones_up_to_their_end(make, reading):
    model, variables, x = make(**{"model.reading": reading})
    lengths = jnp.array([16, 9, 0])
    padded = jnp.where(jnp.arange(TIME)[:, None] < lengths[:, None, None], x, jnp.nan)
    found = logits(model, variables, padded, lengths=lengths)
    every = logits(model, variables, padded, lengths=lengths, every_step=True)
    np.testing.assert_allclose(found[0], every[0, -1], atol=1e-5)
    np.testing.assert_allclose(found[1], every[1, 8], atol=1e-5)
    np.testing.assert_allclose(found[1], logits(model, variables, x[1:2], every_step=True)[0, 8], atol=1e-5)
    nothing = logits(model, variables, x[:1], lengths=jnp.array([0]))[0]
    for past in (every[b, end:] for b, end in enumerate(lengths)):
        np.testing.assert_allclose(past, np.broadcast_to(nothing, past.shape), atol=1e-5)
    nothing = logits(model, variables, x[:1] * 0, lengths=jnp.array([0]))
    np.testing.assert_allclose(found[2], nothing[0], rtol=1e-6)

    def loss(variables, x):
        return (model.apply(variables, x, lengths=lengths) ** 2).sum()

    grads = jax.jit(jax.grad(loss, (0, 1)))(variables, padded)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))
    assert not np.any(grads[1][1, 9:])


@pytest.mark.slow
def test_masks_are_one_for_all_steps():
    model, variables, x = deep()
    keep, rngs = (None, 0.5, None), {"dropout": jax.random.key(3)}
    dropped = model.apply(variables, x, train=True, keep=keep, rngs=rngs)
    np.testing.assert_array_equal(dropped, model.apply(variables, x, train=True, keep=keep, rngs=rngs))
    assert np.abs(dropped - model.apply(variables, x)).max() > 1e-3
    np.testing.assert_array_equal(model.apply(variables, x, keep=keep), model.apply(variables, x))

    class Module:
        make_rng = staticmethod(lambda name: jax.random.key(len(name)))

    found = np.asarray(drop_units(Module(), jnp.ones((200, 5, 50)), 0.8, None))
    assert set(np.unique(found)) == {0.0, np.float32(1.25)}
    assert np.ptp(found, axis=1).max() == 0
    assert abs(found.mean() - 1) < 0.03


def test_the_mean_is_over_a_sequence_s_own_steps():
    y = jax.random.normal(jax.random.key(0), (3, 5, 2))
    lengths = jnp.array([5, 2, 0])
    np.testing.assert_allclose(read_out(y, lengths, "mean", False)[1], y[1, :2].mean(0), rtol=1e-6)
    assert not np.any(read_out(y, lengths, "mean", False)[2])
    np.testing.assert_allclose(read_out(y, None, "mean", True)[0, 2], y[0, :3].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(read_out(y, lengths, "last", False)[1], y[1, 1])
    assert not np.any(read_out(y, lengths, "mean", True)[1, 2:])


def test_an_mlp_is_its_equations_and_knows_no_order():
    model, variables, x = made(**{"model.name": "mlp", "model.num_layers": 2, "model.norm": "none"})
    p = jax.tree.map(np.float64, variables["params"])
    y = gelu(normed(p["hidden"]["norm_0"], dense(p["input"], np.float64(x[..., 0]))))
    y = gelu(normed(p["hidden"]["norm_1"], dense(p["hidden"]["dense_0"], y)))
    np.testing.assert_allclose(logits(model, variables, x), dense(p["dense"], y), atol=2e-5)
    order = jax.random.permutation(jax.random.key(5), TIME)
    kernel = variables["params"]["input"]["kernel"]
    permuted = {"params": {**variables["params"], "input": {**variables["params"]["input"], "kernel": kernel[order]}}}
    np.testing.assert_allclose(logits(model, permuted, x[:, order]), logits(model, variables, x), atol=1e-5)
    every = logits(model, variables, x, every_step=True)
    np.testing.assert_allclose(every[:, 4], logits(model, variables, x, lengths=jnp.full(BATCH, 5)), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [DEEP | STAGES, {"model.name": "mlp", "model.norm": "none"}, {"model.memory": 5}],
    ids=["deep", "mlp", "memory"],
)
def test_a_batch_of_nothing(changes):
    model, variables, x = made(**changes)
    assert logits(model, variables, x[:0]).shape == (0, 3)


def test_a_run_with_a_memory_says_what_runs_its_layer():
    run = build_run(tiny.config(**{"model.memory": 5, "runtime.backend": "fused"}))
    assert run.recurrence().startswith("fused: named by the caller")
    assert run.learner.template.params["rnn"]["layer_0"]["forward"]["kernel"].shape == (28 * 6, 32)


def test_a_linear_classifier_is_one_product():
    model, variables, x = made(**{"model.name": "linear"})
    every = logits(model, variables, x, every_step=True)
    np.testing.assert_allclose(every[:, 4], logits(model, variables, x, lengths=jnp.full(BATCH, 5)), atol=1e-5)
    np.testing.assert_allclose(
        logits(model, variables, x), dense(variables["params"]["dense"], np.asarray(x[..., 0])), atol=1e-5
    )


def test_hidden_layers_stand_behind_a_recurrence():
    model, variables, x = made(**{"model.norm": "none", "model.head_layers": 1, "model.cell": "gru"})
    plain, _, _ = made(**{"model.norm": "none", "model.cell": "gru"})
    p = jax.tree.map(np.float64, variables["params"])
    of_rnn = {"rnn": variables["params"]["rnn"], "dense": variables["params"]["dense"]}
    _, sown = plain.apply({"params": of_rnn}, x, mutable=["intermediates"])
    y = np.float64(sown["intermediates"]["features"][0])
    y = gelu(normed(p["head"]["norm_1"], dense(p["head"]["dense_0"], gelu(normed(p["head"]["norm_0"], y)))))
    np.testing.assert_allclose(logits(model, variables, x), dense(p["dense"], y), atol=2e-5)


def test_the_legendre_memory_is_its_equations():
    order, x = 6, np.random.default_rng(0).standard_normal((2, 11, 2))
    a = [[(2 * i + 1) / 11 * (-1 if i < j else (-1) ** (i - j + 1)) for j in range(order)] for i in range(order)]
    b = np.array([(2 * i + 1) * (-1.0) ** i / 11 for i in range(order)])
    step = linalg.expm(np.array(a))
    held = np.linalg.solve(a, (step - np.eye(order)) @ b)
    memory, wanted = np.zeros((2, 2, order)), []
    for t in range(11):
        memory = memory @ step.T + x[:, t, :, None] * held
        wanted.append(np.concatenate([x[:, t], memory.reshape(2, -1)], axis=-1))
    np.testing.assert_allclose(with_memory(jnp.float32(x), order), np.stack(wanted, axis=1), atol=1e-5)


def test_a_legendre_memory_holds_what_was_read():
    """Its polynomials, added up, are the sequence again where that is smooth (the newest step at 0)."""
    x = np.sin(np.linspace(0, 9, 784))
    memory = np.asarray(with_memory(jnp.float32(x[None, :, None]), 24))[0, -1, 1:]
    ago = np.linspace(0, 1, 784)[::-1]
    again = sum(m * special.eval_sh_legendre(i, ago) for i, m in enumerate(memory))
    assert np.abs(again - x).mean() < 0.03


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.stages": "32, 64"}, r"model.stages is '32, 64'; expected channels x blocks of each stage"),
        ({"model.stages": "0x1"}, r"model.stages is '0x1'; expected"),
        ({"model.shorten": 5}, r"model.shorten is 5 .* sequence length of this view is 784; expected a multiple of 5"),
        ({"model.bidirectional": True}, r"model.bidirectional is True, but a deep stack reads forwards alone"),
        ({"model.dropout.state_keep": 0.5}, r"model.dropout.state_keep is 0.5, but a deep stack has no such place"),
        ({"model.reading": "first"}, r"model.reading is 'first'; expected one of: last, mean"),
        ({"model.name": "mlp", "model.dropout.state_keep": 0.5}, r"state_keep is 0.5, but model.name='mlp' has no"),
        ({"train.noise": -1.0}, r"train.noise is -1.0; expected 0 or more"),
        ({"model.shorten": 5}, r"model.stages names 2, but"),
    ],
)
def test_what_cannot_be_is_told(changes, message):
    with pytest.raises(UsageError, match=message):
        build_run(tiny.config(**{**DEEP, **STAGES, **changes}))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model.name": "mlp"}, "model.cell"),
        ({"model.name": "linear", "model.cell": "lstm"}, "model.hidden_size"),
        ({**DEEP, **STAGES}, "model.hidden_size"),
        ({"model.cell": "gru", "optimizer.recurrent_rate": 0.5}, "optimizer.recurrent_rate"),
        ({"model.cell": "gru", "optimizer.drop_steps": 5}, "optimizer.drop_steps"),
        ({"model.cell": "gru", "optimizer.schedule": "drop", "optimizer.warmup_steps": 5}, "optimizer.warmup_steps"),
        ({"model.cell": "gru", "model.shorten": 2}, "model.shorten"),
        ({**DEEP, "model.hidden_size": 64, "model.shorten": 2}, "model.shorten"),
    ],
)
def test_a_field_that_is_not_read_is_told(changes, field):
    with pytest.raises(UsageError, match=f"{field} is .* nothing reads it"):
        build_run(tiny.config(**{**PLAIN, "model.cell": "gru", **changes}))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["deep", "mlp"])
def test_they_train_and_go_on_bit_for_bit(name, tmp_path):
    changes = {**PLAIN, "model.name": name, "train.noise": 0.1, "optimizer.name": "adamw"}
    changes |= {"model.dropout.output_keep": 0.9, "optimizer.clip.mask": "all", "train.steps": 40}
    if name == "deep":
        changes |= {"model.cell": "diagonal", "model.stages": "8x1, 16x1", "model.shorten": 7, "model.hidden_size": 64}
        changes |= {"model.reading": "mean", "runtime.backend": "fused"}

    def train_in(folder, stop_at=99):
        done = []
        watch = QUIET._replace(
            show=lambda now: done.append(now.step), should_stop=lambda: bool(done) and done[-1] >= stop_at
        )
        run = build_run(tiny.config(**changes, **{"runtime.dispatch_seconds": 1e-9}))
        summary = train(run, folder, watch=watch)
        with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
            return summary, restore_state(checkpoints, 40, run.learner.template).params

    summary, params = train_in(tmp_path / "whole")
    with pytest.raises(Stopped):
        train_in(tmp_path / "parts", stop_at=7)
    _, again = train_in(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert summary["test_accuracy"] > 0.11
    model = load(tmp_path / "parts")
    images = np.zeros((2, 28, 28), np.uint8)
    if name == "deep":
        assert model.states(images).shape == (2, 4, 16)
    else:
        with pytest.raises(ValueError, match=r"no recurrent layer \(model.name is 'mlp'\)"):
            model.states(images)
    assert model.read(images).shape == (2, 28, 10)
