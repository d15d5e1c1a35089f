"""The floor under a recurrent layer's time: its matrix products at the best rate the machine has shown.

    python -m benchmarks.floor

The rate is the highest of `jnp.dot` in float32 over a few shapes, square and tall, on all cores that
the process may use. No layer that makes these products in float32 runs faster by much; how far above
it a layer stays is what it spends on gates, memory and waiting.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app

from benchmarks import timing
from benchmarks.peers import Case

GATES = {"gru": 3, "lstm": 4}
# (rows, inner, columns) of the products that are tried.
SHAPES = (
    (1024, 1024, 1024),
    (2048, 1024, 1024),
    (4096, 512, 512),
    (4096, 128, 1024),
    (25088, 128, 384),
    (384, 25088, 128),
)


class Rate(NamedTuple):
    """The fastest product: floating-point operations a second, and (rows, inner, columns)."""

    flops: float
    shape: tuple[int, int, int]


def flops(case: Case, kind: str) -> float:
    """Floating-point operations of the matrix products.

    Forward: the product with the input and the one with h. A training step adds two for the latter
    (gradients of the kernel and of h) and one for the former, as nobody asks for the gradient of x.
    """
    inputs, recurrent = {"forward": (1, 1), "step": (2, 3)}[kind]
    rows, columns = case.replicas * case.batch * case.steps, GATES[case.cell] * case.hidden
    return 2.0 * rows * columns * (inputs * case.features + recurrent * case.hidden)


def best_rate(shapes: tuple[tuple[int, int, int], ...] = SHAPES, rounds: int = 5, seconds: float = 0.2) -> Rate:
    """The highest float32 rate of `jnp.dot` over shapes."""

    def product(shape: tuple[int, int, int]) -> timing.Program:
        rows, inner, columns = shape
        left, right = jnp.ones((rows, inner)), jnp.ones((inner, columns))
        dot = jax.jit(lambda a, b: jnp.dot(a, b, precision="highest"))
        return timing.repeated(lambda: jax.block_until_ready(dot(left, right)))

    found = timing.alternate({str(shape): product(shape) for shape in shapes}, rounds=rounds, seconds=seconds)
    rates = [Rate(2.0 * m * k * n / found[str((m, k, n))].median, (m, k, n)) for m, k, n in shapes]
    return max(rates)


def words(rate: Rate) -> str:
    """A rate as a line of text."""
    return f"jnp.dot reaches {rate.flops / 1e9:.0f} GFLOP/s in float32, with {' x '.join(map(str, rate.shape))}."


def main(argv: list[str]) -> None:
    """Prints the rate."""
    del argv
    print(words(best_rate()))


if __name__ == "__main__":
    app.run(main)
