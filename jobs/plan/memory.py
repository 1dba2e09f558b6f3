"""What one worker takes of memory: predicted from the spec and the model's shape, measured against real workers.

``tests/integration/test_plan_memory.py`` and ``docs/planning.md`` have the comparison.
"""

from dataclasses import asdict, dataclass

from actlake.ingest.models import ModelShape
from actlake.jobs.plan.transformer import block_parameters, embedding_parameters
from actlake.storage.spec import DatasetSpec

#: Python, torch for CPUs, transformers with what it imports for a model, numpy, pyarrow: measured, torch 2.13.0. Of
#: what is installed beside actlake, transformers imports more.
_PROCESS = 400_000_000
#: A Ray worker process beside that: measured, ray 2.60.
_RAY = 90_000_000
#: torch with CUDA, its kernels and the host side of a context: an assumption, not measured with actlake.
_CUDA = 2_500_000_000
#: Safetensors are mapped: the pages of what is converted are still there when the next tensor is read.
_LOADING = 70_000_000
#: Working tensors of a forward pass in numbers of the MLP's width in float32 a token: measured, 270M, 4,096 tokens.
_WORKING = 8
#: Pinned buffers at most, each of the widest hook point of a batch (``ingest/landing.py``).
_PINNED = 8
#: Row groups of the corpus that are kept decoded, sequences in one, bytes a token of them and a row of a shard.
_GROUPS, _GROUP_SEQUENCES, _TOKEN_NBYTES, _ROW_NBYTES = 4, 1_024, 5, 48

_ITEMSIZE = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """Bytes of one worker at its highest: in host memory, and on each of its GPUs (0 without one).

    ``shard`` are all that it has in the making, ``encoded`` the objects on their way to the store.
    """

    process: int
    model: int
    corpus: int
    shard: int
    batch: int
    encoded: int
    gpu: int

    @property
    def host(self) -> int:
        return self.process + self.model + self.corpus + self.shard + self.batch + self.encoded

    def parts(self) -> dict[str, int]:
        """Return the parts of host memory by name."""
        return {name: value for name, value in asdict(self).items() if name != "gpu"}


def worker_memory(
    spec: DatasetSpec,
    shape: ModelShape,
    *,
    shard_rows: int,
    pass_nbytes: int,
    encoded: int,
    context_length: int,
    on_gpu: bool,
    widened: bool,
    n_gpus: int = 1,
    n_shards: int = 2,
    ray: bool = True,
) -> WorkerMemory:
    """Return what a worker takes that has ``n_shards`` shards of ``shard_rows`` rows in the making.

    ``pass_nbytes`` are those of the largest pass of a shard, ``encoded`` those of the objects that are under way.
    ``widened``: linear layers are held as float32, as on CPUs without bfloat16 (``ingest/cpu_bf16.py``). Weights are
    spread over ``n_gpus``.
    """
    itemsize = _ITEMSIZE[spec.dtype]
    weights = block_parameters(shape) * itemsize + embedding_parameters(shape) * itemsize
    # What is widened stays mapped in bfloat16 too: the embeddings are tensors of the same file.
    held = weights + (block_parameters(shape) * 4 if widened and spec.dtype == "bfloat16" else 0)
    captured = spec.batch_tokens * sum(point.width for point in spec.hook_points) * itemsize
    working = spec.batch_tokens * shape.d_ff * _WORKING * 4
    widest = max(point.width for point in spec.hook_points)
    return WorkerMemory(
        process=_PROCESS + _RAY * ray + _CUDA * on_gpu,
        # On their way to a GPU the weights pass through host memory, and what they leave is used for the shard.
        model=0 if on_gpu else held + _LOADING,
        corpus=_GROUPS * _GROUP_SEQUENCES * context_length * _TOKEN_NBYTES + n_shards * shard_rows * _ROW_NBYTES,
        shard=max(n_shards * pass_nbytes, weights if on_gpu else 0),
        # The last batch's tensors are dropped once the next one's are there.
        batch=_PINNED * spec.batch_tokens * widest * itemsize if on_gpu else 2 * captured + working,
        encoded=encoded,
        gpu=weights // n_gpus + 2 * captured + working if on_gpu else 0,
    )
