"""The conventions that decide whether two results can be compared, by name.

A protocol fixes the permutation of the pixels, the split of the training images into
training and validation, the scaling of the pixels, and how the reported checkpoint is
selected. To add one, add an entry to `PROTOCOLS`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmnist_jax.data import references
from seqmnist_jax.errors import UsageError, choose, did_you_mean

Array = jax.Array
Rows = slice | np.ndarray

SELECTIONS = {
    "validation": "the checkpoint with the highest validation accuracy (ties: lower loss, then earlier)",
    "last": "the last checkpoint",
}
TEST_SELECTION = (
    "the checkpoint with the highest accuracy on these test images: NOT COMPARABLE, it selects on the test set"
)


def _unit(pixels: Array) -> Array:
    return pixels.astype(jnp.float32) / 255.0


SCALINGS: dict[str, Callable[[Array], Array]] = {
    # 0-255 to [0, 1], as TF's read_data_sets and torchvision's ToTensor.
    "unit": _unit,
    # By the mean and the standard deviation of MNIST's training pixels, as torchvision's users have them.
    "standard": lambda pixels: (_unit(pixels) - 0.1307) / 0.3081,
    # To [-1, 1].
    "symmetric": lambda pixels: (_unit(pixels) - 0.5) / 0.5,
    # To [-1, 1): 256 is what divides.
    "signed": lambda pixels: pixels.astype(jnp.float32) / 128.0 - 1.0,
}

FIELDS = ("permutation", "split", "scaling", "selection")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """One convention.

    Attributes:
      name: what `data.protocol` calls it.
      permutation: where the fixed order of the pixels comes from, where they are permuted: a
        name that `permutation` knows, 'none' if no order goes with the protocol.
      split: which training images validate: a rule that `partition` knows.
      scaling: a name in `SCALINGS`.
      selection: a name in `SELECTIONS`; or 'test:N', the best on the first N test images, only
        to reproduce results that were so chosen ('test:10000': on all of MNIST's).
      code: the repository that it is read from; in words where it is not from elsewhere.
      reference: the key in references.bib of what it belongs to; '' for our own.
      flaws: by field of `FIELDS`, what a result must say of that field's value.
      overrides: the fields whose values here a config has put in place of the protocol's own.
    """

    name: str
    permutation: str
    split: str
    scaling: str
    selection: str
    code: str
    reference: str = ""
    flaws: Mapping[str, str] = dataclasses.field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _parse_split(self.split)
        choose(SCALINGS, self.scaling, "data.scaling")
        selection_size(self.selection)

    @property
    def source(self) -> str:
        """Where it is from, in words."""
        return self.code + (f"; {references.read()[self.reference].full}" if self.reference else "")

    def replace(self, **values: str) -> "Protocol":
        """This protocol with other values, by field, and without the flaws of the values that go."""
        gone = {field for field, value in values.items() if value != getattr(self, field)}
        flaws = {field: flaw for field, flaw in self.flaws.items() if field not in gone}
        changes: dict[str, Any] = {**values, "flaws": flaws}
        return dataclasses.replace(self, **changes)


def _numbered(text: str, prefix: str, field: str, otherwise: str, names: Iterable[str] = ()) -> int:
    """The N of 'prefix:N'; `names` are what `text` may be besides."""
    kind, _, number = text.partition(":")
    if kind != prefix or not number.isascii() or not number.isdigit() or len(number) > 10:
        raise UsageError(f"{field} is {text!r}; expected {otherwise}.{did_you_mean(text, names)}")
    return int(number)


def _torch_randperm(seed: int, count: int, skip: int = 0) -> np.ndarray:
    """What ``torch.manual_seed(seed); torch.randperm(count)`` gives on a CPU, without PyTorch.

    PyTorch draws from the same Mersenne Twister as NumPy's legacy generator, seeded alike,
    and shuffles by Fisher and Yates from the front, each draw reduced by a remainder (PyTorch's
    randperm_cpu, for counts far below 2**32). `skip` draws of 32 bits came between the two.
    """
    draws = np.random.RandomState(seed).randint(0, 2**32, skip + max(count - 1, 0), np.uint32)[skip:]
    order = list(range(count))
    for place, jump in enumerate((draws % np.arange(count, 1, -1)).tolist()):
        order[place], order[place + jump] = order[place + jump], order[place]
    return np.array(order, np.int32)


def _bit_reversal(count: int) -> np.ndarray:
    """The numbers below the next power of two, each with its bits mirrored; of these, those below `count`."""
    order = np.zeros(1, np.int32)
    while len(order) < count:
        # One bit more: the old numbers shifted, then the same with a 1 at the other end.
        order = np.concatenate([2 * order, 2 * order + 1])
    return order[order < count]


# How 'KIND:SEED' orders so many pixels. NumPy's legacy generator has a frozen stream.
SEEDED_ORDERS: dict[str, Callable[[int, int], np.ndarray]] = {
    "numpy": lambda seed, count: np.random.RandomState(seed).permutation(count),
    "torch": _torch_randperm,
    "numpy_randint": lambda seed, count: np.random.RandomState(seed).randint(0, count, count),
}


def permutation(name: str, pixels: int) -> np.ndarray | None:
    """The fixed order of the pixels that a protocol names.

    Args:
      name: 'none'; 'numpy:SEED', ``numpy.random.RandomState(SEED).permutation(pixels)``;
        'torch:SEED', ``torch.manual_seed(SEED)`` and ``torch.randperm(pixels)`` on a CPU;
        'bit_reversal', the order of the state-spaces/s4 repository, 0, 512, 256, 768, 128, ...
        for 784 pixels; 'numpy_randint:SEED', ``RandomState(SEED).randint(0, pixels, pixels)``,
        which repeats pixels and leaves others out. 0 <= SEED < 2**32.
      pixels: how many an image has.

    Returns:
      int32 [pixels], the source index of each place in the sequence; None for 'none'.

    Raises:
      UsageError: another name.
    """
    if name == "none":
        return None
    if name == "bit_reversal":
        return _bit_reversal(pixels).astype(np.int32)
    kind = name.partition(":")[0]
    expected = (
        f"'none', 'bit_reversal', or 'KIND:SEED' with KIND one of {', '.join(SEEDED_ORDERS)} and "
        "0 <= SEED < 2**32, as in 'numpy:92916'"
    )
    prefix = kind if kind in SEEDED_ORDERS else "numpy"
    seed = _numbered(name, prefix, "data.permutation", expected, ("none", "bit_reversal"))
    if seed >= 2**32:
        raise UsageError(f"data.permutation is {name!r}; expected {expected}.")
    return SEEDED_ORDERS[kind](seed, pixels).astype(np.int32)


def _parse_split(rule: str) -> tuple[str, int, int, int]:
    """The kind of a split rule, its N, and its seed and its draws before (0 where it has none)."""
    match = re.fullmatch(r"(first|last|torch):([0-9]{1,10})(?::([0-9]{1,10})(?::([0-9]{1,8}))?)?", rule)
    if match and (match[1] == "torch") == (match[3] is not None) and int(match[3] or 0) < 2**32:
        return match[1], int(match[2]), int(match[3] or 0), int(match[4] or 0)
    raise UsageError(
        f"data.split is {rule!r}; expected 'first:N' or 'last:N', the first or last N training images validate, "
        "or 'torch:N:SEED' with 0 <= SEED < 2**32, N that torch's random_split picks; 'torch:N:SEED:DRAWS' after "
        "so many draws, fewer than 10**8."
    )


@functools.lru_cache(maxsize=4)
def partition(rule: str, count: int) -> tuple[Rows, Rows]:
    """Which of the training images train, and which validate.

    Args:
      rule: 'first:N' or 'last:N', so many of them validate (N = 0: no validation set); or
        'torch:N:SEED', those that validate after
        ``torch.utils.data.random_split(data, [count - N, N], torch.Generator().manual_seed(SEED))``;
        or 'torch:N:SEED:DRAWS', where so many numbers of 32 bits were drawn before, as for a model's parameters.
      count: how many there are.

    Returns:
      (train, validation), each a slice, or int32 row numbers in ascending order, read-only.

    Raises:
      UsageError: another rule, or one that leaves nothing to train on.
    """
    kind, size, seed, skip = _parse_split(rule)
    if size >= count:
        raise UsageError(
            f"data.split is {rule!r}, but there are {count:,} training images; expected to leave at least one for "
            "training."
        )
    rest = count - size
    if kind == "first":
        return slice(size, None), slice(size)
    if kind == "last":
        return slice(rest), slice(rest, None)
    order = _torch_randperm(seed, count, skip)
    train, validation = np.sort(order[:rest]), np.sort(order[rest:])
    train.flags.writeable = validation.flags.writeable = False  # shared by all callers
    return train, validation


def selection_size(selection: str) -> int | None:
    """The N of 'test:N', how many test images select; None where validation or the last step does.

    Raises:
      UsageError: another form.
    """
    if selection in SELECTIONS:
        return None
    expected = f"{', '.join(map(repr, SELECTIONS))}, or 'test:N' with N > 0 (selects on the test set)"
    size = _numbered(selection, "test", "data.selection", expected, SELECTIONS)
    if size < 1:
        raise UsageError(f"data.selection is {selection!r}; expected {expected}.")
    return size


_ON_TEST = "selects on the test set"
_UNSEEDED = "the permutation was drawn unseeded: its numbers are not on record, ours stand in"

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="seqmnist",
            permutation="numpy:92916",
            split="first:5000",
            scaling="unit",
            selection="validation",
            code="this repository: the split and scaling of TF's read_data_sets, never selected on the test set",
        ),
        Protocol(
            name="tutorial2018",
            permutation="numpy:100",
            split="first:5000",
            scaling="unit",
            selection="test:128",
            code="github.com/ceshine/tensorflow-crash-course",
            reference="lee2018",
            flaws={
                "selection": f"{_ON_TEST}: on its first 128 images, on which it also reports; none is kept that reads "
                "80 % of them or less",
            },
        ),
        Protocol(
            name="s4",
            permutation="bit_reversal",
            split="torch:6000:42",
            scaling="unit",
            selection="validation",
            code="github.com/state-spaces/s4",
            reference="gu2022",
            flaws={"permutation": "bit reversal is not a random permutation"},
        ),
        Protocol(
            name="exprnn",
            permutation="numpy:92916",
            split="first:0",
            scaling="unit",
            selection="test:10000",
            code="github.com/Lezcano/expRNN",
            reference="lezcano2019",
            flaws={"selection": _ON_TEST},
        ),
        Protocol(
            name="lem",
            permutation="torch:5544",
            # Drawn before: 783 for the permutation; for the model of 128 units twice 67,072 and 1,290, 1,280 anew.
            split="torch:3000:5544:137497",
            scaling="unit",
            selection="validation",
            code="github.com/tk-rusch/LEM",
            reference="rusch2022",
        ),
        Protocol(
            name="cornn",
            permutation="torch:12008",
            # Drawn before: 783 for the permutation, 134,154 for the model of 256 units.
            split="torch:3000:12008:134937",
            scaling="unit",
            selection="validation",
            code="github.com/tk-rusch/coRNN",
            reference="rusch2021cornn",
        ),
        Protocol(
            name="tcn",
            permutation="numpy:0",
            split="first:0",
            scaling="standard",
            selection="last",
            code="github.com/locuslab/TCN",
            reference="bai2018tcn",
            # Issue 40 of that repository says how the paper's figure was taken.
            flaws={
                "permutation": _UNSEEDED,
                "split": "no image validates, and theirs are read in the same order in every epoch",
                "selection": "theirs is the mean of the test accuracies after the last three epochs",
            },
        ),
        Protocol(
            name="ccnn",
            permutation="numpy:0",
            # Drawn before: 59,999 for a first split, 390,175 for the model of 4 blocks of 140.
            split="torch:5000:0:450174",
            scaling="standard",
            selection="validation",
            code="github.com/david-knigge/ccnn",
            reference="knigge2023",
            flaws={
                "split": "theirs depends on the model and on PyTorch Lightning: it is that of 4 blocks of 140 channels "
                "and version 1.6, which splits again once the model is built; before, torch:5000:0",
            },
        ),
        Protocol(
            name="lmu",
            permutation="numpy:0",
            split="last:10000",
            scaling="unit",
            selection="validation",
            code="github.com/nengo/keras-lmu",
            reference="voelker2019",
            flaws={
                "permutation": "it is that of the library's example; the paper's experiment has another, the second "
                "that RandomState(50) draws",
                "split": "it is that of the library's example; the paper's experiment shuffles the images first",
                "selection": "theirs is by the least validation loss, in the paper and in the library up to 0.7",
            },
        ),
        Protocol(
            name="indrnn",
            permutation="numpy:0",
            split="torch:3000:0",
            scaling="signed",
            selection="validation",
            code="github.com/Sunnydreamrain/IndRNN_pytorch",
            reference="li2019",
            flaws={
                "permutation": _UNSEEDED,
                "split": "which images validate was drawn unseeded: the size is theirs, the images ours",
                "selection": "theirs reads eight of the validation images twice",
            },
        ),
        Protocol(
            name="annotated_s4",
            permutation="none",
            split="first:0",
            scaling="symmetric",
            selection="test:10000",
            code="github.com/srush/annotated-s4",
            reference="rush2022",
            flaws={"selection": f"{_ON_TEST}, by the mean of 79 batches' accuracies, of which the last has 16 images"},
        ),
        Protocol(
            name="rbn",
            permutation="numpy_randint:1",
            split="last:10000",
            scaling="unit",
            selection="validation",
            code="github.com/cooijmanstim/recurrent-batch-normalization",
            reference="cooijmans2017",
            flaws={
                "permutation": "its permutation repeats pixels: 501 distinct of 784",
                "selection": "theirs normalises the validation images by the statistics of shuffled batches of 100, "
                "where the model has batch normalisation",
            },
        ),
    )
}
