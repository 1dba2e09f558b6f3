"""What a dataset costs to make and to keep, and how often it must be read for that to be cheaper than running again."""

import math
from dataclasses import dataclass

from actlake.jobs.plan.machine import Machine
from actlake.jobs.plan.rates import StoreRates
from actlake.jobs.plan.sizes import Sizes

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Dollars. ``requests`` are the writes of making it; ``read`` is one pass over everything, inside the region."""

    compute: float
    requests: float
    month: float
    read: float
    egress: float
    n_class_a: int
    n_class_b: int

    def total(self, months: float) -> float:
        """Return what making it and keeping it for so many months costs."""
        return self.compute + self.requests + self.month * months


@dataclass(frozen=True, kw_only=True)
class StoreOrRecompute:
    """Whether reading a stored dataset is cheaper than running the model for every read.

    ``at_once``: all hook points are read together, as often as one forward pass could give them. ``one_by_one``: each
    hook point is read alone, for a dictionary of its own, and without the dataset each read runs the model up to its
    layer. Numbers of reads from which storing is cheaper; None: never. ``store`` is the verdict for ``reads`` reads of
    each hook point alone, within ``months``.
    """

    months: float
    reads: float
    at_once: int | None
    one_by_one: float | None
    stored_cost: float
    recomputed_cost: float
    pass_hours: float

    @property
    def store(self) -> bool:
        return self.stored_cost < self.recomputed_cost

    def sentence(self) -> str:
        """Return the verdict in words."""
        if self.recomputed_cost == 0:
            return (
                f"the machine has no price (plan.hour, plan.machine); each read of a stored hook point saves up to "
                f"{self.pass_hours:,.2f} hours of forward passes"
            )
        verdict = "store" if self.store else "DO NOT STORE: run the model again for each read"
        one = "never" if self.one_by_one is None else f"from {_count(self.one_by_one)} reads of each"
        once = "never" if self.at_once is None else f"from {self.at_once:,} reads of everything"
        return (
            f"{verdict}. {self.reads:g} read(s) of each hook point alone within {self.months:g} month(s) cost "
            f"${self.stored_cost:,.2f} stored, ${self.recomputed_cost:,.2f} recomputed; storing is cheaper {one} where "
            f"hook points are read one by one, {once} where one pass of the model could feed all readers at once"
        )


def _count(value: float) -> str:
    return f"{value:,.1f}" if value < 10 else f"{value:,.0f}"


def cost_of(machine: Machine, store: StoreRates, sizes: Sizes, *, seconds: float, n_parts: int) -> Cost:
    """Return the prices of a dataset; ``n_parts`` are the requests beside one for each object (parts, metadata)."""
    n_class_a = sizes.n_objects + n_parts
    # At most one request for each chunk, and one for each object's index.
    n_class_b = sizes.n_chunks + sizes.n_objects
    return Cost(
        compute=seconds / 3600 * machine.hour * machine.count,
        requests=n_class_a / 1000 * store.class_a_per_1000,
        month=sizes.nbytes / GIB * store.gib_month,
        read=n_class_b / 1000 * store.class_b_per_1000,
        egress=sizes.nbytes / GIB * store.egress_gib,
        n_class_a=n_class_a,
        n_class_b=n_class_b,
    )


def store_or_recompute(
    cost: Cost, *, pass_cost: float, alone_cost: float, pass_hours: float, months: float, reads: float
) -> StoreOrRecompute:
    """Compare keeping the dataset with running the model again.

    ``pass_cost`` is one forward pass over the corpus for all hook points; ``alone_cost`` the sum, over the hook points,
    of a pass that stops at it.
    """
    kept = cost.total(months)
    saved, saved_alone = pass_cost - cost.read, alone_cost - cost.read
    return StoreOrRecompute(
        months=months,
        reads=reads,
        at_once=max(1, math.ceil(kept / saved)) if saved > 0 else None,
        one_by_one=kept / saved_alone if saved_alone > 0 else None,
        stored_cost=kept + reads * cost.read,
        recomputed_cost=reads * alone_cost,
        pass_hours=pass_hours,
    )
