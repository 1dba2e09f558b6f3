"""The tables ``[plan]`` and ``[budget]`` of a job file: what a plan reckons with, and what a job may not exceed."""

from dataclasses import dataclass

from actlake.storage.errors import JobFileError


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """``[plan]``: the machines that will run the job and what is measured of them; nothing here is stored.

    ``machine`` is ``"here"`` or a name of the rates; the keys after ``spot`` replace what the rates say: ``gpu`` by
    name, ``gpus`` and ``cpus`` of one machine, ``memory`` in bytes, ``nic`` in bytes a second, ``hour`` in dollars a
    machine. ``tokens_per_s`` is one worker's, measured; it replaces ``mfu``. ``months`` and ``reads`` are for
    store-or-recompute.
    """

    machine: str = "here"
    machines: int = 1
    spot: bool = False
    gpu: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    memory: int | None = None
    nic: int | None = None
    hour: float | None = None
    mfu: float | None = None
    tokens_per_s: float | None = None
    months: float = 1.0
    reads: float = 1.0

    def __post_init__(self) -> None:
        for name in ("machines", "cpus"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise JobFileError(f"plan.{name} = {count} must be at least 1")
        for name in ("gpus", "hour", "months", "reads"):
            if (amount := getattr(self, name)) is not None and not 0 <= amount < float("inf"):
                raise JobFileError(f"plan.{name} = {amount} must be a number of at least 0")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise JobFileError(f"plan.mfu = {self.mfu} is a share of the peak: 0 < mfu <= 1, e.g. 0.4")
        if self.tokens_per_s is not None and not self.tokens_per_s > 0:
            raise JobFileError(f"plan.tokens_per_s = {self.tokens_per_s} must be above 0; leave it out to use mfu")


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """``[budget]``: stored bytes, and dollars to make the dataset and keep it for ``plan.months``; None: no limit."""

    max_bytes: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        if self.max_cost is not None and not self.max_cost > 0:
            raise JobFileError(f"budget.max_cost = {self.max_cost} dollars must be above 0; leave it out for no limit")
