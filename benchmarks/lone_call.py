"""One call of a GRU's gradient by itself, outside a loop, as a user's own script makes it.

    python -m benchmarks.lone_call [--batch=20,32,48] [--json=FILE]

784 steps of one value, 128 units, float32. Such a call pays for fresh pages of memory, which one in a loop does not;
docs/speed.md has the variables of glibc that keep them.
"""

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import timing
from seqmnist_jax import rnn

FLAGS = flags.FLAGS


def lone_call(batch: int) -> timing.Program:
    """The gradient of the parameters of a layer whose last output is summed."""
    params = rnn.init_gru(jax.random.key(0), 1, 128)
    x = jax.random.uniform(jax.random.key(1), (batch, 784, 1))
    gradient = jax.jit(jax.grad(lambda params, x: jnp.sum(rnn.gru(params, x, return_sequences=False)[1] ** 2)))
    return timing.repeated(lambda: jax.block_until_ready(gradient(params, x)))


def main(argv: list[str]) -> None:
    """Measures and prints a table."""
    del argv
    programs = {batch: lone_call(int(batch)) for batch in FLAGS.batch}
    timings = timing.alternate(programs, rounds=FLAGS.rounds, seconds=FLAGS.seconds)
    rows = [{"batch": int(batch), **timings[batch].facts()} for batch in FLAGS.batch]
    print(timing.markdown(["batch", "ms a call"], [[row["batch"], row["milliseconds"]] for row in rows]))
    timing.write_json(FLAGS.json, {"rows": rows})


if __name__ == "__main__":
    flags.DEFINE_list("batch", ["20", "32", "48"], "How many sequences, one measurement each.")
    timing.define_measuring(rounds=5, seconds=1.0)
    app.run(main)
