"""One recurrent layer on a GPU: this repository's beside cuDNN, through PyTorch, in one process.

    python -m benchmarks.gpu_layers [--layers=gru:128:128,lem:128:128,gru:128:128:8] [--steps=784] [--json=FILE]

A layer is cell:hidden:batch[:replicas] and reads sequences of one feature from a zero state. Measured are
the forward pass to the last output, and that with the gradients of all parameters. LSTM and GRU run through
`rnn.lstm` and `rnn.gru`, other cells from their steps alone (`models.CELLS`) through `rnn.scan`. cuDNN runs
in float32 with TF32 products and in float16, called step by step and as a CUDA graph: its best counts.

Calls follow one another without waiting, as in training. Each result is compared with float64 on the CPU, which a
process of its own computes at the start, and with that of a second call, bit for bit. A batch holds the same
16 sequences again and again, in random order, so that one reference does for every batch.
"""

import concurrent.futures
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import peers, timing
from benchmarks.peers import Apply, Case
from seqmnist_jax import rnn
from seqmnist_jax.models import CELLS

FLAGS = flags.FLAGS
Array = jax.Array
Row = dict[str, Any]
Tree = dict[str, np.ndarray]
# The last output, and gradients by our names.
Results = tuple[np.ndarray, Tree]

# In order of importance: what is killed has written down what came before.
LAYERS = (
    *("gru:128:128", "lstm:128:128", "gru:128:1024", "gru:128:32", "gru:128:128:8", "gru:256:128", "gru:64:128"),
    *("lstm:128:1024", "lstm:128:32", "gru:256:32"),
)
# Cells without a product of the state, whose kernel is in float32 at every precision.
INDEPENDENT = ("ind_rnn", "lru", "s5", "min_lstm", "min_gru")
# Of which nobody has written a kernel.
FIELD = ("lem", "cornn", "elman", "ur_lstm", *INDEPENDENT)
FIELD_LAYERS = tuple(f"{cell}:128:128" for cell in FIELD)
SEQUENCES = 16
# What of ours is measured: contender -> options of the layer. The last two without the kernel.
OURS: dict[str, dict[str, str]] = {
    "bfloat16": {"precision": "bfloat16"},
    "tensorfloat32": {"precision": "tensorfloat32"},
    "float32": {"precision": "float32"},
    "fused": {"precision": "tensorfloat32", "backend": "fused"},
    "scan": {"precision": "tensorfloat32", "backend": "scan"},
}
# cuDNN's modes: contender -> (dtype, whether as a CUDA graph).
CUDNN = {
    "cudnn float32": ("float32", False),
    "cudnn float16": ("float16", False),
    "cudnn float32 graph": ("float32", True),
    "cudnn float16 graph": ("float16", True),
}
# Whose errors are told in the table.
CHECKED = ("bfloat16", "tensorfloat32", "float32", "cudnn float32", "cudnn float16")
WAYS = ("forward", "both")
# Of the independent cells those that are measured, and how many calls make a program: one is shorter than its dispatch.
OF_INDEPENDENT = {"float32": 8, "scan": 1}
# Programs that compile at a time.
COMPILERS = 4


class Problem(NamedTuple):
    """Parameters, x [batch, steps, 1] and the weight of each last output in the loss, [batch, hidden]; NumPy's.

    `order` says which of the 16 sequences each of the batch is. Of several replicas all but `order` have a
    leading axis.
    """

    params: Tree
    x: np.ndarray
    weight: np.ndarray
    order: np.ndarray


class Contender(NamedTuple):
    """What is measured: calls that return at once, and what waits for their results.

    `found` makes results of what `both` gives. A call does the work `repeats` times.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]
    found: Callable[[Any], Results]
    repeats: int = 1


def parse(layer: str, step_count: int) -> Case:
    """The case of cell:hidden:batch[:replicas]."""
    cell, hidden, batch, *replicas = layer.split(":")
    return Case(cell, int(hidden), 1, step_count, int(batch), *map(int, replicas))


def draw(case: Case) -> Problem:
    """The problem of a case, the same in every process of a machine."""
    with jax.default_device(jax.devices("cpu")[0]):
        return _draw_on_cpu(case)


def _draw_on_cpu(case: Case) -> Problem:
    few, problems = case._replace(batch=SEQUENCES), []
    rng = np.random.default_rng(case.batch)
    order = rng.permutation(case.batch) % SEQUENCES
    for replica in range(case.replicas):
        if case.cell in peers.CELLS:
            params, x = peers.draw(few, replica)
        else:
            _, x = peers.draw(few._replace(cell="gru"), replica)
            params = CELLS[case.cell].cell.init(jax.random.key(replica), case.features, case.hidden)
        weight = np.random.default_rng(replica).standard_normal((SEQUENCES, case.hidden)).astype(np.float32)
        # The loss's, and so the gradients, are those of the 16 sequences, where the batch is a multiple.
        share = np.float32(SEQUENCES / case.batch)
        arrays = {name: np.asarray(array) for name, array in params.items()}
        problems.append(Problem(arrays, np.asarray(x)[order], share * weight[order], order))
    if case.replicas == 1:
        return problems[0]
    stacked: Problem = jax.tree.map(lambda *leaves: np.stack(leaves), *problems)
    return stacked._replace(order=order)


def layer(case: Case, **options: Any) -> Apply:
    """(params, x) -> the last output, by our engine."""
    if case.cell in peers.CELLS:
        return peers.ours(case, {}, **options)[0]
    cell = CELLS[case.cell].cell

    def apply(params: Any, x: Array) -> Array:
        carry = cell.zero_carry(jnp.zeros((x.shape[0], case.hidden)))
        return rnn.scan(cell.step, params, x, carry, return_sequences=False, **options)[1]

    return apply


def gradients(apply: Apply) -> Callable[[Any, Array, Array], tuple[Any, Array]]:
    """(params, x, weight) -> (gradients of all parameters, the last output)."""

    def loss(params: Any, x: Array, weight: Array) -> tuple[Array, Array]:
        last = apply(params, x)
        # No product of matrices, which might be rounded.
        return jnp.sum(last * weight), last

    return jax.grad(loss, has_aux=True)


def chained(call: Callable[..., Any], repeats: int) -> Callable[..., Any]:
    """The call of (params, ...) so many times in one program, each with parameters that wait for the one before it."""

    def run(params: Any, *others: Array) -> Any:
        result = call(params, *others)
        for _ in range(repeats - 1):
            grads = result[0] if isinstance(result, tuple) else jax.tree.map(lambda _, last=result: last.sum(), params)
            params = jax.tree.map(lambda param, grad: param + 1e-30 * grad, params, grads)
            result = call(params, *others)
        return result

    return run


def of_ours(case: Case, problem: Problem, options: Mapping[str, str], repeats: int = 1) -> Contender:
    """Our layer as a contender; nothing is compiled yet."""
    apply = layer(case, **options)
    both = gradients(apply)
    if case.replicas > 1:
        apply, both = jax.vmap(apply), jax.vmap(both)
    forward, both = jax.jit(chained(apply, repeats)), jax.jit(chained(both, repeats))
    params, x, weight = jax.device_put(problem[:3])

    def found(result: Any) -> Results:
        grads, last = jax.tree.map(lambda array: np.asarray(array if case.replicas == 1 else array[0]), result)
        return last, grads

    calls = (lambda: forward(params, x)), (lambda: both(params, x, weight))
    return Contender(*calls, jax.block_until_ready, found, repeats)


def of_cudnn(case: Case, problem: Problem, dtype: str, as_graph: bool) -> Contender:
    """PyTorch's layer with the same weights as a contender; without a GPU on the CPU.

    Raises:
      ImportError, peers.Unavailable: it can't be had here.
    """
    import torch

    if case.cell not in peers.CELLS or case.replicas > 1:
        raise peers.Unavailable("cuDNN has neither other cells nor replicas")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and (as_graph or dtype != "float32"):
        raise peers.Unavailable("a CUDA graph and float16 need a GPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    device, kind = "cuda" if on_gpu else "cpu", getattr(torch, dtype)
    module, tensors = peers.torch_layer(case.cell, problem.params, batch_first=False)
    module.to(device, kind)
    # Time-major, as cuDNN has it; a batch of x costs PyTorch two transpositions more.
    x = torch.tensor(np.ascontiguousarray(problem.x.swapaxes(0, 1))).to(device, kind)
    weight = torch.tensor(problem.weight).to(device, kind)

    def last() -> Any:
        _, state = module(x)
        return (state[0] if isinstance(state, tuple) else state)[0]

    def forward() -> Any:
        with torch.no_grad():
            return last()

    def both() -> Any:
        h = last()
        return h, torch.autograd.grad((h * weight).sum(), list(tensors.values()))

    def wait(result: Any) -> Any:
        if on_gpu:
            torch.cuda.synchronize()
        return result

    def found(result: Any) -> Results:
        h, grads = result
        arrays = [grad.float().cpu().numpy().T for grad in grads]
        return h.detach().float().cpu().numpy(), dict(zip(tensors, arrays, strict=True))

    if as_graph:
        return Contender(_captured(forward), _captured(both), wait, found)
    return Contender(forward, both, wait, found)


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph; what it returns stays in the same place."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # JAX's threads may do what they like meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference, relative to that of what is expected; infinite where it is no number."""
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")


def errors(case: Case, problem: Problem, results: Results, reference: Mapping[str, np.ndarray]) -> Row:
    """How far results are from the reference's: the last output, and the worst gradient with its name."""
    last, grads = results
    expected = reference[f"{_key(case)}/last"]
    told = {name: relative(grad, reference[f"{_key(case)}/{name}"]) for name, grad in grads.items()}
    worst = max(told, key=lambda name: told[name])
    return {
        "last_error": relative(last, expected[problem.order]),
        "gradient_error": told[worst],
        "gradient_of": worst,
    }


def _key(case: Case) -> str:
    return f"{case.cell}:{case.hidden}"


def write_reference(cases: Sequence[Case], path: Path) -> None:
    """Last outputs and gradients of the 16 sequences in float64, by plain `lax.scan`, for each cell and size."""

    def one(case: Case) -> Tree:
        problem = draw(case._replace(batch=SEQUENCES, replicas=1))
        # The order is one of 16 here, and is taken back.
        inverse = np.argsort(problem.order)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda array: jnp.asarray(array[inverse], jnp.float64), problem[1:3])
            params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), problem.params)
            options = {"backend": "scan"} if case.cell in peers.CELLS else {}
            grads, last = jax.jit(gradients(layer(case, **options)))(params, *wide)
            assert last.dtype == jnp.float64
            return {f"{_key(case)}/{name}": np.asarray(array) for name, array in (grads | {"last": last}).items()}

    found: Tree = {}
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        for arrays in pool.map(one, {_key(case): case for case in cases}.values()):
            found |= arrays
    half = path.with_suffix(".half.npz")
    np.savez(half, **found)  # type: ignore[arg-type]
    half.replace(path)


def contenders(case: Case) -> dict[str, Callable[[Problem], Contender]]:
    """What can be tried with a case: name -> builder."""
    found: dict[str, Callable[[Problem], Contender]] = {}
    for name, options in OURS.items():
        if case.cell in INDEPENDENT and name in OF_INDEPENDENT:
            found[name] = functools.partial(of_ours, case, options=options, repeats=OF_INDEPENDENT[name])
        elif case.cell not in INDEPENDENT and (case.cell in peers.CELLS or name != "fused"):
            found[name] = functools.partial(of_ours, case, options=options)
    if case.cell in peers.CELLS and case.replicas == 1:
        for name, (dtype, as_graph) in CUDNN.items():
            found[name] = functools.partial(of_cudnn, case, dtype=dtype, as_graph=as_graph)
    return found


def prepare(build: Callable[[], Contender]) -> tuple[Contender | None, Row, Results]:
    """A contender that is compiled and has run; what its row says so far, and what `both` gave."""
    start = time.perf_counter()
    try:
        contender = build()
        contender.wait(contender.forward())
        last, grads = contender.found(contender.wait(contender.both()))
        told: Row = {"compile_seconds": time.perf_counter() - start}
        again, grads_again = contender.found(contender.wait(contender.both()))
    except Exception as error:  # of any library: one that fails must not keep the others from being measured
        reason = str(error).strip().splitlines() or [""]
        return None, {"problem": f"{type(error).__name__}: {reason[0][:300]}"}, (np.empty(0), {})
    pairs = [(last, again), *((grads[name], grads_again[name]) for name in grads)]
    told["equal_bits"] = all(one.tobytes() == other.tobytes() for one, other in pairs)
    return contender, told, (last, grads)


def measure(
    case: Case, reference: Callable[[], Mapping[str, np.ndarray]], *, rounds: int = 5, seconds: float = 0.03
) -> list[Row]:
    """One row for each contender of a case: its times, its errors, whether two calls give the same bits.

    Args:
      case: what is measured.
      reference: waits for the float64 results, and gives them.
      rounds, seconds: as in `timing.alternate`.
    """
    problem = draw(case)
    builders = {name: functools.partial(build, problem) for name, build in contenders(case).items()}
    rows: dict[str, Row] = {name: {**case._asdict(), "contender": name} for name in builders}
    ready: dict[str, Contender] = {}
    ours = [name for name in builders if name in OURS]
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        prepared = dict(zip(ours, pool.map(prepare, (builders[name] for name in ours)), strict=True))
    # PyTorch's in this thread, one after the other: a graph takes all that its thread does.
    prepared |= {name: prepare(build) for name, build in builders.items() if name not in OURS}
    known = reference()  # which also has the processor idle from here on
    for name, (contender, told, results) in prepared.items():
        rows[name] |= told
        if contender is not None:
            ready[name] = contender
            rows[name] |= errors(case, problem, results, known)
    for way in WAYS:
        programs = {name: timing.repeated(getattr(contender, way), contender.wait) for name, contender in ready.items()}
        for name, took in timing.alternate(programs, rounds=rounds, seconds=seconds).items():
            rows[name][way] = took.shared(ready[name].repeats).facts()
    if case.cell in INDEPENDENT:
        for row in rows.values():
            row["least_milliseconds"] = 1e3 * moved_bytes(case) / bandwidth()
    for name, options in OURS.items():
        if "backend" not in options and name in rows:
            rows[name]["explained"] = explained(case, problem, options)
    return list(rows.values())


def moved_bytes(case: Case) -> int:
    """What an independent cell's gradients can't do without: x read twice, the carries written once and read once."""
    carry = CELLS[case.cell].cell.zero_carry(jnp.zeros((case.batch, case.hidden)))
    carries = sum(leaf.nbytes for leaf in jax.tree.leaves(carry))
    return 2 * case.replicas * case.steps * (carries + 4 * case.batch * case.features)


@functools.cache
def bandwidth() -> float:
    """Bytes that the device reads and writes in a second, measured where an array that no cache holds is copied."""
    numbers = jnp.ones((1 << (28 if jax.default_backend() == "gpu" else 22),), jnp.float32)
    copied = jax.jit(lambda array: array + 1)
    program = timing.repeated(lambda: copied(numbers), jax.block_until_ready)
    took = timing.alternate({"copy": program}, rounds=5, seconds=0.03)["copy"]
    return 2 * numbers.nbytes / took.median


def explained(case: Case, problem: Problem, options: Mapping[str, str]) -> str:
    """What runs one replica's layer, and why."""
    params, x = jax.tree.map(lambda array: array if case.replicas == 1 else array[0], problem[:2])
    if case.cell in peers.CELLS:
        return str(rnn.explain(params, x, **options))  # type: ignore[arg-type]
    cell = CELLS[case.cell].cell
    return rnn.explain_step(cell.step, params, x, cell.zero_carry(jnp.zeros((case.batch, case.hidden))), **options)  # type: ignore[arg-type]


def milliseconds(row: Row, way: str) -> float | None:
    """The median of a row's way; None where it was not measured."""
    return row[way]["milliseconds"] if way in row else None


def table(rows: Sequence[Row]) -> str:
    """Rows as two tables, milliseconds and errors by layer and contender, with notes on what ran and what could not."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        replicas = f" x {row['replicas']}" if row["replicas"] > 1 else ""
        words = f"{row['cell']} {row['hidden']}, batch {row['batch']}{replicas}"
        by_case.setdefault(words, {})[row["contender"]] = row
    times, checks, notes = [], [], []
    for words, found in by_case.items():
        for way in WAYS:
            told = {name: milliseconds(row, way) for name, row in found.items()}
            cudnn = {name: took for name in CUDNN if (took := told.get(name)) is not None}
            best = min(cudnn, key=lambda name: cudnn[name], default=None)
            others = (cudnn[best] if best else None, told.get("scan"))
            kernel = told.get("bfloat16", told.get("float32"))
            factors = [other / kernel if other and kernel else None for other in others]
            factors.append(found["float32"].get("least_milliseconds") if way == "both" and "float32" in found else None)
            best_words = f"{cudnn[best]:.3g} ({best.removeprefix('cudnn ')})" if best else None
            times.append([f"{words}, {way}", *(told.get(name) for name in OURS), best_words, *factors])
        checks.append([words, *(_errors_in_words(found.get(name, {})) for name in CHECKED)])
        for name, row in found.items():
            if "explained" in row:
                notes.append(f"{words}, {name}: {row['explained']}")
            if row.get("equal_bits") is False:
                notes.append(f"{words}, {name}: two calls differ")
            if "problem" in row and not row["problem"].startswith(peers.Unavailable.__name__):
                notes.append(f"{words}, {name}: {row['problem'][:120]}")
    header = ["milliseconds", *OURS, "cuDNN's best", "cuDNN / kernel", "scan / kernel", "its arrays once"]
    parts = [timing.markdown(header, times), timing.markdown(["errors: last output, worst gradient", *CHECKED], checks)]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _errors_in_words(row: Row) -> str | None:
    return f"{row['last_error']:.0e}, {row['gradient_error']:.0e}" if "last_error" in row else None


def cudnn_version() -> int | None:
    """PyTorch's cuDNN, as a number; None where there is none."""
    try:
        import torch
    except ImportError:
        return None
    return torch.backends.cudnn.version() if torch.cuda.is_available() else None


def define_flags() -> None:
    """The flags of this module as a command."""
    flags.DEFINE_list("layers", [*LAYERS, *FIELD_LAYERS], "cell:hidden:batch[:replicas], each.")
    flags.DEFINE_integer("steps", 784, "Steps of a sequence.")
    flags.DEFINE_string("reference", "", "Only writes the float64 results into this file, which a run does itself.")
    timing.define_measuring(rounds=5, seconds=0.03)


def main(argv: list[str]) -> None:
    """Measures, writes the JSON file after each layer, prints the tables."""
    del argv
    cases = [parse(each, FLAGS.steps) for each in FLAGS.layers]
    if FLAGS.reference:
        write_reference(cases, Path(FLAGS.reference))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.npz"
        command = [sys.executable, "-m", "benchmarks.gpu_layers", f"--reference={path}", *sys.argv[1:]]
        with subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}) as child:

            def reference() -> Mapping[str, np.ndarray]:
                if child.wait() != 0:
                    sys.exit("The float64 reference failed; see above.")
                return np.load(path)

            for case in cases:
                start = time.perf_counter()
                rows += measure(case, reference, rounds=FLAGS.rounds, seconds=FLAGS.seconds)
                print(f"{_key(case)}, batch {case.batch}: {time.perf_counter() - start:.1f} s", flush=True)
                timing.write_json(FLAGS.json, {"rows": rows, "cudnn": cudnn_version()})
    print(f"\n{timing.facts()['device']}\n\n{table(rows)}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
