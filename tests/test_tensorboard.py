"""What a run leaves for TensorBoard: read by TensorBoard's own server, and, slow, looked at in a browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest

from configs import row_lstm
from seqmnist_jax.devices import profiling
from seqmnist_jax.errors import UsageError
from seqmnist_jax.training.replicas import QUIET, Job
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import Stopped, train, train_replicas
from seqmnist_jax.workdir import graph, pictures
from tests import tiny
from tests.test_writers import tensorboard_events

pytestmark = pytest.mark.pictures

TENSORS = (
    "dense/bias",
    "dense/kernel",
    "norm/bias",
    "norm/scale",
    "rnn/layer_0/forward/bias",
    "rnn/layer_0/forward/kernel",
    "rnn/layer_0/forward/recurrent_kernel",
)


def small_run(**changes):
    config = row_lstm.get_config()
    config.data.source = "embedded"
    config.model.hidden_size = 4
    config.runtime.backend = "fused"  # which compiles in less time than the kernel is built
    config.train.batch_size = 8
    config.train.steps, config.train.eval_every = 20, 10
    config.update_from_flattened_dict(changes)
    return build_run(config)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory, cache_dir, compilation_cache):
    """Two replicas of different rates and seeds, which died after the report of step 10 and went on from step 10."""
    folder = tmp_path_factory.mktemp("tensorboard")
    changes = [{"optimizer.learning_rate": 0.001}, {"optimizer.learning_rate": 0.004, "seed": 1}]
    runs = [small_run(**{**one, "runtime.dispatch_seconds": 1e-9}) for one in changes]
    jobs, done = [Job(run, folder / name) for name, run in zip("ab", runs, strict=True)], []
    watch = QUIET._replace(show=lambda now: done.append(now.step), should_stop=lambda: done[-1] >= 13)
    with pytest.raises(Stopped):
        train_replicas(jobs, watch)
    for job in jobs:  # as if the process had died after another report
        shutil.rmtree(job.folder / "checkpoints" / "13")
    train_replicas(jobs, QUIET)
    return folder


def start(logdir, log):
    """TensorBoard as a process of its own, once it has read the runs: the process, and its address."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *arguments], stdout=file, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if len(ask(f"{address}/data/runs")) == 2:
                return process, address
        except OSError:
            pass
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"TensorBoard did not come up:\n{log.read_text()}")


def ask(address, body=None):
    """What the server answers, as JSON values or, where it is none, as bytes."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        content = answer.read()
    try:
        return json.loads(content)
    except ValueError:
        return content


@pytest.fixture(scope="module")
def tensorboard(logdir, tmp_path_factory):
    process, address = start(logdir, tmp_path_factory.mktemp("server") / "log")
    yield f"{address}/data"
    process.kill()
    process.wait()


@pytest.mark.slow
def test_tensorboard_shows_each_scalar_once_a_step(tensorboard):
    tags = ask(f"{tensorboard}/plugin/scalars/tags")["b"]
    names = {"train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm", "train/clipped_share"}
    assert names | {"validation/loss", "validation/accuracy", "test/loss", "test/accuracy"} <= set(tags)
    rates = ask(f"{tensorboard}/plugin/scalars/scalars?run=b&tag=train/learning_rate")
    assert [(step, pytest.approx(value)) for _, step, value in rates] == [(10, 0.004), (20, 0.004)]


def test_tensorboard_shows_histograms_of_norms_and_parameters(tensorboard):
    tags = ask(f"{tensorboard}/plugin/histograms/tags")["a"]
    kinds = ("parameters", "gradient_norm_raw", "gradient_norm_clipped")
    assert set(tags) == {f"{kind}/{name}" for kind in kinds for name in TENSORS}
    found = ask(f"{tensorboard}/plugin/histograms/histograms?run=a&tag=parameters/dense/kernel")
    assert [step for _, step, _ in found] == [10, 20]
    assert sum(count for _, _, count in found[0][2]) == 4 * 10, "every weight is in a bin"


def test_tensorboard_shows_images(tensorboard):
    tags = ask(f"{tensorboard}/plugin/images/tags")["a"]
    assert set(tags) == {f"{split}/{what}" for split in ("validation", "test") for what in ("confusion", "mistakes")}
    found = ask(f"{tensorboard}/plugin/images/images?run=a&tag=validation/confusion&sample=0")
    assert [one["step"] for one in found] == [10, 20]
    image = ask(f"{tensorboard}/plugin/images/individualImage?{found[0]['query']}")
    assert image.startswith(b"\x89PNG")


def test_tensorboard_shows_the_config(tensorboard):
    tags = ask(f"{tensorboard}/plugin/text/tags")["a"]
    assert tags == ["config/text_summary"]
    (text,) = ask(f"{tensorboard}/plugin/text/text?run=a&tag=config/text_summary")
    assert "model.hidden_size = 4" in text["text"]


def test_tensorboard_compares_the_hyperparameters_of_runs(tensorboard):
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = ask(f"{tensorboard}/plugin/hparams/session_groups", body)["sessionGroups"]
    found = {group["name"]: group["hparams"] for group in groups}
    assert {name: (one["optimizer.learning_rate"], one["seed"]) for name, one in found.items()} == {
        "a": (0.001, 0),
        "b": (0.004, 1),
    }
    assert found["a"]["data.split"] == "first:500", "what the protocol says"
    assert not [name for name in found["a"] if name.startswith("runtime.")]
    metrics = {value["name"]["tag"] for value in groups[0]["metricValues"]}
    assert {"test/accuracy", "validation/accuracy"} <= metrics
    infos = ask(f"{tensorboard}/plugin/hparams/experiment", {"experimentName": ""})["hparamInfos"]
    assert [info["name"] for info in infos if info["differs"]] == ["optimizer.learning_rate", "seed"]
    assert infos[0]["name"] == "optimizer.learning_rate", "what differs comes first"


def test_tensorboard_shows_the_graph_by_scopes(tensorboard):
    assert ask(f"{tensorboard}/plugin/graphs/info")["a"]["run_graph"]
    text = ask(f"{tensorboard}/plugin/graphs/graph?run=a&conceptual=false").decode()
    for scope in ("input", "rnn", "norm", "dense", "loss", "optimizer/clip", "gradients/rnn"):
        assert f'name: "{scope}/' in text
    assert 'name: "dense/kernel"' in text, "a parameter stands where it is used"


def test_a_graph_is_whole_and_always_the_same():
    import jax
    import jax.numpy as jnp

    @jax.jit
    def double(x):
        return jnp.sin(x) * 2.0

    def program(state, x):
        with jax.named_scope("layer"):
            x = double(x @ state["params"]["kernel"])
        with jax.named_scope("loop"):
            x, _ = jax.lax.scan(lambda carry, one: (carry + one * x, None), x, state["params"]["kernel"])
        with jax.named_scope("anywhere"):
            x = jax.lax.platform_dependent(x, cpu=jnp.cos, default=jnp.sin)
        return jax.grad(lambda y: jnp.sum(jnp.tanh(y)))(x)

    arguments = ({"params": {"kernel": jnp.ones((3, 3))}}, jnp.ones((3, 3)))
    made = [graph.graph_def(jax.jit(program).trace(*arguments), ("state", "x"), root="") for _ in range(2)]
    assert made[0] == made[1]
    nodes = {node.name: node for node in made[0].node}
    assert len(nodes) == len(made[0].node)
    assert {source.split(":")[0] for node in nodes.values() for source in node.input} <= set(nodes)
    assert list(nodes["layer/dot_general"].input) == ["x", "kernel"], "a parameter stands where it is used"
    assert list(nodes["layer/double/sin"].input) == ["layer/dot_general"]
    assert list(nodes["loop/scan/mul"].input) == ["kernel", "layer/double/mul"]
    assert nodes["anywhere/sin"].op == "sin"
    assert "anywhere/cos" not in nodes
    assert [dim.size for dim in nodes["x"].attr["_output_shapes"].list.shape[0].dim] == [3, 3]


def test_pictures_of_errors():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 100).astype(np.uint8)
    images = rng.integers(0, 256, (100, 28, 28), np.uint8)
    logits = 10.0 * np.eye(10, dtype=np.float32)[labels]
    assert pictures.mistakes(images, logits, labels) is None
    right = pictures.confusion(logits, labels)
    logits[7] = np.roll(logits[7], 1)
    wrong = pictures.confusion(logits, labels)
    assert right.shape == wrong.shape
    assert (right != wrong).any()
    shown = pictures.mistakes(images, logits, labels)
    digit = 255 - images[7].repeat(pictures.ZOOM, 0).repeat(pictures.ZOOM, 1)
    side = digit.shape[0]
    np.testing.assert_array_equal(shown[7 : 5 + side, 7 : 5 + side, 0], digit[1:-1, 1:-1])
    many = pictures.confusion(rng.normal(size=(100, 47)), labels)
    assert max(many.shape) < 1000


@pytest.mark.parametrize("text", ["100", "3:2", "0:3", "5:21", "a:b", "1:2:3", "-1:2"])
def test_impossible_steps_to_profile(text):
    with pytest.raises(UsageError, match=r"runtime\.profile_steps is .*expected 'FIRST:LAST'.*1 to train\.steps = 20"):
        small_run(**{"runtime.profile_steps": text})


def test_no_steps_to_profile_is_no_trace(tmp_path):
    trace = profiling.StepTrace(tmp_path, profiling.parse_steps("", 20))
    assert trace.ends(0) == []
    with trace:
        trace.at(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path):
    """And leaves the numbers as they are."""
    seen = []
    run = small_run(**{"runtime.profile_steps": "4:6"})
    traced = train(run, tmp_path / "traced", watch=QUIET._replace(show=lambda now: seen.append(now.step)))
    assert {3, 6} <= set(seen), "a dispatch ends where the trace begins, and where it ends"
    (folder,) = (tmp_path / "traced" / "plugins" / "profile").iterdir()
    assert [path for path in folder.iterdir() if path.name.endswith(".xplane.pb") and path.stat().st_size]
    plain = train(small_run(), tmp_path / "plain", watch=QUIET)
    assert traced["test_loss"] == plain["test_loss"]


@pytest.mark.slow
def test_a_trace_ends_with_a_run_that_stops(tmp_path):
    seen = []
    with pytest.raises(Stopped):
        train(
            small_run(**{"runtime.profile_steps": "2:20", "runtime.dispatch_seconds": 1e-9}),
            tmp_path,
            watch=QUIET._replace(show=lambda now: seen.append(now.step), should_stop=lambda: seen[-1] >= 12),
        )
    assert list((tmp_path / "plugins" / "profile").glob("*/*.xplane.pb"))


def test_events_are_the_same_apart_from_times(tmp_path):
    def told(folder):  # in one process: the order of a protocol buffer's mapping is another in each
        tiny.train(folder)
        found = []
        for event in tensorboard_events(folder):
            event.ClearField("wall_time")
            values = [v for v in event.summary.value if not v.tag.endswith(("seconds", "steps_per_second"))]
            found.append(
                (event.step, event.graph_def, [value.SerializeToString(deterministic=True) for value in values])
            )
        return found[1:]  # the first names the file's version alone

    assert told(tmp_path / "a") == told(tmp_path / "b")


BROWSER = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1400,1000",
)
# What a page shows once it has drawn what it was given.
DRAWN = {
    "scalars": "test/accuracy",
    "histograms": "gradient_norm_clipped/dense/bias",
    "images": "test/confusion",
    "graphs": "optimizer",
    "hparams": "optimizer.learning_rate",
}


@pytest.mark.slow
def test_tensorboard_in_a_browser(tensorboard, tmp_path):
    """Each page draws what the run left; SEQMNIST_SCREENSHOTS names a folder for pictures of them."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and its chromedriver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (*BROWSER, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    # Text below shadow roots, of which TensorBoard's pages are made.
    text_of_all = """
        const texts = [];
        const walk = (node) => {
          if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent);
          if (node.shadowRoot) walk(node.shadowRoot);
          if (!['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.nodeName)) node.childNodes.forEach(walk);
        };
        walk(document.body);
        return texts.join('\\n');
    """
    try:
        for page, wanted in DRAWN.items():
            browser.get(f"{tensorboard.removesuffix('/data')}/?page={page}#{urllib.parse.quote(page)}")
            deadline = time.monotonic() + 60
            while wanted not in browser.execute_script(text_of_all):
                assert time.monotonic() < deadline, f"{page} does not show {wanted}"
                time.sleep(0.5)
            if os.environ.get("SEQMNIST_SCREENSHOTS"):
                time.sleep(5)  # for drawings that move to their place
                browser.save_screenshot(f"{os.environ['SEQMNIST_SCREENSHOTS']}/{page}.png")
    finally:
        browser.quit()
