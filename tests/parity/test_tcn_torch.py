"""The temporal convolutional network against one of PyTorch's modules: values, gradients, sizes and first weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmnist_jax.models.tcn import TCN

torch = pytest.importorskip("torch", reason="PyTorch is the independent implementation to compare with")

# Flax adds 1e-12 to a kernel's squared norm, which shows in float64.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


class Block(torch.nn.Module):
    """Two dilated convolutions that see `pad` steps too many, which are cut off at the end."""

    def __init__(self, features, channels, kernel_size, dilation):
        super().__init__()
        self.pad = (kernel_size - 1) * dilation
        self.convs = torch.nn.ModuleList(
            torch.nn.utils.parametrizations.weight_norm(
                torch.nn.Conv1d(size, channels, kernel_size, padding=self.pad, dilation=dilation)
            )
            for size in (features, channels)
        )
        self.residual = torch.nn.Conv1d(features, channels, 1) if features != channels else None

    def forward(self, x):
        h = x
        for conv in self.convs:
            h = torch.relu(conv(h)[:, :, : -self.pad])
        return torch.relu(h + (x if self.residual is None else self.residual(x)))


class Net(torch.nn.Module):
    def __init__(self, features, channels, levels, kernel_size, num_classes):
        super().__init__()
        sizes = [features] + [channels] * levels
        self.blocks = torch.nn.Sequential(
            *(Block(size, channels, kernel_size, 2**level) for level, size in enumerate(sizes[:-1]))
        )
        self.dense = torch.nn.Linear(channels, num_classes)

    def forward(self, x, lengths, every_step):
        """Each sequence runs alone, cut to its length."""
        logits = []
        for sequence, length in zip(x, lengths, strict=True):
            features = self.blocks(sequence[:length].T[None])[0].T
            padding = torch.zeros(len(x[0]) - length, features.shape[1], dtype=x.dtype)
            logits.append(self.dense(torch.cat([features, padding]) if every_step else features[-1]))
        return torch.stack(logits)


def in_our_layout(net, read):
    """A tree as ours of what `read` takes from each of PyTorch's parameters."""

    def kernel_and_bias(layer, weight):
        return {"kernel": weight, "bias": read(layer.bias)}

    tcn = {}
    for level, block in enumerate(net.blocks):
        tcn[f"level_{level}"] = {}
        for index, conv in enumerate(block.convs):
            norm, direction = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
            tcn[f"level_{level}"] |= {
                f"conv_{index}": kernel_and_bias(conv, read(direction).transpose(2, 1, 0)),
                f"norm_{index}": {f"conv_{index}/kernel/scale": read(norm)[:, 0, 0]},
            }
        if block.residual is not None:
            tcn[f"level_{level}"]["residual"] = kernel_and_bias(block.residual, read(block.residual.weight)[:, :, 0].T)
    return {"tcn": tcn, "dense": kernel_and_bias(net.dense, read(net.dense.weight).T)}


def relative_error(found, expected):
    found = np.asarray(found)  # JAX would subtract in float32
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("features", "kernel_size", "lengths", "every_step"),
    [
        (2, 3, None, False),
        (2, 3, None, True),
        (2, 3, [23, 1, 9, 14], True),
        (2, 3, [23, 1, 9, 14], False),
        (5, 4, [23, 1, 9, 14], False),  # as many features as channels: no residual convolution
    ],
)
def test_values_and_gradients_agree(features, kernel_size, lengths, every_step, dtype):
    batch, time, channels, levels, classes = 4, 23, 5, 4, 3
    torch.manual_seed(0)
    net = Net(features, channels, levels, kernel_size, classes).to(getattr(torch, dtype))
    with torch.no_grad():
        for block in net.blocks:
            for conv in block.convs:
                # A norm other than the one that the direction happens to have.
                conv.parametrizations.weight.original0.mul_(1 + torch.rand(channels, 1, 1))
    rng = np.random.default_rng(1)
    x = rng.standard_normal((batch, time, features)).astype(dtype)
    bar = rng.standard_normal((batch, time, classes) if every_step else (batch, classes)).astype(dtype)

    x_torch = torch.from_numpy(x).requires_grad_()
    expected = net(x_torch, lengths or [time] * batch, every_step)
    expected.backward(torch.from_numpy(bar))
    params, gradients = (in_our_layout(net, read) for read in (lambda p: p.detach().numpy(), lambda p: p.grad.numpy()))

    model = TCN(num_classes=classes, channels=channels, levels=levels, kernel_size=kernel_size)
    with jax.enable_x64(dtype == "float64"):
        ends = None if lengths is None else jnp.array(lengths)

        def run(params, x):
            return model.apply({"params": params}, x, lengths=ends, every_step=every_step)

        @jax.jit
        def values_and_gradients(params, x, bar):
            found, pull_back = jax.vjp(run, params, x)
            return found, *pull_back(bar)

        found, params_bar, x_bar = values_and_gradients(*jax.tree.map(jnp.asarray, (params, x, bar)))

    assert found.dtype == dtype
    assert jax.tree.map(jnp.shape, params_bar) == jax.tree.map(jnp.shape, gradients)
    errors = jax.tree.map(
        relative_error, (found, x_bar, params_bar), (expected.detach().numpy(), x_torch.grad.numpy(), gradients)
    )
    assert max(jax.tree.leaves(errors)) <= TOLERANCE[dtype], errors


def test_sizes_of_the_papers_network_agree():
    model = TCN(num_classes=10, channels=25, levels=8, kernel_size=7)
    ours = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 784, 1)))["params"]
    theirs = in_our_layout(Net(1, 25, 8, 7, 10), lambda p: p.detach().numpy())
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
    count = sum(leaf.size for leaf in jax.tree.leaves(ours))
    assert count == sum(p.numel() for p in Net(1, 25, 8, 7, 10).parameters())


@pytest.mark.slow
def test_first_weights_are_spread_as_pytorchs():
    """Mean and standard deviation of each tensor, within what so many numbers can say."""
    torch.manual_seed(0)
    net = Net(4, 50, 2, 5, 100)
    torch.nn.init.normal_(net.blocks[0].residual.weight, 0.0, 0.01)
    theirs = in_our_layout(net, lambda p: p.detach().numpy())
    model = TCN(num_classes=100, channels=50, levels=2, kernel_size=5)
    ours = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2, 4)))["params"]
    for (path, mine), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        name = jax.tree_util.keystr(path)
        noise = float(other.std()) / math.sqrt(other.size)
        assert abs(float(mine.mean()) - other.mean()) <= 6 * noise, name
        if "scale" not in name:  # PyTorch's norms differ a little from channel to channel, ours are their mean
            assert abs(float(mine.std()) - other.std()) <= 6 * noise, name
