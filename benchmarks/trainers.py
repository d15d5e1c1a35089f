"""Whole training of a config, by this repository and by PyTorch: same weights, examples, clip and optimiser.

PyTorch's side is written by hand, from the equations of the recipe; what only reports (accuracy on
training batches, norms of gradients) and the check for finite numbers are on our side alone.
"""

from collections.abc import Hashable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import peers
from seqmnist_jax.data.batches import ExampleStream
from seqmnist_jax.devices.trees import stack, tensor_names
from seqmnist_jax.models import CELLS
from seqmnist_jax.models.classifier import NORM_EPSILON
from seqmnist_jax.training import optimizers, plan
from seqmnist_jax.training.clock import Clock
from seqmnist_jax.training.programs import Programs
from seqmnist_jax.training.run import Run, build_run
from seqmnist_jax.training.state import data_key

LAYER = ("rnn", "layer_0", "forward")


class Trainer(Protocol):
    """A model in training."""

    def advance(self, count: int) -> None:
        """Trains so many steps more and waits until they are done."""

    def validate(self) -> float:
        """The accuracy on the validation images."""

    def tensors(self) -> dict[str, np.ndarray]:
        """The model's parameters by our paths, in our layout."""


class OurTrainer:
    """This repository's training, by the programs of `python launch.py`.

    Attributes:
      clock: what it spent on compiling, training and evaluation.
    """

    def __init__(self, config: ml_collections.ConfigDict, replicas: int = 1):
        """Trains the config; or so many replicas of it, of which only `advance` is for use, from seeds that differ."""
        seeds = range(config.seed, config.seed + replicas)
        runs = [member.run for member in plan.build_points(config, {plan.SEED: tuple(seeds)})]
        self.clock = Clock()
        state = stack([jax.jit(run.learner.init_from)(run.learner.seed, run.learner.hyper) for run in runs])
        self._programs = Programs(runs, state, self.clock)
        self._state = self._programs.place(state)
        self._step = 0
        self._alive = np.ones(replicas, bool)

    def advance(self, count: int) -> None:
        """Trains so many steps more, in as few dispatches as the stream of examples allows."""
        end = self._step + count
        while self._step < end:
            self._state, self._step, alive = self._programs.train(
                self._state, self._step, end - self._step, self._alive
            )
            if not alive.all():
                raise FloatingPointError(f"Training diverged at step {self._step + 1}.")

    def validate(self) -> float:
        """The accuracy on the validation images."""
        ((scores, _),) = self._programs.evaluate(self._state.variables, "validation")
        return scores["accuracy"]

    def tensors(self) -> dict[str, np.ndarray]:
        """The model's parameters by their paths."""
        leaves = map(np.asarray, jax.tree.leaves(self._state.params))
        return dict(zip(tensor_names(self._state.params), leaves, strict=True))


def _check(config: ml_collections.ConfigDict) -> None:
    """Refuses what PyTorch's side does not have."""
    model, optimizer = config.model, config.optimizer
    supported = {
        "model.cell": (model.cell, tuple(peers.CELLS)),
        "model.precision": (model.get("precision", "float32"), ("float32", "auto")),  # the same on a CPU
        "model.num_layers": (model.num_layers, (1,)),
        "model.bidirectional": (model.bidirectional, (False,)),
        "model.norm": (model.norm, ("none", "frozen")),
        "optimizer.name": (optimizer.name, ("rmsprop",)),
        "data.min_length": (config.data.min_length, (0,)),
        **{f"model.dropout.{name}": (keep, (1.0,)) for name, keep in model.dropout.items()},
    }
    for name, (value, allowed) in supported.items():
        if value not in allowed:
            raise peers.Unavailable(f"PyTorch's side of the benchmark has no {name} = {value!r}")


class TorchTrainer:
    """The same training in PyTorch, on all cores that the process may use."""

    def __init__(self, config: ml_collections.ConfigDict):
        peers.need_cpu()
        _check(config)
        run = build_run(config)
        self._run, self._config = run, config
        state = jax.jit(run.learner.init)()
        self._make_model(state.params)
        self._make_optimizer()
        train = run.task.part("train")
        self._images, self._labels = self._on_torch(train.images, train.labels)
        self._validation = self._on_torch(*_validation(run))
        self._stream = ExampleStream(data_key(state), len(train), run.batch_size)
        self._step = 0

    def _make_model(self, params: Any) -> None:
        import torch

        layer = params
        for name in LAYER:
            layer = layer[name]
        self._layer, tensors = peers.torch_layer(self._config.model.cell, layer)
        self._tensors: dict[optimizers.Path, Any] = {(*LAYER, name): tensor for name, tensor in tensors.items()}
        for part in ("norm", "dense"):
            for name, value in params.get(part, {}).items():
                self._tensors[part, name] = torch.tensor(np.asarray(value), requires_grad=True)

    def _make_optimizer(self) -> None:
        import torch

        optimizer, train = self._config.optimizer, self._config.train
        unit_rate = optimizers.build_schedule(self._config)
        self._rates = optimizer.learning_rate * np.asarray(
            jax.vmap(lambda step: jnp.float32(unit_rate(step)))(jnp.arange(train.steps + 1))
        )
        joint = CELLS[self._config.model.cell].joint_kernels
        groups: dict[Hashable, list[int]] = {}
        for index, path in enumerate(self._tensors):
            if optimizers.CLIP_MASKS[optimizer.clip.mask](path):
                groups.setdefault(optimizers.CLIP_UNITS[optimizer.clip.unit](path, joint), []).append(index)
        self._groups = list(groups.values())
        self._weights = list(self._tensors.values())
        initial = optimizer.rmsprop_initial_mean_square
        self._mean_squares = [torch.full_like(weight, initial, requires_grad=False) for weight in self._weights]

    def _on_torch(self, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        import torch

        return torch.tensor(images), torch.tensor(labels.astype(np.int64))

    def _logits(self, images: Any) -> Any:
        """The model on images uint8 [batch, height, width]."""
        view = self._run.task.view
        pixels = images.flatten(1).float() / 255.0
        if view.permutation is not None:
            pixels = pixels[:, view.permutation]
        _, last = self._layer(pixels.view(len(images), view.sequence_length, view.features))
        h = (last[0] if isinstance(last, tuple) else last)[0]
        if ("norm", "scale") in self._tensors:
            # Batch normalisation whose moving mean stays 0 and variance 1.
            root = (1.0 + NORM_EPSILON) ** 0.5
            h = h / root * self._tensors["norm", "scale"] + self._tensors["norm", "bias"]
        return h @ self._tensors["dense", "kernel"] + self._tensors["dense", "bias"]

    def _update(self, gradients: list[Any]) -> None:
        """The clip, and TF1's RMSProp: the epsilon is inside the root."""
        import torch

        optimizer = self._config.optimizer
        norms = torch._foreach_norm(gradients)
        for group in self._groups:
            norm = torch.stack([norms[index] for index in group]).norm().item()
            if norm > optimizer.clip.norm:
                torch._foreach_mul_([gradients[index] for index in group], optimizer.clip.norm / norm)
        decay = optimizer.rmsprop_decay
        torch._foreach_mul_(self._mean_squares, decay)
        torch._foreach_addcmul_(self._mean_squares, gradients, gradients, 1.0 - decay)
        roots = torch._foreach_add(self._mean_squares, optimizer.rmsprop_epsilon)
        torch._foreach_sqrt_(roots)
        rate = float(self._rates[min(self._step, len(self._rates) - 1)])
        torch._foreach_addcdiv_(self._weights, gradients, roots, -rate)

    def advance(self, count: int) -> None:
        """Trains so many steps more."""
        import torch

        size = self._run.batch_size
        for _ in range(count):
            orders, offset, _ = self._stream.window(self._step)
            batch = self._torch_orders(orders)[offset : offset + size]
            loss = torch.nn.functional.cross_entropy(self._logits(self._images[batch]), self._labels[batch])
            gradients = list(torch.autograd.grad(loss, self._weights))
            with torch.no_grad():
                self._update(gradients)
            self._step += 1

    def _torch_orders(self, orders: jax.Array) -> Any:
        """An epoch's order as a tensor, copied once."""
        import torch

        if getattr(self, "_orders", (None,))[0] is not orders:
            self._orders = (orders, torch.tensor(np.asarray(orders)))
        return self._orders[1]

    def validate(self) -> float:
        """The accuracy on the validation images."""
        import torch

        images, labels = self._validation
        with torch.no_grad():
            parts = [self._logits(part).argmax(1) for part in images.split(self._run.eval_batch_size)]
        return (torch.cat(parts) == labels).double().mean().item()

    def tensors(self) -> dict[str, np.ndarray]:
        """The model's parameters by our paths, in our layout."""
        return {
            "/".join(path): tensor.detach().numpy().T if path[0] == "rnn" else tensor.detach().numpy()
            for path, tensor in self._tensors.items()
        }


def _validation(run: Run) -> tuple[np.ndarray, np.ndarray]:
    part = run.task.part("validation")
    return part.images, part.labels


TRAINERS: dict[str, type[OurTrainer] | type[TorchTrainer]] = {"ours": OurTrainer, "torch": TorchTrainer}
