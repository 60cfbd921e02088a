"""Tables of filter pruning: several seeds, each training a small classifier and cutting it in every way of the table.

A seed is one command, and one file among the results. Figures are means over seeds; what two ways differ by is taken
seed by seed, since they cut the same trained model.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compressor.errors import CheckpointError, CompressorError, RecipeError
from compressor.evals.bench.machine import describe, sentence
from compressor.evals.bench.steps import Surroundings, run_step, save
from compressor.evals.bench.table import DIGEST_CHARS, results_folder
from compressor.files import sha256_file

if TYPE_CHECKING:
    from compressor.evals.bench.runner import Settings, Summary

SCHEMA = "compressor-bench-vision/1"
PROGRAM = "compressor.vision.experiment"
ROUNDING_PROGRAM = "compressor.vision_trial"
NOTHING = "-"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Arm(_Strict):
    """One way to cut, tried at every sparsity of the table.

    Attributes:
        name: Shown in the table, unique in it.
        tool: Another tool that cuts instead, with its own importance; None: a method of ours.
        method: A pruner of kind `vision`, or the tool's importance.
        options: Of the method.
        finetune: Fields of the training after the cut that differ from the table's.
        sparsities: Only these; None: all of the table's.
    """

    name: str = Field(min_length=1)
    tool: Literal["torch-pruning"] | None = None
    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    finetune: dict[str, Any] = Field(default_factory=dict)
    sparsities: tuple[float, ...] | None = None


class Rounding(_Strict):
    """One way to round the blocks of the original and of all that was fine-tuned.

    Attributes:
        name: Shown in the table, unique in it.
        method: As `compress quantize --method`.
        format: As `--format`; per channel.
        options: Of the method.
        n_samples: Of calibration: each is eight training images.
        batch_norm: As `--batch-norm`.
    """

    name: str = Field(min_length=1)
    method: str
    format: str
    options: dict[str, Any] = Field(default_factory=dict)
    n_samples: int = Field(32, ge=1)
    batch_norm: Literal["correct", "reestimate"] | None = None


class VisionTable(_Strict):
    """A table.

    Attributes:
        kind: Tells it from tables of language models.
        title: Heading of the page.
        text: A paragraph under it.
        file: Labelled images: name inside --data-dir.
        sha256: Of the file.
        model: Fields of the small ResNet's config.
        training: How the original is trained.
        finetune: How what was cut is trained.
        seeds: How many.
        sparsities: Shares of the filters to remove.
        formats: Formats, per channel, that the weights are rounded to after all.
        against: The way the others are compared with.
        arms: In the order in which they run.
        roundings: Ways to round with the package's methods, a table of their own under that of the cuts.
    """

    kind: Literal["vision"]
    title: str = Field(min_length=1)
    text: str = ""
    file: str = Field(pattern=r"^[^/\\]+\.npz$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    model: dict[str, Any]
    training: dict[str, Any]
    finetune: dict[str, Any]
    seeds: int = Field(ge=2)
    sparsities: tuple[float, ...] = Field(min_length=1)
    formats: tuple[str, ...] = ()
    against: str
    arms: tuple[Arm, ...] = Field(min_length=1)
    roundings: tuple[Rounding, ...] = ()

    def spec(self, seed: int, data: str) -> dict[str, Any]:
        """Return what the program is told."""
        arms = [
            {**arm.model_dump(exclude={"sparsities"}, exclude_none=True), "sparsity": share}
            for arm in self.arms
            for share in arm.sparsities or self.sparsities
        ]
        whole = {"model": self.model, "training": self.training, "finetune": self.finetune}
        spec = {"data": data, **whole, "arms": arms, "formats": list(self.formats), "seed": seed}
        return {**spec, "roundings": [one.model_dump() for one in self.roundings]} if self.roundings else spec

    def key(self, seed: int) -> str:
        """Return the name of a seed's result file, without suffix."""
        return f"seed-{seed}-{self.digest(seed)[:DIGEST_CHARS]}"

    def folder(self, seed: int) -> str:
        """Return the name of a seed's work folder: ways that are added or changed find what the others have made."""
        rest = {key: value for key, value in self.spec(seed, self.sha256).items() if key not in ("arms", "roundings")}
        return f"seed-{seed}-{hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:DIGEST_CHARS]}"

    def original(self, seed: int) -> str:
        """Return the name of the file with the trained original, which tables that train alike share."""
        what = [self.sha256, self.model, self.training, seed, version("torch"), version("transformers")]
        return f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:DIGEST_CHARS]}.safetensors"

    def digest(self, seed: int) -> str:
        """Return the hex SHA-256 of all that a seed's result depends on."""
        return hashlib.sha256(json.dumps(self.spec(seed, self.sha256), sort_keys=True).encode()).hexdigest()


def is_vision(path: Path) -> bool:
    """Return whether a YAML file says it is such a table; whatever is wrong with it otherwise is found later."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(data, dict) and data.get("kind") == "vision"


def read_vision_table(path: Path) -> VisionTable:
    """Read a table.

    Raises:
        RecipeError: Not a table; the message names the field.
    """
    try:
        table = VisionTable.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path}: {where}: {first['msg']}") from error
    names = [arm.name for arm in table.arms]
    if len(set(names)) < len(names) or table.against not in names:
        raise RecipeError(f"{path}: arms are {', '.join(names)}; against is {table.against!r}", "names must be unique")
    ways = [rounding.name for rounding in table.roundings]
    if len(set(ways)) < len(ways):
        raise RecipeError(f"{path}: roundings are {', '.join(ways)}", "names must be unique")
    return table


def run_vision_table(path: Path, settings: Settings, say: Callable[[str], None] = lambda text: None) -> Summary:
    """Make the chosen seeds (rows `seed-0`, `seed-1`, ...) that have no result yet.

    Raises:
        RecipeError: Not a table, no seed chosen, or another run is using the work folder.
        CheckpointError: The images are not those of the table.
    """
    # Imported here: it loads torch, which pages are made without.
    from compressor.evals.bench.runner import Summary, only_run

    table = read_vision_table(path)
    data = settings.data / table.file
    if not data.is_file():
        raise RecipeError(f"{data}: no such file", "give the folder that holds it with --data-dir")
    if (found := sha256_file(data)) != table.sha256:
        raise CheckpointError(f"{data}: SHA-256 is {found}, the table names {table.sha256}", "get that file")
    chosen = [seed for seed in range(table.seeds) if fnmatch.fnmatchcase(f"seed-{seed}", settings.rows)]
    if not chosen:
        raise RecipeError(f"{path.name}: no row matches {settings.rows!r}", f"seed-0 to seed-{table.seeds - 1}")
    work = settings.work.resolve()
    hidden = {str(data.resolve()): table.file, str(work): "WORK", str(Path.home()): "~", tempfile.gettempdir(): "TMP"}
    around = Surroundings(settings.threads, settings.device, hidden)
    done, kept, failed = [], [], {}
    with only_run(work):
        for seed in chosen:
            place = settings.results / f"{table.key(seed)}.json"
            record = read_seed(place)
            if record is not None and record["error"] is None and not settings.rerun:
                kept.append(f"seed-{seed}")
                continue
            say(f"seed-{seed}: running")
            record = _make(table, seed, data.resolve(), work / table.folder(seed), around)
            lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in record.items()]
            save(place, "{\n" + ",\n".join(lines) + "\n}\n")
            if record["error"] is not None:
                failed[f"seed-{seed}"] = record["error"]
            else:
                done.append(f"seed-{seed}")
            say(f"seed-{seed}: {record['error'] or 'done'}")
    return Summary(tuple(done), tuple(kept), failed, {})


def read_seed(path: Path) -> dict[str, Any] | None:
    """Read a seed's result; None if there is none.

    Raises:
        CheckpointError: Damaged, or of another version.
    """
    if not path.is_file():
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']!r}")
        return data
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}", "delete it and run the seed again") from error


def render_vision(path: Path, results: Path | None = None) -> str:
    """Return the page of a table.

    Raises:
        RecipeError: Not a table.
        CheckpointError: A result is damaged.
    """
    table = read_vision_table(path)
    folder = results or results_folder(path)
    records = [read_seed(folder / f"{table.key(seed)}.json") for seed in range(table.seeds)]
    good = [record for record in records if record is not None and record["error"] is None]
    lines = [
        f"<!-- made by `python -m compressor.evals.bench render {path.stem}`; do not edit -->",
        f"# {table.title}",
        "",
        *([table.text.strip(), ""] if table.text.strip() else []),
        _setting(table, len(good)),
    ]
    if good:
        lines += ["", *_body(table, good)]
    failures = [record for record in records if record is not None and record["error"] is not None]
    lines += ["", *(f"Seed {record['seed']} failed: {record['error']}" for record in failures)] if failures else []
    return "\n".join(lines) + "\n"


def progress_of(path: Path) -> tuple[str, int, int, int]:
    """Return title, seeds, how many have a result, and how many failed."""
    table = read_vision_table(path)
    records = [read_seed(results_folder(path) / f"{table.key(seed)}.json") for seed in range(table.seeds)]
    failed = sum(1 for record in records if record is not None and record["error"] is not None)
    return table.title, table.seeds, sum(1 for record in records if record is not None) - failed, failed


def _make(table: VisionTable, seed: int, data: Path, folder: Path, around: Surroundings) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    mine, shared = folder / "result.safetensors", folder.parent.parent / "originals" / table.original(seed)
    _copy(shared, mine)
    save(folder / "spec.json", json.dumps(table.spec(seed, str(data)), indent=2))
    program = ROUNDING_PROGRAM if table.roundings else PROGRAM
    command = [sys.executable, "-m", program, str(folder / "spec.json"), str(folder / "result.json")]
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "seed": seed,
        "digest": table.digest(seed),
        "machine": describe(around.device, around.threads),
        "versions": {name: version(name) for name in ("torch", "transformers", "torch-pruning")},
        "error": None,
        "cost": None,
        "result": None,
    }
    request = {"digest": table.digest(seed)}
    try:
        record["cost"] = asdict(run_step(folder, "experiment", command, request, around))
        record["result"] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        _copy(mine, shared)
    except CompressorError as error:
        record["error"] = around.scrub(" ".join(str(error).split()))
    return record


def _copy(source: Path, target: Path) -> None:
    """Copy a file that is there to where there is none yet, whole or not at all."""
    if source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, part)
        part.replace(target)


def _setting(table: VisionTable, done: int) -> str:
    return (
        f"`{table.file}`; {done} of {table.seeds} seeds. The original is trained for {table.training['epochs']} "
        f"epochs; what was cut is trained for {table.finetune['epochs']} more."
    )


_HEAD = (
    *("way", "multiply-adds", "parameters", "one image", "right after the cut", "after fine-tuning"),
    *("difference", "better in", "macro F1", "worst class"),
)


def _body(table: VisionTable, records: list[dict[str, Any]]) -> list[str]:
    originals = [record["result"]["original"] for record in records]
    head = [*_HEAD, *(f"then {name}" for name in table.formats), *(f"bytes {name}" for name in table.formats)]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    whole = [*_costs(originals), NOTHING, *_scores(originals, None), *_formats(table, originals)]
    lines.append(_line(["original", *whole]))
    for share in table.sparsities:
        base = _entries(records, table.against, share)
        for arm in table.arms:
            entries = _entries(records, arm.name, share)
            if len(entries) < len(records):
                continue
            after = [entry["finetuned"] for entry in entries]
            cut = _spread([100 * entry["pruned"]["balanced_accuracy"] for entry in entries], 1)
            against = None if arm.name == table.against else [entry["finetuned"] for entry in base]
            cells = [*_costs(after), cut, *_scores(after, against), *_formats(table, after)]
            lines.append(_line([f"{arm.name}, {share:.0%}", *cells]))
    # Not the step's own cost: a seed that was stopped, or given more ways, has only the rest in it.
    seconds = [
        sum(entry["cpu_seconds"] for key in ("arms", "roundings") for entry in record["result"].get(key, []))
        for record in records
    ]
    return [
        *lines,
        *(["", *_rounding_lines(table, records)] if table.roundings else []),
        "",
        "Accuracies are balanced (mean of the classes' recalls), in percent, on the test set; ± is the standard "
        f"deviation over seeds. Differences are to `{table.against}` at the same share of filters, seed by seed, and "
        "with how many seeds are better. Multiply-adds are those of convolutions and linear layers for one image; the "
        "time of one image is the median of many on one thread of a shared machine.",
        "",
        f"Machine: {sentence(dict(records[0]['machine']))}. Versions: "
        + ", ".join(f"{name} {number}" for name, number in sorted(records[0]["versions"].items()))
        + f". Processor time of a seed, besides training the original: {statistics.mean(seconds) / 60:.1f} minutes.",
    ]


_ROUNDED = ("network", "rounded by", "format", "balanced accuracy", "lost", "worst class", "bytes", "processor time")


def _rounding_lines(table: VisionTable, records: list[dict[str, Any]]) -> list[str]:
    """Return the table of roundings; what is lost is taken seed by seed."""
    lines = [_line(_ROUNDED), _line(["---"] * 3 + ["---:"] * (len(_ROUNDED) - 3))]
    dense = [
        {"original": record["result"]["original"]}
        | {f"{e['arm']['name']}, {e['arm']['sparsity']:.0%}": e["finetuned"] for e in record["result"]["arms"]}
        for record in records
    ]
    for network in dense[0]:
        for way in table.roundings:
            what = {"network": network, "rounding": way.model_dump()}
            found = [
                next(e for e in record["result"]["roundings"] if all(e[key] == value for key, value in what.items()))
                for record in records
            ]
            balanced = [100 * one["balanced_accuracy"] for one in found]
            lost = [100 * one[network]["balanced_accuracy"] - now for one, now in zip(dense, balanced, strict=True)]
            worst = [100 * min(one["recall"].values()) for one in found]
            size = statistics.mean(one["bytes"] for one in found) / 1e3
            spent = statistics.mean(one["cpu_seconds"] for one in found)
            cells = [_spread(balanced, 1), _spread(lost, 1), _spread(worst, 1), f"{size:,.0f} kB", f"{spent:.0f} s"]
            lines.append(_line([network, way.name, way.format, *cells]))
    return [*lines, "", "Roundings leave the stem and the classifier dense; `lost` is to the same network unrounded."]


def _entries(records: Iterable[Mapping[str, Any]], name: str, share: float) -> list[dict[str, Any]]:
    return [
        entry
        for record in records
        for entry in record["result"]["arms"]
        if entry["arm"]["name"] == name and entry["arm"]["sparsity"] == share
    ]


def _costs(measured: list[dict[str, Any]]) -> list[str]:
    mean = {key: statistics.mean(one[key] for one in measured) for key in ("macs", "parameters")}
    usual = statistics.median(one["latency"] for one in measured)  # others use the machine too
    return [f"{mean['macs'] / 1e6:.2f} M", f"{mean['parameters'] / 1e3:.0f} k", f"{usual * 1e3:.2f} ms"]


def _scores(measured: list[dict[str, Any]], against: list[dict[str, Any]] | None) -> list[str]:
    balanced = [100 * one["balanced_accuracy"] for one in measured]
    difference = better = NOTHING
    if against is not None:
        gaps = [new - 100 * old["balanced_accuracy"] for new, old in zip(balanced, against, strict=True)]
        difference = (
            f"{statistics.mean(gaps):+.1f} ± {statistics.stdev(gaps):.1f}" if len(gaps) > 1 else f"{gaps[0]:+.1f}"
        )
        better = f"{sum(1 for gap in gaps if gap > 0)}/{len(gaps)}"
    f1 = _spread([100 * one["macro_f1"] for one in measured], 1)
    worst = _spread([100 * min(one["recall"].values()) for one in measured], 1)
    return [_spread(balanced, 1), difference, better, f1, worst]


def _formats(table: VisionTable, measured: list[dict[str, Any]]) -> list[str]:
    both = [[one["formats"][name] for one in measured] for name in table.formats]
    accuracies = [_spread([100 * one["balanced_accuracy"] for one in ones], 1) for ones in both]
    return [*accuracies, *(f"{statistics.mean(one['bytes'] for one in ones) / 1e3:,.0f} kB" for ones in both)]


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
