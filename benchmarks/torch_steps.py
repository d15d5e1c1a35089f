"""Elman's network and LEM as one writes them in PyTorch: a loop in Python, with the step compiled too, and `nn.RNN`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.peers import FEEDBACK
from seqmnist_jax.models.cells import lem

WAYS = ("torch", "torch_compiled", "nn_rnn")


def _elman(p: Any, carry: Any, x: Any) -> Any:
    import torch

    return (torch.tanh(x @ p["kernel"] + carry[0] @ p["recurrent_kernel"] + p["bias"]),)


def _lem(p: Any, carry: Any, x: Any) -> Any:
    import torch

    y, z = carry
    i = x @ p["kernel"] + p["bias"]
    a, b, c = torch.chunk(i[:, : 3 * y.shape[1]] + y @ p["recurrent_kernel"], 3, dim=1)
    a, b = lem.DT * torch.sigmoid(a), lem.DT * torch.sigmoid(b)
    z = (1 - a) * z + a * torch.tanh(c)
    return (1 - b) * y + b * torch.tanh(z @ p["memory_kernel"] + i[:, 3 * y.shape[1] :]), z


# The step, of which the first part of the carry is the output, and how many parts there are.
STEPS: dict[str, tuple[Callable[..., Any], int]] = {"elman": (_elman, 1), "lem": (_lem, 2)}


def has(way: str, cell: str) -> bool:
    """Whether a cell is written in this way."""
    return cell == "elman" if way == "nn_rnn" else cell in STEPS


def program(way: str, cell: str, params: Any, x: Any) -> timing.Program:
    """Training steps of the network whose loss is the sum of squares of its last output.

    Args:
      way: one of `WAYS`.
      cell: 'elman' or 'lem'.
      params, x: as the cell's step takes them, x [batch, time, features].
    """
    import torch

    torch.set_num_threads(timing.cores())
    given = torch.tensor(np.asarray(x))
    weights = {name: torch.tensor(np.asarray(value), requires_grad=True) for name, value in params.items()}
    hidden = weights["bias"].shape[0] // (4 if cell == "lem" else 1)
    module = torch.nn.RNN(x.shape[2], hidden, batch_first=True)
    if way == "nn_rnn":
        weights = dict(module.named_parameters())
    step, parts = STEPS[cell]
    step = torch.compile(step) if way == "torch_compiled" else step

    def last() -> Any:
        if way == "nn_rnn":
            return module(given)[1]
        carry = (torch.zeros(x.shape[0], hidden),) * parts
        for t in range(x.shape[1]):
            carry = step(weights, carry, given[:, t])
        return carry[0]

    values = list(weights.values())

    def run(count: int) -> None:
        for _ in range(count):
            gradients = torch.autograd.grad(last().square().sum(), values)
            with torch.no_grad():
                torch._foreach_add_(values, gradients, alpha=-FEEDBACK)

    return run
