"""Builds the kernel now, and says what came of it: ``python -m seqmnist_jax.rnn.native``."""

from seqmnist_jax.rnn import native

if __name__ == "__main__":
    problem = native.problem()
    print(
        "The recurrence kernel is ready."
        if problem is None
        else f"No recurrence kernel: {problem}. JAX's own loop runs."
    )
