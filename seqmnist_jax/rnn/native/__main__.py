"""Makes ready what the kernels of all cells share, and says what came of it: ``python -m seqmnist_jax.rnn.native``."""

from seqmnist_jax.rnn.native.cpu import calls as cpu

if __name__ == "__main__":
    problem = cpu.problem()
    print(
        "Kernels can be made here: each when its cell is first used."
        if problem is None
        else f"No kernels: {problem}. JAX's own loop runs."
    )
