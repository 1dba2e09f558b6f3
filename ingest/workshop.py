"""What the builders of one worker share, so that they take turns at the model and bounded threads and memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

from actlake.ingest.landing import Lander
from actlake.ingest.shard_memory import ShardMemory, uploads_of


class Workshop:
    """Shared by the builders of a worker, which may be used from as many threads as there is memory for shards.

    ``model`` is held by the one whose batches run, ``corpus`` by the one that reads it. ``feeders`` lay out batches,
    ``encoders`` fold statistics and compress chunks, ``uploaders`` see to one object each.
    """

    def __init__(self, n_threads: int = 1, n_shards: int = 2) -> None:
        self.model, self.corpus = threading.Lock(), threading.Lock()
        self.memory = ShardMemory(n_shards)
        self.lander = Lander(n_threads)
        self.n_uploads = uploads_of(n_threads)
        self.feeders = ThreadPoolExecutor(1, thread_name_prefix="actlake-feed")
        self.encoders = ThreadPoolExecutor(n_threads, thread_name_prefix="actlake-encode")
        self.uploaders = ThreadPoolExecutor(self.n_uploads, thread_name_prefix="actlake-upload")
