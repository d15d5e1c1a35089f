"""What calls cost: programs that are kept, memory that `explain` tells, sizes that are not known."""

import functools
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from seqmnist_jax import rnn
from seqmnist_jax.models.cells.min_gru import CELL as MIN_GRU
from seqmnist_jax.rnn import eager, readout, recurrence
from seqmnist_jax.rnn.cell import _initial_shapes
from seqmnist_jax.rnn.eager import _bound
from tests.tiny import quick_compiler

PARAMS = rnn.init_gru(jax.random.key(0), 3, 8)
X, H = jnp.ones((4, 10, 3)), jnp.zeros((4, 8))
LENGTHS = jnp.array([10, 7, 3, 0])
STACK = rnn.init_stack(jax.random.key(0), rnn.GRU, 3, 8, num_layers=2, bidirectional=True)
MASKS = {name: dict.fromkeys(each, rnn.Masks(state=jnp.ones((4, 8)))) for name, each in STACK.items()}


def factory(scale):
    return lambda params, carry, x_t: rnn.gru_step(params, scale * carry, x_t)


made = factory(0.5)
CALLS = {
    "scan": lambda p: rnn.scan(rnn.gru_step, p, X, H),
    "scan, lengths": lambda p: rnn.scan(rnn.gru_step, p, X, H, lengths=LENGTHS, return_sequences=False),
    "scan of a partial": lambda p: rnn.scan(functools.partial(rnn.gru_step, precision="bfloat16"), p, X, H),
    "scan of a closure": lambda p: rnn.scan(made, p, X, H),
    "remat": lambda p: rnn.remat(rnn.gru, 3)(p, X),
    "remat of a partial": lambda p: rnn.remat(functools.partial(rnn.gru, backend="scan"), 3)(p, X, lengths=LENGTHS),
    "masks": lambda p: rnn.stack(rnn.GRU, STACK, X, masks=MASKS, lengths=LENGTHS),
    "remat in a stack": lambda p: rnn.stack(rnn.GRU, {"layer_0": {"forward": p}}, X, engine=rnn.Engine(remat=3)),
}
CALLS |= {
    f"gradient of {name}": functools.partial(
        lambda call, p: jax.grad(lambda p: sum(part.sum() for part in jax.tree.leaves(call(p))))(p), CALLS[name]
    )
    for name in ("scan", "remat")
}


class Compilations:
    """How many programs JAX compiles meanwhile."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self)
        return self

    def __call__(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CALLS)
def test_eager_calls_compile_once(name):
    for _ in range(2):
        CALLS[name](PARAMS)
    with Compilations() as compilations:
        for _ in range(5):
            CALLS[name](PARAMS)
    assert compilations.count == 0


def test_another_option_is_another_program():
    """Whatever equals the option before, and is not it."""

    def typed(params, x, carry=None, *, scale, **options):
        return rnn.scan(lambda p, c, x_t: (c, jnp.asarray(scale) * jnp.ones(len(c))), params, x, H, **options)

    for scale in (1, 1.0, True, jnp.float32(1)):
        got = rnn.remat(typed, 3)(None, X, scale=scale)[1]
        assert got.dtype == typed(None, X, scale=scale)[1].dtype
    step = lambda p, c, x_t: (c, jnp.ones(len(c)) * jnp.asarray(p))  # noqa: E731
    assert [rnn.scan(step, p, X, H)[1][0, 0].item() for p in (2, 2.5, jnp.float32(3.0), True)] == [2, 2.5, 3, 1]


def test_numbers_of_params_stay_numbers():
    """A step may need them as such: for a shape, or for a branch."""

    def step(params, carry, x_t):
        return carry, x_t[:, : params["features"]] if params["few"] else x_t

    assert rnn.scan(step, {"features": 2, "few": True}, X, H)[1].shape == (4, 10, 2)
    assert rnn.scan(step, {"features": 2, "few": False}, X, H)[1].shape == (4, 10, 3)


def test_params_that_can_change_are_read_anew():
    """Of objects that JAX does not know nothing is kept."""

    class Module:
        weight = 1.0

        def step(self, _, carry, x_t):
            return carry, self.weight * x_t

    module = Module()
    for module.weight in (1.0, 2.0):
        assert rnn.scan(lambda m, c, x_t: (c, m.weight * x_t), module, X, H)[1][0, 0, 0] == module.weight
        assert rnn.scan(module.step, None, X, H)[1][0, 0, 0] == module.weight


def test_nothing_that_a_step_closes_over_is_kept():
    held = np.ones((4, 3))
    alive = weakref.ref(held)

    def call(held):
        return rnn.scan(lambda p, c, x_t: (c, x_t * held), None, X, H)

    before = len(eager._PROGRAMS)
    for _ in range(3):
        call(held)
        jax.grad(lambda w: rnn.scan(lambda p, c, x_t: (c, x_t * w), None, X, H)[1].sum())(2.0)
    del held
    gc.collect()
    assert alive() is None
    assert len(eager._PROGRAMS) == before


@pytest.mark.slow
def test_no_step_that_was_divided_and_no_cell_that_a_stack_ran_is_kept_for_good():
    def scanned(held):
        rnn.scan(lambda p, c, x_t: (c + x_t * held, c), None, X, X[:, 0], backend="fused")

    def stacked(held):
        def init(key, features, hidden_size):
            return {"w": jnp.ones((features, hidden_size))}

        def step(p, h, x_t):
            h = jnp.tanh(x_t @ p["w"] + h * held)
            return h, h

        cell = rnn.cell(step, init)
        params = rnn.init_stack(jax.random.key(0), cell, 3, 3, num_layers=1, bidirectional=False)
        rnn.stack(cell, params, X)

    alive = []
    for call in (scanned, stacked):
        held = np.ones(3)
        alive.append(weakref.ref(held))
        call(held)
    del held
    # What remembers a bounded number of steps forgets these after that many others, JAX too.
    for bounded in (recurrence._stages, readout._cut, _bound, _initial_shapes):
        bounded.cache_clear()
    jax.clear_caches()
    gc.collect()
    assert [one() for one in alive] == [None, None]


def test_programs_of_a_number_that_anneals_are_not_kept_for_good(monkeypatch):
    monkeypatch.setattr(eager, "MOST_PROGRAMS", 2)

    def step(p, h, x_t):
        return h, x_t * p

    for a in (0.1, 0.2, 0.3):
        assert float(rnn.scan(step, a, X, H)[1][0, 0, 0]) == pytest.approx(a * float(X[0, 0, 0]))
    assert len(eager._PROGRAMS[step]) == 2
    with ThreadPoolExecutor(8) as pool:
        for a, found in enumerate(pool.map(lambda a: rnn.scan(step, float(a), X, H)[1][0, 0, 0], range(24))):
            assert float(found) == pytest.approx(a * float(X[0, 0, 0]))
    assert len(eager._PROGRAMS[step]) == 2


def test_numbers_that_are_equal_or_unequal_to_themselves():
    def step(p, h, x_t):
        return h, x_t / p["a"]

    def call(a):
        return float(rnn.scan(step, {"a": a}, X, H)[1][0, 0, 0])

    assert [call(a) for a in (0.0, -0.0, 0.0)] == [np.inf, -np.inf, np.inf]
    assert np.isnan([call(float("nan")), call(float("nan"))]).all()
    assert len(eager._PROGRAMS[step]) == 3

    def scaled(p, h, x_t, a):
        return h, x_t / a

    def bound(a):
        return float(rnn.scan(functools.partial(scaled, a=a), None, X, H)[1][0, 0, 0])

    assert [bound(a) for a in (0.0, -0.0, 0.0)] == [np.inf, -np.inf, np.inf]


def test_steps_that_close_over_what_is_traced():
    def total(w):
        return rnn.scan(lambda p, c, x_t: (w * c + x_t, w * x_t), None, X, jnp.ones((4, 3)))[1].sum()

    np.testing.assert_allclose(jax.grad(total)(2.0), X.sum())
    np.testing.assert_allclose(jax.vmap(jax.grad(total))(jnp.arange(3.0)), jnp.full(3, X.sum()))
    np.testing.assert_allclose(jax.jit(jax.grad(lambda w: total(w) * total(w)))(2.0), 4.0 * X.sum() ** 2)


# ---- Derivatives of derivatives ----------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", ["auto", "fused", "native"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_second_derivative_names_the_backend_that_has_it(need_native, backend, dtype):
    """The same for all arrays, though what runs for float64 could be differentiated again."""
    need_native(backend)
    if backend == "native" and dtype == "float64":
        pytest.skip("the kernel computes in float32 only")

    def slope(h, backend):
        return jax.grad(lambda h: rnn.gru(PARAMS, X, h, backend=backend)[1].sum())(h).sum()

    with jax.enable_x64(dtype == "float64"):
        h = jnp.zeros((4, 8), dtype)
        assert bool(jnp.isfinite(jax.grad(slope)(h, "scan")).all())
        for second in (jax.grad(slope), lambda h, b: jax.jvp(lambda h: slope(h, b), (h,), (h,)), jax.hessian(slope)):
            with pytest.raises(ValueError, match=r"backend='scan'"):
                second(h, backend)


# ---- Memory ------------------------------------------------------------------------------


def temporaries(function, *arguments):
    """In MiB, of the program as users have it."""
    with quick_compiler(False):
        return memory_of(function, *arguments)


def memory_of(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 2**20


def replicas(count, *shape):
    params = jax.eval_shape(lambda: rnn.init_gru(jax.random.key(0), 1, 64))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*count, *leaf.shape), leaf.dtype), params)
    return params, jax.ShapeDtypeStruct((*count, *shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "backend"), [("jit", "native"), ("loop", "fused"), ("twice", "native")])
def test_gates_of_all_replicas_are_counted(need_native, monkeypatch, backend, way):
    """Also where `vmap` comes after the layer's shapes are fixed: around `jit`, or around a loop."""
    need_native(backend)
    # Eight replicas' gates take 15 MiB, more than this, and one's take less.
    monkeypatch.setattr(rnn.recurrence, "MOST_KEPT_BYTES", 4 << 20)
    gradient = jax.grad(lambda p, x: rnn.gru(p, x, backend=backend)[1].mean())
    loop = lambda p, x: jax.lax.fori_loop(0, 2, lambda _, p: jax.tree.map(jnp.add, p, gradient(p, x)), p)  # noqa: E731
    one = {"jit": jax.jit(gradient), "loop": loop, "twice": gradient}[way]
    several, count = (jax.vmap(jax.vmap(one)), (2, 4)) if way == "twice" else (jax.vmap(one), (8,))
    arguments = replicas(count, 8, 240, 1)
    few = temporaries(several, *arguments)
    monkeypatch.setattr(rnn.recurrence, "MOST_KEPT_BYTES", 1 << 40)
    jax.clear_caches()
    assert few < temporaries(several, *arguments) - 0.8 * 15


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("backend", ["fused", "native"])
def test_gradients_of_replicas_without_their_gates(need_native, monkeypatch, backend, cell):
    need_native(backend)
    run, init = {"lstm": (rnn.lstm, rnn.init_lstm), "gru": (rnn.gru, rnn.init_gru)}[cell]
    params = jax.vmap(lambda key: init(key, 3, 8))(jax.random.split(jax.random.key(0), 3))
    x = jax.random.normal(jax.random.key(1), (3, 4, 11, 3))

    def gradients(most):
        monkeypatch.setattr(rnn.recurrence, "MOST_KEPT_BYTES", most)
        total = lambda p, x: jnp.sin(run(p, x, lengths=LENGTHS, backend=backend)[1]).sum()  # noqa: E731
        return jax.jit(jax.vmap(jax.grad(total, (0, 1))))(params, x)

    one = 4 * 4 * 11 * 8 * 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients(2 * one), gradients(1 << 40)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("prime", "composite"), [(787, 784), (1021, 1024)])
def test_steps_without_a_divisor_take_no_more_memory(prime, composite):
    gradient = jax.grad(lambda p, x: rnn.gru(p, x, backend="fused")[1].mean())
    params, x = rnn.init_gru(jax.random.key(0), 1, 32), jax.ShapeDtypeStruct((8, composite, 1), jnp.float32)
    want = temporaries(gradient, params, x)
    assert temporaries(gradient, params, jax.ShapeDtypeStruct((8, prime, 1), jnp.float32)) < 1.05 * want


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("time", "reverse"), [(29, False), (37, True), (59, False)])
def test_steps_without_a_divisor_have_the_same_gradients(time, reverse):
    x = jax.random.normal(jax.random.key(1), (4, time, 3))

    def gradients(backend):
        lengths = jnp.array([time, 30, 1, 0]).clip(0, time)
        total = lambda p, x: jnp.sin(rnn.gru(p, x, lengths=lengths, reverse=reverse, backend=backend)[1]).sum()  # noqa: E731
        return jax.jit(jax.grad(total, (0, 1)))(PARAMS, x)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients("fused"), gradients("scan")
    )


# ---- explain -----------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru reset before"])
@pytest.mark.parametrize("backend", ["scan", "fused", "native"])
def test_explain_tells_the_bytes_that_are_kept(need_native, cell, backend):
    need_native(backend)
    reset_after = cell != "gru reset before"
    if not reset_after and backend != "scan":
        pytest.skip("only 'scan' has it")
    init = rnn.init_lstm if cell == "lstm" else functools.partial(rnn.init_gru, reset_after=reset_after)
    run = rnn.lstm if cell == "lstm" else functools.partial(rnn.gru, reset_after=reset_after)
    params, x = init(jax.random.key(0), 4, 64), jnp.ones((32, 100, 4))
    kept = jax.tree.leaves(jax.vjp(functools.partial(run, backend=backend), params, x)[1])
    known = sum(part.nbytes for part in jax.tree.leaves((params, x)))
    told = rnn.explain(params, x, backend=backend, reset_after=reset_after).saved_bytes
    assert told == pytest.approx(sum(part.nbytes for part in kept) - known, rel=0.005)


def test_explain_knows_the_carry():
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), (PARAMS, X))
        told = rnn.explain(params, x, jnp.zeros((4, 8), jnp.float64))
        assert told.backend == "fused"
        assert "float64" in told.why
        assert told.saved_bytes == 2 * rnn.explain(params, x, backend="fused").saved_bytes
    with pytest.raises(ValueError, match=r"^carry has shape"):
        rnn.explain(PARAMS, X, jnp.zeros((4, 7)))


@pytest.mark.parametrize("name", ["CPU", "cpu", None])
def test_explain_takes_a_platform_in_any_case(need_native, name):
    need_native()
    assert rnn.explain(PARAMS, X, platform=name).backend == "native"
    assert rnn.explain(PARAMS, X, platform="CUDA").backend == "fused"


def test_explain_refuses_platforms():
    with pytest.raises(ValueError, match=r"^platform is 'foo'; expected one of 'cpu', 'gpu', "):
        rnn.explain(PARAMS, X, platform="foo")


def test_explain_refuses_the_kernel_elsewhere(need_native):
    need_native()
    with pytest.raises(ValueError, match=r"^backend is 'native', but "):
        rnn.explain(PARAMS, X, backend="native", platform="gpu")


# ---- Symbolic sizes ----------------------------------------------------------------------

LAYERS = {
    "gru scan": (PARAMS, functools.partial(rnn.gru, backend="scan")),
    "gru fused": (PARAMS, functools.partial(rnn.gru, backend="fused")),
    "lstm fused": (rnn.init_lstm(jax.random.key(0), 3, 8), functools.partial(rnn.lstm, backend="fused")),
    "remat": (PARAMS, rnn.remat(functools.partial(rnn.gru, backend="fused"), 3)),
    "step": (PARAMS, lambda p, x, **o: rnn.scan(rnn.gru_step, p, x, jnp.zeros((x.shape[0], 8)), backend="fused", **o)),
    "min_gru": (MIN_GRU.init(jax.random.key(0), 3, 8), functools.partial(MIN_GRU.layer, backend="fused")),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, "b, t, 3") for name in LAYERS),
        ("gru fused", "4, t, 3"),
    ],
)
def test_export_of_symbolic_sizes(name, sizes):
    """Values and gradients, with lengths."""
    params, run = LAYERS[name]
    shape = export.symbolic_shape(sizes)
    x, lengths = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    call = jax.jit(jax.value_and_grad(lambda p, x, lengths: jnp.sin(run(p, x, lengths=lengths)[1]).sum()))
    got = export.export(call)(params, x, lengths).call(params, X, LENGTHS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), got, call(params, X, LENGTHS))


@pytest.mark.parametrize("backend", ["scan", "fused", "auto"])
def test_explain_of_symbolic_sizes(backend):
    told = rnn.explain(PARAMS, jax.ShapeDtypeStruct(export.symbolic_shape("b, 10, 3"), jnp.float32), backend=backend)
    assert "b bytes" in str(told).replace(" - 192 bytes", " bytes").replace("*b", " b")
    assert rnn.explain(PARAMS, X, backend=backend).backend == told.backend
