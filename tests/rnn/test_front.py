"""The library's front: whatever NumPy makes an array of, in any mapping, gives what float64 arrays give by `scan`.

What can't be taken is a ValueError that begins with an argument's name, and nothing else is ever raised.
"""

import collections
import functools
import re
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmnist_jax import rnn

SHAPES = [(4, 10, 3, 8), (1, 1, 2, 3)]  # batch, time, features, hidden
CELLS = {
    "lstm": (rnn.init_lstm, rnn.lstm_step),
    "gru": (rnn.init_gru, rnn.gru_step),
}
WAYS = {
    "lstm": rnn.lstm,
    "lstm scan": functools.partial(rnn.lstm, backend="scan"),
    "lstm fused": functools.partial(rnn.lstm, backend="fused"),
    "gru": rnn.gru,
    "gru scan": functools.partial(rnn.gru, backend="scan"),
    "gru fused": functools.partial(rnn.gru, backend="fused"),
    "gru remat": rnn.remat(rnn.gru, 3),
}
DTYPES = ["float32", "float64", "float16", "bfloat16", "int8", "uint8", "int64"]


class Wrapped:
    """What gives its numbers by a protocol alone, as a data frame does."""

    def __init__(self, array):
        self.array = np.asarray(array)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype)


def reversed_twice(array):
    """The same numbers with strides below zero."""
    return np.ascontiguousarray(array[tuple([slice(None, None, -1)] * array.ndim)])[
        (slice(None, None, -1),) * array.ndim
    ]


def unaligned(array):
    place = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    place[...] = array
    return place


FORMS = {
    "numpy": np.array,
    "jax": jnp.asarray,
    "list": lambda array: array.tolist(),
    "tuple": lambda array: tuple(array.tolist()),
    "rows": list,
    "wrapped": Wrapped,
    "fortran": np.asfortranarray,
    "reversed": reversed_twice,
    "unaligned": unaligned,
}
LISTS = ("list", "tuple", "rows")
MAPPINGS = {
    "dict": dict,
    "proxy": types.MappingProxyType,
    "chain": collections.ChainMap,
    "FrozenDict": flax.core.freeze,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda params: collections.defaultdict(None, params),
    "UserDict": collections.UserDict,
}
# What is no such argument, made from one that is.
NO_ARRAYS = {
    "text": lambda array: "x",
    "complex": lambda array: array.astype(np.complex64),
    "bool": lambda array: array > 0,
    "object": lambda array: array.astype(object),
    "mapping": lambda array: {"x": array},
    "one axis less": lambda array: array[0],
    "one axis more": lambda array: array[None],
}
WRONG = {
    "x": NO_ARRAYS
    | {
        "none": lambda x: None,
        "ragged": lambda x: [[[0.0]], [[0.0], [1.0]]],
        "nan": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, np.nan, x.astype(np.float32)),
        "features": lambda x: x[:, :, 1:],
    },
    "lengths": NO_ARRAYS
    | {
        "float": lambda lengths: lengths.astype(np.float32),
        "too long": lambda lengths: lengths + 1,
        "negative": lambda lengths: lengths - 99,
        "too many": lambda lengths: np.append(lengths, 0),
    },
    "mask": {name: change for name, change in NO_ARRAYS.items() if name != "bool"}
    | {"steps": lambda mask: mask[:, 1:], "float": lambda mask: mask.astype(np.float32)},
    "carry": NO_ARRAYS | {"batch": lambda h: h[:-1], "whole": lambda h: h.astype(np.int32), "empty": lambda h: ()},
    "params": {
        **{
            name: lambda params, change=change: params | {"kernel": change(params["kernel"])}
            for name, change in NO_ARRAYS.items()
        },
        "less": lambda params: {name: value for name, value in params.items() if name != "bias"},
        "more": lambda params: params | {"other": params["bias"]},
        "transposed": lambda params: params | {"kernel": params["kernel"].T},
        "cut": lambda params: params | {"bias": params["bias"][:-1]},
        "none": lambda params: None,
        "pairs": lambda params: list(params.items()),
    },
}


def argument(name, dtypes=DTYPES, **parts):
    """How one argument is given: seldom wrong, as one that is wrong hides what becomes of the others."""
    return st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(dtypes),
            "form": st.sampled_from(list(FORMS)),
            "wrong": st.sampled_from([None] * 6 * len(WRONG[name]) + list(WRONG[name])),
            **parts,
        }
    )


CASES = st.fixed_dictionaries(
    {
        "way": st.sampled_from(list(WAYS)),
        "shape": st.sampled_from(SHAPES),
        "reverse": st.booleans(),
        "x": argument("x"),
        "params": argument("params", mapping=st.sampled_from(list(MAPPINGS))),
        "carry": st.none() | argument("carry", ["float32", "float64", "float16", "bfloat16"]),
        "lengths": st.none() | argument("lengths", ["int32", "int64", "uint8", "int8"]),
        "mask": st.none() | argument("mask", ["bool"]),
    }
)


@functools.cache
def numbers(cell, shape):
    """(x, params, carry, lengths) of float64, told apart as integers too; the first sequence is read whole."""
    batch, time, features, hidden = shape
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.asarray, CELLS[cell][0](jax.random.key(0), features, hidden))
    params = {name: 0.6 * rng.standard_normal(value.shape) for name, value in params.items()}
    carry = tuple(0.5 * rng.standard_normal((batch, hidden)) for _ in range(2 if cell == "lstm" else 1))
    return 2 * rng.standard_normal((batch, time, features)), params, carry, np.array([time, 0, 7, 1])[:batch]


def make(how, name, values, container=lambda part: part):
    """(what is given, whether it is wrong, what it stands for in float64, its dtype)."""

    def of_dtype(value):
        return np.abs(value).astype(how["dtype"]) if how["dtype"] == "uint8" else np.asarray(value).astype(how["dtype"])

    typed = jax.tree.map(of_dtype, values)
    formed = jax.tree.map(FORMS[how["form"]], typed)
    kept = [np.asarray(leaf) for leaf in map(FORMS[how["form"]], jax.tree.leaves(typed))]
    dtype = jnp.result_type(*kept) if name not in ("lengths", "mask") else None
    exact = jax.tree.unflatten(jax.tree.structure(values), [leaf.astype(np.float64) for leaf in kept])
    if how["wrong"] is None:
        return container(formed), exact, dtype
    wrong = WRONG[name][how["wrong"]]
    return (wrong(typed) if name != "carry" else jax.tree.map(wrong, typed)), None, dtype


def check(case):
    cell = case["way"].split()[0]
    x, params, carry, lengths = numbers(cell, case["shape"])
    options = {"reverse": case["reverse"]}
    given_x, x, x_dtype = make(case["x"], "x", x)
    given_params, params, params_dtype = make(case["params"], "params", params, MAPPINGS[case["params"]["mapping"]])
    dtype = jnp.result_type(x_dtype, params_dtype)
    dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype("float32")
    given_carry, wrong = None, any(case[name] and case[name]["wrong"] for name in WRONG)
    if case["carry"]:
        given_carry, carry, carry_dtype = make(case["carry"], "carry", carry)
        given_carry = given_carry if cell == "lstm" else given_carry[0]
        # A state of fewer digits than the layer's would be another after the first step.
        wrong |= jnp.result_type(carry_dtype, dtype) != carry_dtype
    else:
        carry = jax.tree.map(np.zeros_like, carry)
    if case["lengths"]:
        options["lengths"], lengths, _ = make(case["lengths"], "lengths", lengths)
    else:
        lengths = np.full_like(lengths, case["shape"][1])
    marks = {"lengths": lengths.astype(int)} if lengths is not None else {}
    if case["mask"]:
        mask = np.random.default_rng(1).random(case["shape"][:2]) < 0.7
        options["mask"], mask, _ = make(case["mask"], "mask", mask)
        wrong |= case["lengths"] is not None  # one or the other
        marks = {"mask": mask.astype(bool)} if mask is not None else {}
    # A list in a carry, or in the parameters of whatever layer `remat` is given, is a tree and no array.
    trees = [case["carry"]] + [case["params"]] * (case["way"] == "gru remat")
    may_be_refused = any(tree and tree["form"] in LISTS for tree in trees)
    found, refusal = None, ""
    try:
        found = WAYS[case["way"]](given_params, given_x, given_carry, **options)
    except ValueError as error:
        refusal = str(error)
    if wrong or refusal:
        assert wrong or may_be_refused, refusal
        assert re.match(r"(x|params|carry|lengths|mask)\b", refusal)
        return
    with jax.enable_x64(True):
        carry = carry if cell == "lstm" else carry[0]
        expected = rnn.scan(CELLS[cell][1], params, x, carry, reverse=case["reverse"], backend="scan", **marks)
    tolerance = 16 * float(jnp.finfo(dtype).eps)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a, float), b, rtol=0, atol=tolerance), found, expected
    )


SEVERAL = rnn.init_stack(jax.random.key(0), rnn.LSTM, 3, 8, num_layers=2, bidirectional=True)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("way", ["lstm fused", "gru", "gru scan", "gru remat", "stack"])
def test_nothing_is_stretched_to_more_axes(way):
    x, params, _, lengths = numbers("lstm" if way == "stack" else way.split()[0], SHAPES[0])

    def loss(params):
        if way == "stack":
            return rnn.stack(rnn.LSTM, params, x, lengths=lengths, engine=rnn.Engine(remat=3)).sum()
        return WAYS[way](params, x, lengths=lengths)[1].sum()

    with jax.numpy_rank_promotion("raise"):
        jax.grad(loss)(SEVERAL if way == "stack" else jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("layer", [rnn.lstm, rnn.gru])
@pytest.mark.parametrize("params", [None, 3, [("kernel", np.zeros((3, 8)))]])
def test_params_that_are_no_mapping(layer, params):
    with pytest.raises(ValueError, match=r"^params is a (NoneType|int|list); expected a mapping of \['bias', 'kernel'"):
        layer(params, numbers("lstm", SHAPES[0])[0])


quick = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@settings(quick, max_examples=30)
@given(case=CASES)
def test_whatever_is_given_is_taken_or_named(case):
    check(case)


@pytest.mark.slow
@settings(quick, max_examples=400)
@given(case=CASES)
def test_whatever_is_given_is_taken_or_named_many_times(case):
    check(case)
