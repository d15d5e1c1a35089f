"""A run in words and curves."""

from typing import Any

from seqmnist_jax.analysis.report.runs import Found, Opened
from seqmnist_jax.analysis.results_page import duration
from seqmnist_jax.data.protocols import PROTOCOLS, SELECTIONS, TEST_SELECTION
from seqmnist_jax.models.build import model_title
from seqmnist_jax.workdir import config as configs

Json = dict[str, Any]
Pairs = list[tuple[str, str]]

CURVES = ("loss", "accuracy", "gradient_norm", "clipped_share")


def curves(events: list[Json]) -> Json:
    """Each metric's values by split: {metric: {split: {steps, values}}}."""
    told: dict[str, Json] = {}
    for event in events:
        for metric in CURVES:
            if isinstance(event.get(metric), (int, float)) and event["split"] != "test":
                curve = told.setdefault(metric, {}).setdefault(event["split"], {"steps": [], "values": []})
                curve["steps"].append(event["step"])
                curve["values"].append(event[metric])
    return told


def headline(opened: Opened, score: Json | None) -> list[Json]:
    """The few numbers to see first, each with what must be read beside it."""
    found, told = opened.found, []
    if score is not None:
        low, high = score["accuracy_interval"]
        told.append(
            {
                "label": f"{found.split} accuracy",
                "value": _percent(score["accuracy"]),
                "note": f"95 % Wilson interval over {score['count']:,} images: {_percent(low)} to {_percent(high)}",
            }
        )
    validation = found.validation_accuracy()
    # Of a trial or an unfinished run that is what the score above is.
    if validation is not None and (found.split == "test" or score is None):
        note = "best so far" if found.summary is None else f"at step {found.summary['best_step']:,}"
        told.append({"label": "validation accuracy", "value": _percent(validation), "note": note})
    told.append(
        {
            "label": "steps",
            "value": f"{found.last_step():,}" if found.summary is None else f"{found.summary['steps']:,}",
            "note": f"of {found.config['train']['batch_size']:,} images each"
            + (f"; {found.config['train']['steps']:,} to do in all" if found.summary is None else ""),
        }
    )
    if found.summary is not None and "train_seconds" in found.summary:
        seconds = found.summary["train_seconds"]
        rate, together = found.summary.get("steps_per_second"), found.summary.get("replicas") or 1
        share = f"; its share of {together} runs that trained together" if together > 1 else ""
        told.append(
            {
                "label": "training time",
                "value": duration(seconds),
                "note": "" if rate is None else f"{rate:,.1f} steps a second{share}",
            }
        )
    return told


def sections(opened: Opened, score: Json | None) -> list[Json]:
    """Titled lists of terms and what is to be said of each."""
    found = opened.found
    told = {
        "Result": _result(opened, score),
        "Task": _task(found),
        "Protocol": _protocol(found),
        "Model": _model(found),
        "Training": _training(found),
        "Made by": _origin(found),
    }
    return [{"title": title, "pairs": pairs} for title, pairs in told.items() if pairs]


def _result(opened: Opened, score: Json | None) -> Pairs:
    found = opened.found
    pairs: Pairs = []
    if score is not None:
        pairs += [
            ("Loss", f"{score['loss']:.4f} nats"),
            ("Calibration error", f"{_percent(score['calibration_error'])}, over 15 bins"),
        ]
    if found.summary is not None:
        pairs.append(("Checkpoint", f"step {found.summary['best_step']:,}, selected on {found.summary['selected_on']}"))
        last = found.summary.get("last_test_accuracy")
        if last is not None:
            pairs.append(("Last checkpoint", f"{_percent(last)} test accuracy"))
    elif opened.model is not None:
        pairs.append(("Checkpoint", f"step {opened.model.step:,}, the selected one so far"))
    return pairs


def _task(found: Found) -> Pairs:
    facts = found.facts
    height, width = facts["image_shape"]
    views = {
        "row": f"row by row: {height} steps of {width} pixels",
        "pixel": f"pixel by pixel: {height * width} steps of one",
    }
    pairs = [
        ("Data", f"{facts.get('name', 'unknown')} ({facts.get('source', 'unknown')})"),
        ("SHA-256", facts["content_hash"][:16]),
        ("Read", views.get(facts["view"], facts["view"])),
        ("Permutation", str(facts.get("permutation", "unknown"))),
        ("Scaling of pixels", facts["scaling"]),
    ]
    if "sizes" in facts:
        pairs.insert(1, ("Images", ", ".join(f"{count:,} {split}" for split, count in facts["sizes"].items())))
    return pairs


def _protocol(found: Found) -> Pairs:
    facts = found.facts
    name = facts.get("protocol", found.config["data"]["protocol"])
    selection = str(facts.get("selection", "unknown"))
    pairs = [("Name", name)]
    if name in PROTOCOLS:
        pairs.append(("Source", PROTOCOLS[name].source))
    pairs += [
        ("Split", str(facts.get("split", "unknown"))),
        ("Selection", f"{selection}: {SELECTIONS.get(selection, TEST_SELECTION)}"),
    ]
    if facts.get("overrides"):
        pairs.append(("Overridden", ", ".join(facts["overrides"])))
    pairs.append(("Caveats", "; ".join(facts.get("caveats", [])) or "none"))
    return pairs


def _model(found: Found) -> Pairs:
    # With the fields that an older version's config lacks.
    model = configs.from_json(found.config).model
    pairs = [("Network", model_title(configs.flatten(found.config)))]
    if model.name == "rnn":
        pairs += [("Norm", model.norm), ("Reading", f"the {model.reading} of its outputs")]
    if found.summary is not None and "parameters" in found.summary:
        pairs.append(("Parameters", f"{found.summary['parameters']:,}"))
    dropout = {name: keep for name, keep in model.dropout.items() if keep < 1.0}
    if dropout:
        pairs.append(("Dropout", ", ".join(f"{name} {keep:g}" for name, keep in dropout.items())))
    pairs.append(("Precision", (found.summary or {}).get("precision") or model.precision))
    return pairs


def _training(found: Found) -> Pairs:
    optimizer, train = found.config["optimizer"], found.config["train"]
    clip = optimizer["clip"]
    pairs = [
        ("Steps", f"{train['steps']:,} of {train['batch_size']:,} images"),
        ("Optimiser", f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g}, {optimizer['schedule']}"),
        (
            "Clip",
            "none"
            if clip["mask"] == "none"
            else f"norm of each {clip['unit']} at most {clip['norm']:g}, of {clip['mask']}",
        ),
        ("Seed", str(found.config["seed"])),
    ]
    names = {"compile": "compilation", "evaluate": "evaluation", "checkpoint": "checkpoints"}
    times = {told: (found.summary or {}).get(f"{name}_seconds") for name, told in names.items()}
    if any(seconds is not None for seconds in times.values()):
        pairs.append(("Beside training", ", ".join(f"{told} {s:.1f} s" for told, s in times.items() if s is not None)))
    return pairs


def _origin(found: Found) -> Pairs:
    summary = found.summary or {}
    pairs: Pairs = []
    if summary.get("command"):
        pairs.append(("Command", summary["command"]))
    if summary.get("device"):
        pairs.append(("Device", summary["device"]))
    if summary.get("versions"):
        pairs.append(("Versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())))
    if summary.get("git_commit"):
        pairs.append(("Commit", summary["git_commit"]))
    return pairs


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
