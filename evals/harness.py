"""The one adapter over lm-eval: its tasks, run on a model that is already loaded, as results with samples.

Tasks and their documents are loaded once and can be run on several models. Every task is run by itself, so that its
scores do not depend on which other tasks were asked for. Standard errors are computed here, from the samples; lm-eval's
bootstrap, progress bars, log messages and environment reports are turned off.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import lm_eval  # type: ignore[import-untyped]
import numpy as np
import torch
from lm_eval.evaluator import evaluate  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
from lm_eval.tasks._yaml_loader import load_yaml  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from compressor.errors import (
    CheckpointError,
    CompressorError,
    HubError,
    RecipeError,
    VerificationError,
    did_you_mean,
)
from compressor.evals.columns import collect
from compressor.evals.isolation import outside_of, seeded, silenced
from compressor.evals.minimal_pairs import read_pairs
from compressor.evals.scores import TaskResult
from compressor.evals.task_objects import (
    absolute_files,
    aggregation_names,
    chosen_documents,
    definition_hash,
    listed_files,
    refuse_task,
)
from compressor.evals.tasks import BUILT_IN, Kind, TaskSpec
from compressor.offline import forbidden_by
from compressor.report import Progress, Silent

VERSION = str(lm_eval.__version__)

_LOCAL = ("json", "csv", "text", "parquet", "arrow")
"""Loaders of the datasets library that read local files."""


@dataclass(frozen=True)
class Loaded:
    """One task that was asked for; a group or tag of lm-eval has several tasks.

    Attributes:
        name: Its name in results.
        tasks: lm-eval's task objects by name.
        documents: Indices of the documents of each task, ascending.
        group_by: Field of the documents that becomes the group of each sample, or None.
        version: Version of the definition, as the task states it.
        settings: What the scores depend on beyond the model.
    """

    name: str
    tasks: Mapping[str, Any]
    documents: Mapping[str, list[int]]
    group_by: str | None
    version: str
    settings: Mapping[str, Any]


class Harness:
    """lm-eval tasks, ready to be run on any number of models; a context manager, as it has a folder for their data.

    Args:
        specs: Tasks of kind `FILE` and `REGISTRY`.
        seed: Of few-shot choices and of everything random in lm-eval.
        progress: Who is told about surprises.

    Raises:
        RecipeError: Unknown task, a definition that is not valid, or the same name twice.
        CheckpointError: A file of data is missing or damaged.
        HubError: Data must come from the Hub and cannot be had.
        UnsupportedError: A task that needs images, or runs code the model writes.
    """

    def __init__(self, specs: Sequence[TaskSpec], *, seed: int = 0, progress: Progress | None = None) -> None:
        self.seed = seed
        self.progress = progress or Silent()
        self._folder = tempfile.TemporaryDirectory(prefix="compress-eval-")
        try:
            with silenced(), seeded(seed):  # some tasks shuffle their documents while they are loaded
                manager = TaskManager(include_defaults=any(spec.kind is Kind.REGISTRY for spec in specs))
                loaded = [self._load(spec, manager) for spec in specs]
            names = [task.name for task in loaded]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise RecipeError(f"two tasks are called {twice}", "rename one of them in its YAML")
        except BaseException:
            self._folder.cleanup()
            raise
        self.tasks = {task.name: task for task in loaded}

    def __enter__(self) -> Harness:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def run(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> TaskResult:
        """Run one task.

        Args:
            name: Key of `tasks`.
            model: A causal language model; runs where it is.
            tokenizer: Its tokenizer.
            batch_size: Requests per forward pass, longest first; changes scores by float rounding only.
            progress: Who is told how far it is.

        Raises:
            VerificationError: The model gives log-likelihoods that are not finite.
            RecipeError: A prompt has no room in the model, or lm-eval refuses the task for another reason.
        """
        task = self.tasks[name]
        with silenced() as outside, seeded(self.seed), _failures(name):
            say = outside_of(progress or self.progress, outside)
            language_model = _LanguageModel(model, tokenizer, batch_size, name, say)
            for single in task.tasks.values():
                single.set_fewshot_seed(self.seed)
            found = evaluate(
                lm=language_model,
                task_dict={"tasks": dict(task.tasks), "groups": {}},
                # Choosing by index is slow in lm-eval, and only needed where the limit is not of the whole task.
                samples=dict(task.documents) if task.group_by else None,
                limit=None if task.group_by else task.settings["limit"],
                bootstrap_iters=0,
                log_samples=True,
            )
        kinds = {key: aggregation_names(single) for key, single in task.tasks.items()}
        metrics, samples = collect(name, found, kinds, task.group_by)
        return TaskResult(task.version, task.settings, metrics, samples)

    def _load(self, spec: TaskSpec, manager: Any) -> Loaded:
        """Build a task's objects and choose its documents."""
        source: Any = spec.name
        local = False
        if spec.kind is Kind.FILE:
            source, local = self._definition(spec)
        elif spec.name not in manager.task_index:
            raise did_you_mean("task", spec.name, [*BUILT_IN, *manager.all_tasks])
        if not local and (variable := forbidden_by()):
            raise HubError(
                f"task {spec.name}: its data comes from the Hub and {variable} forbids fetching it",
                f"unset {variable}, or use tasks with local data, such as minimal-pairs",
            )
        with _failures(spec.name, local):
            tasks = manager.load([source])["tasks"]
            for key, task in tasks.items():
                refuse_task(key, task)
                self._set_fewshot(key, task, spec.num_fewshot)
            name = spec.name if spec.kind is Kind.REGISTRY or spec.pairs else next(iter(tasks))
            metadata = [task.get_config("metadata") or {} for task in tasks.values()]
            group_by = metadata[0].get("group_by") if len(tasks) == 1 else None
            documents = {key: chosen_documents(task, spec.limit, group_by) for key, task in tasks.items()}
            shots = sorted({int(task.get_config("num_fewshot") or 0) for task in tasks.values()})
            settings: dict[str, Any] = {
                "num_fewshot": shots[0] if len(shots) == 1 else shots,
                "limit": spec.limit,
                "definition": definition_hash(tasks, documents),
            }
            if spec.pairs:
                settings["data"] = spec.pairs.name
        version = ",".join(sorted({str(task.VERSION) for task in tasks.values()}))
        return Loaded(name, tasks, documents, group_by, version, settings)

    def _definition(self, spec: TaskSpec) -> tuple[dict[str, Any], bool]:
        """Read a task's YAML; the second value says whether its data is local.

        Data files are relative to the YAML, and what the datasets library makes of them goes to the temporary folder.
        """
        assert spec.path is not None
        try:
            config: dict[str, Any] = load_yaml(spec.path)
        except OSError as error:
            raise CheckpointError(f"{spec.path}: cannot be read: {error.strerror}", "check the path") from error
        except Exception as error:  # YAML that is no YAML, and whatever importing its functions provokes
            raise RecipeError(f"{spec.path}: {_first_line(error)}", "see docs/evaluation.md") from error
        if not isinstance(config.get("task"), str):
            raise RecipeError(f"{spec.path}: does not define a task", "name it with `task:`; list several in a suite")
        local = config.get("dataset_path") in _LOCAL or "custom_dataset" in config
        if config.get("dataset_path") in _LOCAL:
            given = dict(config.get("dataset_kwargs") or {})
            files = absolute_files(given.get("data_files"), spec.path.resolve().parent)
            if spec.pairs is not None:
                config["task"], files = spec.name, {"test": str(self._pairs(spec.pairs))}
            for file in listed_files(files):
                if "://" not in file and not any(character in file for character in "*?[") and not Path(file).is_file():
                    raise CheckpointError(
                        f"{spec.path}: its data {file} is not there", "paths are relative to the YAML"
                    )
            local = all("://" not in file for file in listed_files(files))
            config["dataset_kwargs"] = {**given, "data_files": files, "cache_dir": self._folder.name}
        return config, local

    def _pairs(self, path: Path) -> Path:
        """Check a user's pairs and write them in our own spelling."""
        out = Path(self._folder.name) / f"pairs-{path.stem}.jsonl"
        out.write_text("".join(json.dumps(pair) + "\n" for pair in read_pairs(path)), encoding="utf-8")
        return out

    def _set_fewshot(self, name: str, task: Any, wanted: int | None) -> None:
        """Set the number of examples; a task that fixes it to none keeps that, as its prompt has no place for them."""
        own = task.get_config("num_fewshot")
        if wanted is None or own == wanted:
            if own is None:
                task.set_config("num_fewshot", 0)
        elif own == 0:
            self.progress.event(f"{name} allows no examples in its prompt: run with 0 instead of {wanted}")
        else:
            task.set_config("num_fewshot", wanted)


class _LanguageModel(HFLM):  # type: ignore[misc]
    """lm-eval's wrapper, reporting progress to ours and refusing numbers that would pass for right answers."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_size: int, task: str, progress: Progress) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        self._task, self._progress = task, progress
        self._done = self._wanted = self._tenths = 0

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._wanted += len(requests)
        longest = max(len(after) for _, _, after in requests)
        if longest > self.max_length:
            raise RecipeError(
                f"{self._task}: an answer of {longest} tokens has no room in the model's {self.max_length} positions",
                "leave the task out, or those documents",
            )
        cut = sum(len(before) + len(after) > self.max_length + 1 for _, before, after in requests)
        if cut:
            self._progress.event(f"{self._task}: {cut} prompts are cut to the model's {self.max_length} positions")
        out: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, True, override_bs)
        # The largest of several NaN is the first one: a broken model would score 100 % where the first choice is right.
        broken = sum(not np.isfinite(value) for value, _ in out)
        if broken:
            raise VerificationError(
                f"{self._task}: {broken} of {len(out)} log-likelihoods are NaN or Inf",
                "the model's weights or its dtype are broken",
            )
        return out

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self._done += len(inps)
        tenths = 10 * self._done // max(self._wanted, 1)
        if tenths > self._tenths:
            self._tenths = tenths
            self._progress.stage(f"{self._task}: {self._done} of {self._wanted} requests")
        return logits


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _failures(name: str, local: bool = True) -> Iterator[None]:
    """Turn what lm-eval and the datasets library raise into errors with a hint."""
    try:
        yield
    except (CompressorError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # HTTP clients have errors of their own, and which client the Hub library uses has changed before.
        clients = ("aiohttp", "datasets", "httpcore", "httpx", "huggingface_hub", "requests")
        if not local and (isinstance(error, OSError) or type(error).__module__.startswith(clients)):
            raise HubError(
                f"task {name}: its data could not be read from the Hub: {_first_line(error)}",
                "check the network and your login, or use tasks with local data, such as minimal-pairs",
            ) from error
        raise RecipeError(
            f"task {name}: lm-eval {VERSION} cannot run it: {type(error).__name__}: {_first_line(error)}",
            "check the task's definition and data",
        ) from error
