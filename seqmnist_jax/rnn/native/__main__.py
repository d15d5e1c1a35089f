"""Builds the kernels of the LSTM and the GRU now, and says what came of it: ``python -m seqmnist_jax.rnn.native``."""

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn

if __name__ == "__main__":
    for init in (rnn.init_lstm, rnn.init_gru):
        for features in (1, 28):
            params = jax.eval_shape(lambda key, n=features, init=init: init(key, n, 16), jax.random.key(0))
            x = jax.ShapeDtypeStruct((1, 1, features), jnp.float32)
            found = [rnn.explain(params, x, platform="cpu", precision=name) for name in ("float32", "bfloat16")]
    print(f"{found[-1].backend}: {found[-1].why}")
