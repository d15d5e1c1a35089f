"""The temporal convolutional network of Bai, Kolter & Koltun 2018, as a Flax module.

Levels of two causal convolutions each, the dilation doubling from one level to the next (sec. 3 and
fig. 1 of the paper, arXiv 1803.01271; the authors' code is github.com/locuslab/TCN).

Parameters: params['tcn']['level_0' ...]['conv_0' | 'conv_1' | 'norm_0' | 'norm_1' | 'residual'], ['dense'].

Where only the last step is read, level i is computed at every 2**i-th step alone, counted back from the
last, because the levels above reach no other. On that grid its dilation is 1 and its second convolution
has stride 2. All levels together then take the work of about 3 convolutions over the whole sequence, not
2 * levels, and the result is the same.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmnist_jax.models.head import WithoutRecurrence, zero_unless
from seqmnist_jax.rnn.scan import without_padding
from seqmnist_jax.rnn.stack import Probability

Array = jax.Array
Initializer = Callable[..., Array]

# Full float32 on every device.
_EXACT = jax.lax.Precision.HIGHEST
# Root mean square of a kernel's norm under `_torch_uniform`: fan_in weights, each of variance 1 / (3 fan_in).
SCALE_INIT = 3**-0.5
# Standard deviation of the residual convolution's first kernel.
RESIDUAL_STDDEV = 0.01


def _torch_uniform(fan_in: int) -> Initializer:
    """U(-1 / sqrt(fan_in), 1 / sqrt(fan_in)), as PyTorch's convolution and linear layer draw kernel and bias."""
    limit = fan_in**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def _strided(x: Array, stride: int) -> Array:
    """Every stride-th step of x [batch, time, ...], the last among them."""
    return x[:, (x.shape[1] - 1) % stride :: stride]


def _convolve(x: Array, kernel: Array, strides: int, padding: tuple[int, int], steps: int, taps: int) -> Array:
    """XLA's convolution of [batch, time, in] with [size, in, out]; the input's and the kernel's steps lie apart."""
    layout = ("NHC", "HIO", "NHC")
    return jax.lax.conv_general_dilated(x, kernel, (strides,), [padding], (steps,), (taps,), layout, precision=_EXACT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def causal_convolution(x: Array, kernel: Array, stride: int = 1, dilation: int = 1) -> Array:
    """Output o is sum_k x[t(o) - (size - 1 - k) * dilation] @ kernel[k], the last at the last step.

    The gradients are those that JAX derives, written out because of XLA on CPUs: it hands a convolution to its
    fast library only if the axes stand in that library's order, and orders them only outside of loops
    (jax-ml/jax#12868). The derived gradients have another order, and a training program is a loop over steps,
    where they took 13 and 25 times as long (stride 2 and 1). Here the axes are moved first. The price: no forward mode.

    Args:
      x: [batch, time, in], with zeros before its first step.
      kernel: [size, in, out].
      stride: steps between two outputs: t(o + 1) = t(o) + stride.
      dilation: steps between two taps.

    Returns:
      [batch, ceil(time / stride), out].
    """
    before = (kernel.shape[0] - 1) * dilation - (x.shape[1] - 1) % stride
    return _convolve(x, kernel, stride, (before, 0), 1, dilation)


def _convolution_forward(x: Array, kernel: Array, stride: int, dilation: int) -> tuple[Array, tuple[Array, Array]]:
    return causal_convolution(x, kernel, stride, dilation), (x, kernel)


def _convolution_backward(
    stride: int, dilation: int, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    reach, skipped = (kernel.shape[0] - 1) * dilation, (x.shape[1] - 1) % stride
    # Backwards in time through the same kernel, from outputs to inputs.
    turned = kernel[::-1].swapaxes(1, 2)
    dx = _convolve(gradient, turned, 1, (skipped, reach), stride, dilation)
    # The outputs' gradient is the kernel, the batch is summed over as features are, and tap k is output k.
    dkernel = _convolve(x.transpose(2, 1, 0), gradient.swapaxes(0, 1), dilation, (reach - skipped, 0), 1, stride)
    return dx, dkernel.swapaxes(0, 1)


causal_convolution.defvjp(_convolution_forward, _convolution_backward)


class CausalConv(nn.Module):
    """`causal_convolution` with a kernel and a bias, drawn as PyTorch draws them.

    Attributes:
      channels, kernel_size, dilation, stride: as of `TemporalBlock`.
    """

    channels: int
    kernel_size: int
    dilation: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, time, features] to [batch, ceil(time / stride), channels]."""
        init = _torch_uniform(self.kernel_size * x.shape[-1])
        kernel = self.param("kernel", init, (self.kernel_size, x.shape[-1], self.channels))
        bias = self.param("bias", init, (self.channels,))
        return causal_convolution(x, kernel, self.stride, self.dilation) + bias


class TemporalBlock(nn.Module):
    """relu(F(x) + x), F being two times convolution, ReLU and dropout.

    Both convolutions are causal, and weight-normalised (Salimans & Kingma 2016): each channel's kernel
    is scale * v / ||v||. Where channels differ, x is mapped linearly step by step, which is a convolution of size 1.

    Attributes:
      channels, kernel_size, dilation: of both convolutions.
      stride: steps between two outputs, of which the last is at the last step.
      data_axis: as of `TCN`.
    """

    channels: int
    kernel_size: int
    dilation: int = 1
    stride: int = 1
    data_axis: str | None = None

    @nn.compact
    def __call__(self, x: Array, started: Array | None, keep: Probability) -> Array:
        """[batch, time, features] to [batch, ceil(time / stride), channels].

        Args:
          x: the input.
          started: bool [batch, time]; before a sequence's start its features are zero. None: all start at once.
          keep: the probability to keep a feature at a step; None for no dropout.
        """
        h = x
        for index, stride in enumerate((1, self.stride)):
            convolution = CausalConv(self.channels, self.kernel_size, self.dilation, stride, name=f"conv_{index}")
            norm = nn.WeightNorm(convolution, scale_init=nn.initializers.constant(SCALE_INIT), name=f"norm_{index}")
            h = nn.relu(norm(h))
            if index == 0:
                h = zero_unless(started, h)
            if keep is not None:
                key = self.make_rng("dropout")
                if self.data_axis is not None:
                    key = jax.random.fold_in(key, jax.lax.axis_index(self.data_axis))
                h = jnp.where(jax.random.bernoulli(key, keep, h.shape), h / keep, 0.0)
        x = _strided(x, self.stride)
        if x.shape[-1] != self.channels:
            x = nn.Dense(
                self.channels,
                kernel_init=nn.initializers.normal(RESIDUAL_STDDEV),
                bias_init=_torch_uniform(x.shape[-1]),
                precision=_EXACT,
                name="residual",
            )(x)
        return zero_unless(None if started is None else _strided(started, self.stride), nn.relu(h + x))


class TemporalConvNet(nn.Module):
    """The levels, one above the other.

    Attributes:
      channels, levels, kernel_size, data_axis: as in `TCN`.
    """

    channels: int
    levels: int
    kernel_size: int
    data_axis: str | None

    @nn.compact
    def __call__(self, x: Array, started: Array | None, keep: Probability, every_step: bool) -> Array:
        """Features [batch, time, channels] of every step, or [batch, channels] of the last; arguments as a block's."""
        for level in range(self.levels):
            dilation, stride = (2**level, 1) if every_step else (1, 2)
            sizes = (self.channels, self.kernel_size, dilation, stride)
            block = TemporalBlock(*sizes, self.data_axis, name=f"level_{level}")
            x = block(x, started, keep)
            started = None if started is None else _strided(started, stride)
        return x if every_step else x[:, -1]


class TCN(WithoutRecurrence):
    """Reads a sequence and names its class from the last level's features at the last step, or at each.

    The authors draw the convolutions' kernels from N(0, 0.01), but weight norm computes the kernel anew from
    v and scale at each pass, so that draw has no effect. Ours starts as theirs in fact runs: v from PyTorch's
    default distribution, and scale at the norm of such a v, in root mean square. Their residual
    convolution has no weight norm; there N(0, 0.01) holds.

    Attributes:
      num_classes: the number of logits.
      channels: features of each level.
      levels: blocks of two convolutions; level i has dilation 2**i.
      kernel_size: taps of a convolution.
      data_axis: None, or in training the axis of a ``shard_map`` over which batches are divided. What
        is dropped then depends on the number of devices.
    """

    num_classes: int
    channels: int = 25
    levels: int = 8
    kernel_size: int = 7
    data_axis: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        *,
        train: bool = False,
        lengths: Array | None = None,
        keep: tuple[Probability, Probability, Probability] | None = None,
        every_step: bool = False,
    ) -> Array:
        """Logits [batch, num_classes] of sequences, or [batch, time, num_classes].

        Args:
          x: float32 [batch, time, features].
          train: whether features are dropped.
          lengths: integers [batch]; sequence b ends after lengths[b] steps, and what x holds past its end
            plays no part. Values below 0 and beyond the time axis mean 0 and the whole sequence. The logits of
            an empty sequence, and of steps past the end, are the dense layer's bias. None for whole sequences.
          keep: in training, the probabilities to keep a unit as in `rnn.Keep`, of which only the second, for
            outputs, has a place here: each convolution's features, at each step anew. None there, or in all,
            for no dropout. Needs the rng 'dropout'.
          every_step: whether to read each step, not the last alone.
        """
        running = started = None
        x, lengths = without_padding(x, lengths)  # a NaN there would reach the gradients, though not the values
        if lengths is not None:
            steps, time, lengths = jnp.arange(x.shape[1]), x.shape[1], lengths[:, None]
            running = steps < lengths
            if not every_step:
                # Moves each sequence so that its last step is the last of all.
                started = steps >= time - lengths
                x = jnp.take_along_axis(x, ((steps - time + lengths) % time)[..., None], axis=1)
        output_keep = keep[1] if train and keep is not None else None
        net = TemporalConvNet(self.channels, self.levels, self.kernel_size, self.data_axis, name="tcn")
        features = net(x, started, output_keep, every_step)
        if every_step:
            features = zero_unless(running, features)
        self.sow("intermediates", "features", features)
        init = _torch_uniform(self.channels)
        return nn.Dense(self.num_classes, kernel_init=init, bias_init=init, precision=_EXACT, name="dense")(features)
