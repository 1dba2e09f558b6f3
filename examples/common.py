"""What the examples share: a training loop, a score on held-out documents, a command line.

A model reads rows by hook point and writes rows by hook point. Rows are standardised per channel by the dataset's
statistics: in Gemma 3's residual stream one channel holds about 85 % of the energy, and a raw error would mostly
measure that channel. Predicting the mean then costs 1.
"""

import argparse
from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from actlake.shards.batch import TokenBatch
from actlake.shards.dataset import ActivationDataset
from actlake.shards.stream import ActivationStream

# Shapes: B rows of a batch, D channels, N latents.

Rows = Mapping[str, Tensor]


class Dictionary(nn.Module):
    """A model whose ``forward`` takes rows by hook point and returns reconstructions, float32 [B, D], by target."""

    def loss(self, rows: Rows) -> Tensor:
        """Return what a batch of rows costs: the squared error a channel."""
        return mean_squared_error(self(rows), rows)


def mean_squared_error(found: Rows, rows: Rows) -> Tensor:
    """Return the squared error of reconstructions, averaged over rows, channels and targets."""
    return torch.stack([(found[name] - rows[name]).square().mean() for name in found]).mean()


def top_k(scores_BN: Tensor, k: int) -> Tensor:
    """Return the ``k`` largest scores of each row, none below 0, and zeros for all others, [B, N]."""
    values_BK, latents_BK = scores_BN.topk(k, dim=1, sorted=False)
    return torch.zeros_like(scores_BN).scatter(1, latents_BK, values_BK.relu())


def directions(n: int, d: int) -> Tensor:
    """Return ``n`` random directions of norm 1, [n, d]."""
    return normalize(torch.randn(n, d))


def heldout_rows(dataset: ActivationDataset, stream: ActivationStream, prefix: str = "", n: int = 2048) -> Rows:
    """Return at most ``n`` rows of held-out documents at the stream's hook points with a prefix, as it normalises."""
    points = [name for name in stream.hook_points if name.startswith(prefix)]
    rows = slice(0, min(n, dataset.heldout.n_rows))
    raw = {name: dataset.heldout.tensor(name.removeprefix(prefix), rows) for name in points}
    normalizer = stream.normalizer
    return normalizer.apply(raw) if normalizer else {name: found.float() for name, found in raw.items()}


@torch.no_grad()
def unexplained(model: Dictionary, rows: Rows) -> float:
    """Return the squared error over that of these rows' mean, all targets together: 1 explains nothing, 0 is exact."""
    found = model(rows)
    error = sum(float((found[name] - rows[name]).square().sum()) for name in found)
    return error / sum(float((rows[name] - rows[name].mean(0)).square().sum()) for name in found)


def train(model: Dictionary, batches: Iterable[TokenBatch], heldout: Rows, *, steps: int, lr: float = 4e-3) -> float:
    """Train on ``steps`` batches, print the score on held-out rows about five times and return the last one.

    Raises ``ValueError`` when the batches end early.
    """
    # Not fused, the optimizer's step would cost as much as the gradients.
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    step, score = 0, unexplained(model, heldout)
    for step, batch in enumerate(islice(batches, steps), 1):
        # Rises over the first 5 % of the steps, falls over the last 30 %.
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / (0.05 * steps), (steps + 1 - step) / (0.3 * steps))
        optimizer.zero_grad()
        model.loss(batch.activations).backward()
        optimizer.step()
        if step % max(1, steps // 5) == 0 or step == steps:
            score = unexplained(model, heldout)
            print(f"step {step:4d}: {1 - score:.1%} of the variance of held-out rows explained")
    if step < steps:
        raise ValueError(f"the batches ended after {step} of {steps} steps; stream more epochs or ask for fewer steps")
    return score


def command_line(description: str, *datasets: str, **defaults: int | str) -> argparse.Namespace:
    """Parse the names of datasets and options of these defaults, e.g. ``dataset --steps 200``."""
    parser = argparse.ArgumentParser(description=description)
    for name in datasets:
        parser.add_argument(name, help="folder or URL of a dataset, e.g. data/demo")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    return parser.parse_args()
