"""The job file: TOML to a checked, frozen ``Job``. Unknown keys are refused with the nearest valid name."""

import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from actlake.ingest.chats import CHAT_TEMPLATES, check_reasoning
from actlake.ingest.documents import ON_BAD
from actlake.ingest.filters import Filter
from actlake.ingest.loading import ATTENTION, DEVICE_MAPS
from actlake.jobs.plan.options import BudgetOptions, PlanOptions
from actlake.storage.codecs import CODECS
from actlake.storage.corpus_spec import SPLIT_BY, check_metadata, check_mixture
from actlake.storage.errors import BadInputError, JobFileError, nearest
from actlake.storage.reply_rule import ReplyRule
from actlake.storage.rowspace import ROLE_CHOICES, KeepRule
from actlake.storage.sizes import parse_nbytes
from actlake.storage.spec import BATCHINGS

_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """``[capture]``: how the model is run and which tokens are rows."""

    dtype: str = "bfloat16"
    prepend_bos: bool = True
    exclude: tuple[str | int, ...] = ("bos", "eos", "pad")
    skip_first: int = 0
    keep: str | tuple[str, ...] = "all"
    batch_tokens: int = 4096
    batching: str = "auto"
    void_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.dtype in ("float16", "fp16", "half"):
            raise JobFileError(
                f"capture.dtype = {self.dtype!r}: Gemma 3's residual stream exceeds float16's largest value, 65,504 "
                "(in the 270M from layer 8 on); use 'bfloat16', which is what its forward pass computes"
            )
        _one_of("capture.dtype", self.dtype, _DTYPES)
        if isinstance(self.keep, str):
            _one_of("capture.keep", self.keep, tuple(ROLE_CHOICES))
        elif not self.keep:
            raise JobFileError("capture.keep = [] keeps nothing; name roles, e.g. ['model'], or leave it out")
        KeepRule(roles=self.roles)
        _at_least("capture.skip_first", self.skip_first, 0)
        _at_least("capture.batch_tokens", self.batch_tokens, 1)
        _one_of("capture.batching", self.batching, ("auto", *BATCHINGS))

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles whose tokens are rows; empty: all."""
        return ROLE_CHOICES[self.keep] if isinstance(self.keep, str) else self.keep


@dataclass(frozen=True, kw_only=True)
class RepliesOptions:
    """``[corpus.replies]``: prompts are completed by the job's own model before they are tokenised."""

    model: str = "same"
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        if self.model != "same":
            raise JobFileError(
                f"corpus.replies.model = {self.model!r}: replies come from the job's own model, 'same'; to capture "
                "another one's, build its corpus first and read its conversations: sources = ['<corpus>/replies/"
                "*.parquet'], messages_field = 'messages'"
            )
        self.rule("?", "bfloat16")

    def rule(self, model: str, dtype: str) -> ReplyRule:
        """Return what the corpus's spec says, of a model with that fingerprint."""
        return ReplyRule(
            model=model,
            dtype=dtype,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            n=self.n,
        )


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """``[corpus]``: the text, how it is cut, and what is held out."""

    sources: tuple[str, ...]
    text_field: str = "text"
    messages_field: str | None = None
    id_field: str = "id"
    metadata: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    chat_template: str = "auto"
    reasoning: str | None = None
    on_bad: str = "raise"
    max_document_tokens: int | None = None
    context_length: int = 1024
    stride: int | None = None
    holdout: float = 0.005
    split_by: str | None = None
    max_tokens: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    quotas: Mapping[str, int] = field(default_factory=dict)
    replies: RepliesOptions | None = None
    url: str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise JobFileError(
                "corpus.sources is empty; name at least one, e.g. 'builtin:python-docs' or 'texts/*.jsonl'"
            )
        check_metadata(self.metadata, self.text_field)
        for condition in self.filters:
            Filter.parse(condition)
        _one_of("corpus.chat_template", self.chat_template, CHAT_TEMPLATES)
        check_reasoning(self.reasoning)
        _one_of("corpus.on_bad", self.on_bad, ON_BAD)
        if self.split_by is not None:
            _one_of("corpus.split_by", self.split_by, SPLIT_BY)
        for name in ("stride", "max_document_tokens"):
            if (value := getattr(self, name)) is not None:
                _at_least(f"corpus.{name}", value, 1)
        check_mixture(self.sources, self.weights, self.quotas)
        _at_least("corpus.context_length", self.context_length, 2)
        if not 0 <= self.holdout < 1:
            raise JobFileError(f"corpus.holdout = {self.holdout} is a share of the documents: 0 <= holdout < 1")
        if self.max_tokens is not None:
            _at_least("corpus.max_tokens", self.max_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """``[layout]``: sizes of shards, blocks and chunks, order and codec; None means the documented default."""

    rows_per_shard: int | None = None
    rows_per_block: int | None = None
    rows_per_chunk: int | None = None
    shard_memory: int = 16 * 2**30
    order: str = "shuffled"
    codec: str = "blosc"

    def __post_init__(self) -> None:
        for name in ("rows_per_shard", "rows_per_block", "rows_per_chunk"):
            if (value := getattr(self, name)) is not None:
                _at_least(f"layout.{name}", value, 1)
        _one_of("layout.order", self.order, ("shuffled", "sequence"))
        _one_of("layout.codec", self.codec, CODECS)


@dataclass(frozen=True, kw_only=True)
class WorkerRange:
    """``workers = {min = 1, max = 16}``: the run begins with ``min`` workers, others join it as they come."""

    max: int
    min: int = 1

    def __post_init__(self) -> None:
        _at_least("run.workers.min", self.min, 1)
        if self.max < self.min:
            raise JobFileError(f"run.workers = {{min = {self.min}, max = {self.max}}}: max must be at least min")


#: Resources of Ray that have keys of their own in ``[run]``.
_OWN_RESOURCES = {"CPU": "run.threads", "GPU": "run.gpus_per_worker"}

PLACEMENTS = ("pack", "spread")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """``[run]``: what the job may use; of what is stored, nothing here changes more than the last bits.

    ``resources``, ``placement`` and ``start_timeout`` are Ray's alone: custom resources that a worker wants, whether
    workers fill one node after another or are spread, and the seconds that a run waits while it has too few workers.
    """

    workers: int | WorkerRange | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    placement: str = "pack"
    start_timeout: float = 600.0
    threads: int | None = None
    device: str = "auto"
    attempts: int = 2
    gpus_per_worker: int = 1
    device_map: str | Mapping[str, str] | None = None
    attn_implementation: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "attempts", "gpus_per_worker"):
            if isinstance(count := getattr(self, name), int):
                _at_least(f"run.{name}", count, 1)
        for name, amount in self.resources.items():
            if key := _OWN_RESOURCES.get(name):
                raise JobFileError(f"run.resources.{name}: say it with {key}; resources are custom ones of Ray")
            # A table may hold anything.
            value: object = amount
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise JobFileError(f"run.resources.{name} = {value!r} must be a number above 0, e.g. 1.0")
        _one_of("run.placement", self.placement, PLACEMENTS)
        if not self.start_timeout > 0:
            raise JobFileError(f"run.start_timeout = {self.start_timeout} must be above 0; it is in seconds")
        if self.attn_implementation is not None:
            _one_of("run.attn_implementation", self.attn_implementation, tuple(ATTENTION))
        if isinstance(self.device_map, str):
            _one_of("run.device_map", self.device_map, DEVICE_MAPS)

    @property
    def most_workers(self) -> int | None:
        """How many workers the run may have; None: one for each GPU, else one."""
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def least_workers(self) -> int:
        """How many workers must be ready for the run to begin."""
        return self.workers.min if isinstance(self.workers, WorkerRange) else 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """A whole job file."""

    dataset: str
    model: str
    corpus: CorpusOptions
    revision: str | None = None
    hook_points: tuple[str, ...] | None = None
    preset: str | None = None
    max_rows: int | None = None
    seed: int = 0
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    layout: LayoutOptions = field(default_factory=LayoutOptions)
    run: RunOptions = field(default_factory=RunOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    budget: BudgetOptions = field(default_factory=BudgetOptions)
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if (self.hook_points is None) == (self.preset is None):
            raise JobFileError(
                "give either hook_points, e.g. ['layers.9.resid_post'], or preset, e.g. 'gemma-scope-2': one of the two"
            )
        if self.max_rows is not None:
            _at_least("max_rows", self.max_rows, 1)
        if not 0 <= self.seed < 2**63:
            raise JobFileError(f"seed = {self.seed} must be in 0..2**63-1")


def read_job(path: str | Path) -> Job:
    """Read a job file; raise ``JobFileError`` naming the file, the key and the remedy."""
    table = read_table(path)
    try:
        return parse_job(table)
    except BadInputError as error:
        raise JobFileError(f"{path}: {error}") from error


def read_table(path: str | Path) -> dict[str, Any]:
    """Read a TOML file without looking at its keys; raise ``JobFileError`` for one that cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise JobFileError(f"no job file {str(path)!r}; 'actlake init MODEL' writes one") from error
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(f"cannot read the job file {str(path)!r}: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise JobFileError(f"{path} is not valid TOML: {error}") from error


def parse_job(table: Mapping[str, Any]) -> Job:
    """Check a parsed job file."""
    job: Job = _build(Job, table, "")
    return job


def _build(cls: type[Any], table: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}
    for key in table:
        if key not in known:
            raise JobFileError(f"unknown key '{prefix}{key}'{nearest(key, known)}")
    for name, item in known.items():
        if name not in table and item.default is MISSING and item.default_factory is MISSING:
            raise JobFileError(f"'{prefix}{name}' is missing; {_EXAMPLES.get(prefix + name, 'it has no default')}")
    values = {key: _check(hints[key], value, prefix + key) for key, value in table.items()}
    return cls(**values)


_EXAMPLES = {
    "dataset": 'add e.g. dataset = "data/demo", any path or fsspec URL',
    "model": 'add e.g. model = "gemma-3-270m-gguf"',
    "corpus": 'add a [corpus] table with e.g. sources = ["builtin:python-docs"]',
    "corpus.sources": 'add e.g. sources = ["builtin:python-docs"]',
    "run.workers.max": "give e.g. workers = {min = 1, max = 16}, or one number",
}


#: Keys that take a size such as "16GiB" or "2 TB".
_SIZES = ("layout.shard_memory", "plan.memory", "plan.nic", "budget.max_bytes")


def _check(hint: Any, value: Any, where: str) -> Any:
    if where in _SIZES:
        return parse_nbytes(value, where)
    if is_dataclass(hint):
        return _build(hint, _is(Mapping, value, where, "a table"), f"{where}.")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        items = _is(list, value, where, "a list")
        return tuple(_check(get_args(hint)[0], item, where) for item in items)
    if get_origin(hint) is types.UnionType:
        allowed = tuple(arg for arg in get_args(hint) if get_origin(arg) is None and arg is not type(None))
        inner = [arg for arg in get_args(hint) if get_origin(arg) is not None or is_dataclass(arg)]
        allowed = tuple(arg for arg in allowed if not is_dataclass(arg))
        if inner and (not allowed or isinstance(value, list | dict)):
            return _check(inner[0], value, where)
        return _scalar(allowed, value, where)
    if get_origin(hint) is not None:
        return dict(_is(Mapping, value, where, "a table"))
    return _scalar((hint,), value, where)


def _scalar(allowed: tuple[type, ...], value: Any, where: str) -> Any:
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(
            {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}[t.__name__]
            for t in allowed
        )
        raise JobFileError(f"{where} = {value!r} must be {names}")
    return value


def _is(cls: type[Any], value: Any, where: str, name: str) -> Any:
    if not isinstance(value, cls):
        raise JobFileError(f"{where} = {value!r} must be {name}")
    return value


def _one_of(where: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise JobFileError(f"{where} = {value!r} is not one of {', '.join(valid)}{nearest(value, valid)}")


def _at_least(where: str, value: int, least: int) -> None:
    if value < least:
        raise JobFileError(f"{where} = {value} must be at least {least}")
