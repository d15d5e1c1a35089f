"""A cell of the user's own: imported by its name MODULE:NAME, and tried on shapes before a model is made of it."""

import contextlib
import functools
import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmnist_jax import rnn
from seqmnist_jax.errors import UsageError, did_you_mean
from seqmnist_jax.rnn.cell import first_carry
from seqmnist_jax.rnn.eager import at_precision

# Of what is tried; unlike most sizes, so that a step that mixes up its axes is found out.
BATCH, TIME = 3, 2
# Of a module that was imported here: the SHA-256 of its file as it was then.
CONTENT = "__content_hash__"
# Where code is that is not a user's.
NOT_USERS = ("<", *(str(Path(path).parent) for path in (jax.__file__, rnn.__file__, importlib.__file__, __file__)))


class Found(NamedTuple):
    """A cell, the file of the module that names it, and the SHA-256 of that file's content."""

    cell: rnn.Cell
    file: Path
    content_hash: str


def is_one(name: str) -> bool:
    """Whether model.cell is the name of a user's own cell."""
    return ":" in name


def find(name: str, recorded: str = "", content_hash: str = "") -> Found:
    """Imports a cell, from the current folder or as an installed package.

    Args:
      name: MODULE:NAME.
      recorded: the module's file in an earlier run, or ''. It comes first where it still has the content that it had
        then, and last where it has not.
      content_hash: the SHA-256 of that content.

    Raises:
      UsageError: there is no such module, or it can't be imported, or has no such cell.
    """
    module_name, _, attribute = name.partition(":")
    parts = (*module_name.split("."), attribute)
    if not all(part.isidentifier() for part in parts) or parts[-2:-1] == ("py",):
        raise _error(name, "; expected MODULE:NAME, as my_cells:elman for what my_cells.py calls elman")
    module = _import(name, module_name, recorded, content_hash)
    file = Path(getattr(module, "__file__", None) or "")
    if not hasattr(module, attribute):
        cells = [known for known, value in vars(module).items() if isinstance(value, rnn.Cell)]
        where = file if file.name else f"the module {module_name}"
        raise _error(name, f", but {where} has no {attribute!r}", did_you_mean(attribute, cells))
    cell = getattr(module, attribute)
    if not isinstance(cell, rnn.Cell):
        raise _error(name, f", a {type(cell).__name__}; expected an rnn.Cell, as rnn.cell(step, init) makes it")
    if not file.is_file():
        raise _error(name, ", but its module has no file, by which a run would be known; expected a cell in a file")
    return Found(cell, file.absolute(), vars(module).setdefault(CONTENT, _hash(file)))


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _error(name: str, problem: str, hint: str = "") -> UsageError:
    return UsageError(f"model.cell is {name!r}{problem}.{hint}")


def _import(name: str, module: str, recorded: str, content_hash: str) -> ModuleType:
    folders = [Path.cwd()]
    if recorded:
        up = module.count(".") + (Path(recorded).name == "__init__.py")
        is_same = Path(recorded).is_file() and _hash(Path(recorded)) == content_hash
        folders.insert(0 if is_same else 1, Path(recorded).parents[up])
    for folder in folders:
        _forget_another(module, folder)
        try:
            with _first_on_path(str(folder)):
                return importlib.import_module(module)
        except (Exception, SystemExit) as e:  # the user's code may fail in any way
            if not isinstance(e, ModuleNotFoundError) or not f"{module}.".startswith(f"{e.name}."):
                raise _error(name, f", but importing {module} fails{_said(e)}") from e
    also = f", nor at {recorded}, where the run had it" if recorded else ""
    raise _error(
        name,
        f", but there is no module {module} in {Path.cwd()} or among the installed packages{also}; expected "
        f"{module.replace('.', '/')}.py in the folder in which this command is given",
    )


def _forget_another(module: str, folder: Path) -> None:
    """Lets a module be imported anew that came here from a file that has changed since, or is not the folder's."""
    known = sys.modules.get(module)
    if known is None or CONTENT not in vars(known):
        return
    file, place = Path(str(known.__file__)), folder.joinpath(*module.split("."))
    others = [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    if not file.is_file() or _hash(file) != vars(known)[CONTENT] or not any(map(file.samefile, others or [file])):
        del sys.modules[module]


@contextlib.contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    """Modules are looked for in this folder first, as `python -m` does in the current one."""
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _said(error: BaseException) -> str:
    """What an error of a user's code says, after the place from which it came."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f" ({at.filename}:{at.lineno})" for at in frames if not at.filename.startswith(NOT_USERS)]
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{''.join(places[-1:])}: {type(error).__name__}: {line}".rstrip(".: ")


def source(cell: rnn.Cell) -> tuple[str, ...]:
    """The lines of a cell's step; none where they are not to be had."""
    with contextlib.suppress(OSError, TypeError):
        return tuple(inspect.getsource(cell.step).splitlines())
    return ()


def check(
    name: str,
    cell: rnn.Cell,
    features: int,
    hidden_size: int,
    options: dict[str, Any],
    engine: rnn.Engine,
    drops_state: bool = False,
) -> None:
    """Tries a cell on shapes.

    Args:
      name: as `find` takes it, for messages.
      cell, features, hidden_size, options, engine: of a layer.
      drops_state: whether units of its state are to be dropped.

    Raises:
      UsageError: a part of it fails, or does not fit the others.
    """

    def tried(part: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return jax.eval_shape(function, *arguments)
        except Exception as e:  # the user's code may fail in any way
            raise _error(
                name, f", but its {part} fails for {features} features and {hidden_size} units{_said(e)}"
            ) from e

    params = tried("init", lambda: cell.init(jax.random.key(0), features, hidden_size, **options))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    is_dict = all(path and all(isinstance(key, jax.tree_util.DictKey) for key in path) for path, _ in leaves)
    if not leaves or not is_dict or not all(jnp.issubdtype(leaf.dtype, jnp.inexact) for _, leaf in leaves):
        raise _error(name, f", but its init gives {_form(params)}; expected a dict of arrays of floating numbers")
    zero = jax.ShapeDtypeStruct((BATCH, hidden_size), jnp.float32)
    carry = tried("zero_carry", functools.partial(first_carry, cell), params, zero)
    x = jax.ShapeDtypeStruct((BATCH, TIME, features), jnp.float32)
    made = tried(
        "step", lambda *given: at_precision(cell.step, "float32")(*given), params, carry, x.update(shape=x.shape[::2])
    )
    if not isinstance(made, tuple) or len(made) != 2:
        raise _error(name, f", but its step gives {_form(made)}; expected (carry, y)")
    if _form(made[0]) != _form(carry):
        raise _error(name, f", but its step makes of the carry {_form(carry)} {_form(made[0])}; expected the same")
    if getattr(made[1], "shape", None) != (BATCH, hidden_size):
        raise _error(
            name, f", but its step's y is {_form(made[1])}; expected [{BATCH}, {hidden_size}], [batch, hidden]"
        )
    tried("layer", lambda *given: cell.layer(*given, precision=engine.precision, backend=engine.backend), params, x)
    if drops_state:

        def dropped(params: Any, x: Any, state: Any) -> Any:
            masks = {"layer_0": {"forward": rnn.Masks(state=state)}}
            return rnn.stack(cell, {"layer_0": {"forward": params}}, x, masks=masks, engine=engine)

        tried("dropout of the state (model.dropout.state_keep)", dropped, params, x, zero)


def _form(tree: Any) -> str:
    """The arrays of a tree in words, as (float32[3, 8], float32[3, 8])."""
    return str(jax.tree.map(lambda leaf: _Words(f"{leaf.dtype}{[*leaf.shape]}"), tree))


class _Words(str):
    __repr__ = str.__str__
