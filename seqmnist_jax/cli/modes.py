"""The modes of `launch.py`: each takes what its flags say, makes one call, and gives what is to be printed.

JAX, and all that needs it, is imported within, so that a bad flag is answered at once.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_collections
from absl import flags

from seqmnist_jax.cli import commands
from seqmnist_jax.cli.flags import checked_path, given, given_config, given_folders, given_path, named_fields
from seqmnist_jax.cli.output import Output, show, show_error
from seqmnist_jax.errors import Interrupted, SeqMnistError, UsageError

FLAGS = flags.FLAGS


def train() -> Output | None:
    """Trains, or resumes; the result and what to do next, None in all processes but the first."""
    config = _join(given_config())
    from seqmnist_jax.cli import text
    from seqmnist_jax.cli.terminal import Terminal
    from seqmnist_jax.devices import processes
    from seqmnist_jax.training import jobs, plan, sweep
    from seqmnist_jax.training.programs import keep_programs
    from seqmnist_jax.training.replicas import Diverged, Watch
    from seqmnist_jax.training.run import build_run
    from seqmnist_jax.training.signals import StopOnSignal
    from seqmnist_jax.training.train import Stopped
    from seqmnist_jax.training.train import train as train_run

    grid = plan.build_sweep(config, FLAGS.seeds)
    points = plan.build_points(config, grid, named_fields()) if grid else []
    if config.runtime.executor and not grid:
        raise UsageError("runtime.executor runs the groups of a sweep, but there is neither --seeds nor config.sweep.")
    run = points[0].run if points else build_run(config, named=named_fields())
    keep_programs(config.runtime.compilation_cache)
    # Only now, with everything checked, is a folder made.
    workdir = given_path("workdir") or commands.new_workdir()
    quiet, go_on = FLAGS.quiet or not processes.is_main(), commands.to_go_on(workdir)
    try:
        with _explaining_a_lost_process(config), StopOnSignal(go_on) as stop, Terminal(quiet=quiet) as terminal:
            watch = Watch(terminal.say, terminal.show, stop)
            if grid:
                where, options = config.runtime.executor, config.runtime.executor_options
                executor = jobs.make_executor(where, options, workdir.absolute() / "jobs")
                summary = sweep.train_sweep(
                    grid, points, workdir, command=commands.of_this_run, executor=executor, watch=watch
                )
            else:
                summary = train_run(run, workdir, command=commands.of_this_run(), watch=watch)
    except Stopped as e:
        with suppress(OSError):  # of a terminal that was closed
            print(f"{e}{go_on}", file=sys.stderr)
        sys.exit(128 + stop.number)  # as a shell reports a process that the signal ended
    except Interrupted as e:
        raise type(e)(f"{e}{go_on}") from e
    if not processes.is_main():
        return None
    result = text.sweep(summary) if grid else text.result(summary)
    if grid and not summary["ranking"]:
        raise Diverged(f"All runs of the sweep in {workdir} diverged.\n{result}")
    return Output(summary, f"\n{result}", "" if FLAGS.quiet else commands.to_look_at(workdir, bool(grid)))


def _join(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Makes this process what the config asks for, before anything asks JAX for its devices; gives the config."""
    from seqmnist_jax.cli import process
    from seqmnist_jax.devices import processes

    if config.runtime.distributed and not FLAGS.workdir:
        raise UsageError("runtime.distributed needs --workdir, a folder that all processes see.")
    if config.runtime.deterministic:
        process.be_deterministic()
    processes.initialize(config.runtime.distributed)
    process.start_device()
    return config


@contextmanager
def explaining_no_device() -> Iterator[None]:
    """Says so where JAX has no device to run on, whatever failed for want of one."""
    try:
        yield
    except Exception as e:
        if isinstance(e, SeqMnistError | OSError) or "jax" not in sys.modules:
            raise
        from seqmnist_jax.cli import process

        problem = process.device_problem()
        if problem:
            raise SeqMnistError(problem) from e
        raise


@contextmanager
def _explaining_a_lost_process(config: ml_collections.ConfigDict) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # the loss of a process comes as any of several kinds
        if not config.runtime.distributed or isinstance(e, SeqMnistError):
            raise
        raise SeqMnistError(
            f"{type(e).__name__}: {e}\nAnother process of this run has failed, or this one (--debug shows where); "
            "JAX names a lost one within a minute. The same command, in all of them, resumes from the last checkpoint."
        ) from e


def evaluate() -> Output:
    """The metrics of a work directory's selected checkpoint."""
    workdir = checked_path(given("workdir", "the folder of a run"), "--workdir")
    from seqmnist_jax.analysis import evaluate as evaluation
    from seqmnist_jax.cli import text
    from seqmnist_jax.training.programs import keep_programs

    keep_programs("")
    result = evaluation.evaluate(
        workdir,
        split=FLAGS.split,
        data_dir=str(given_path("data_dir") or ""),
        allow_other_data=FLAGS.allow_other_data,
    )
    return Output(result, text.evaluation(result))


def describe() -> Output:
    """What a run or a sweep will do, and what it will find in its folder."""
    config, workdir = given_config(), given_path("workdir")
    from seqmnist_jax.cli import text
    from seqmnist_jax.cli.describe import describe as describe_run
    from seqmnist_jax.training import folders, plan, sweep
    from seqmnist_jax.training.run import build_run

    grid = plan.build_sweep(config, FLAGS.seeds)
    points = plan.build_points(config, grid, named_fields()) if grid else []
    run = None if points else build_run(config, named=named_fields())
    found = None
    if workdir is not None:  # refused as training in it would be
        found = folders.look(run, workdir) if run else sweep.survey(grid, points, workdir)[0]
        points = plan.decide(points, workdir)
    run = run or points[0].run
    names = [point.name for point in points]
    result = describe_run(run, named_fields(), runs=names, trials=plan.trials_in_words(points), workdir=found)
    return Output(result, text.description(run, result, FLAGS.explain))


def compare() -> Output:
    """Whether two runs differ on the same test images."""
    folders = given_folders()
    if len(folders) != 2:
        raise UsageError(f"--mode=compare needs --workdirs with two folders, as in a,b; got {len(folders)}.")
    from seqmnist_jax.analysis.compare import compare as compare_runs
    from seqmnist_jax.cli import text

    first, second = map(Path, folders)
    result = compare_runs(first, second)
    return Output(result, text.comparison(result))


def table() -> Output:
    """The results of many runs: in columns on a terminal, elsewhere as a page in Markdown; as CSV where asked for."""
    given("workdirs", "as in --workdirs 'runs/*'")
    from seqmnist_jax.analysis import results_page
    from seqmnist_jax.analysis import table as tables
    from seqmnist_jax.cli import text

    others, path = given_path("published"), given_path("csv")
    published = results_page.read_published(others) if others else []
    found = tables.find(given_folders())
    rows, lost = tables.rows(found.results), tables.without_result(found.results)
    for why in found.left_out:
        show_error(why, kind="left out")
    output = Output(rows, whole=results_page.as_markdown(rows, published, lost))
    if sys.stdout.isatty():
        unshown = f"\n{others} is left out here: a pipe or a file gets it too." if published else ""
        output = Output(rows, text.table(rows, lost) + unshown)
    if path is not None:
        try:
            tables.write_csv(rows, path)
        except OSError as e:
            show(output, FLAGS.json)  # which is no reason to keep the table back
            raise SeqMnistError(f"--csv: {path} can't be written ({e.strerror}).") from e
    return output


def report() -> Output:
    """Writes one page about a run, or about several."""
    if bool(FLAGS.workdir) == bool(FLAGS.workdirs):
        raise UsageError("--mode=report needs --workdir, the folder of a run, or --workdirs, several.")
    from seqmnist_jax.analysis.report import build
    from seqmnist_jax.training.programs import keep_programs

    keep_programs("")
    workdir = given_path("workdir")
    path = build.write([workdir] if workdir else list(map(Path, given_folders())), given_path("out"))
    return Output(None, f"{path} ({path.stat().st_size / 2**20:.1f} MiB): open it in a browser.")


def export() -> Output:
    """Writes the selected checkpoint for use without this package; what was written."""
    workdir = checked_path(given("workdir", "the folder of a run"), "--workdir")
    from seqmnist_jax.analysis.export import export as export_run
    from seqmnist_jax.cli import text

    result = export_run(workdir)
    return Output(result, text.export(result))
