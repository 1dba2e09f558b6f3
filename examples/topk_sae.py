"""Train a TopK sparse autoencoder from an activation stream: ``python examples/topk_sae.py data/demo``.

A row is written as a sum of ``k`` of ``n_latents`` learned directions (Gao et al., 2024, "Scaling and evaluating
sparse autoencoders"). Rows are standardised per channel first: in Gemma 3's residual stream one channel holds about
85 % of the energy, and a variance explained on raw rows would mostly measure that channel.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import actlake

# Shapes: B rows of a batch, D channels, N latents, K active latents of each row.


class TopKSAE(nn.Module):
    """Sparse autoencoder on standardised rows: the ``k`` largest latents are kept, decoder rows have norm 1."""

    def __init__(self, d: int, n_latents: int, k: int) -> None:
        super().__init__()
        if not 0 < k <= n_latents:
            raise ValueError(f"k = {k} is not in 1..{n_latents}; give at most the number of latents")
        self.k = k
        self.decoder = nn.Parameter(functional.normalize(torch.randn(n_latents, d)))
        # A tied start leaves next to no latent dead.
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(n_latents))
        self.bias = nn.Parameter(torch.zeros(d))

    def scores(self, x_BD: Tensor) -> Tensor:
        """Return what each latent scores on each row, float32 [B, N]."""
        return functional.linear(x_BD - self.bias, self.encoder, self.encoder_bias)

    def decode(self, values_BK: Tensor, latents_BK: Tensor) -> Tensor:
        """Return the rows that latents of these values add up to, float32 [B, D]."""
        dense_BN = values_BK.new_zeros(len(values_BK), len(self.decoder)).scatter(1, latents_BK, values_BK)
        return dense_BN @ self.decoder + self.bias

    def forward(self, x_BD: Tensor) -> Tensor:
        """Return the reconstruction of standardised rows, float32 [B, D]."""
        return self.decode(*top(self.scores(x_BD), self.k))


def top(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the values (none below 0) and the latents, both [B, K], of the ``k`` largest scores of each row."""
    values_BK, latents_BK = scores_BN.topk(k, dim=1, sorted=False)
    return values_BK.relu(), latents_BK


@torch.no_grad()
def variance_explained(sae: TopKSAE, x_BD: Tensor) -> float:
    """Return 1 - SSE/SST over all channels of standardised rows, SST about the mean of these very rows."""
    sse = math.fsum(float((sae(part) - part).square().sum()) for part in x_BD.split(2048))
    return 1 - sse / float((x_BD - x_BD.mean(0)).square().sum())


def train(
    batches: Iterable[Tensor],
    evaluation: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    n_latents: int = 2048,
    k: int = 96,
    steps: int = 80,
    lr: float = 6e-3,
    on_step: Callable[[int, float], None] = lambda step, explained: None,
) -> TopKSAE:
    """Train on ``steps`` batches of raw rows, any float dtype [B, D]; return the autoencoder of standardised rows.

    ``mean`` and ``std`` ([D]) standardise the rows. About ten times, the last at the end, ``on_step`` gets the number
    of steps done and the variance explained on ``evaluation``: raw rows that are not trained on. Raises ``ValueError``
    when the batches end early.
    """
    center_D, scale_D = mean.float(), 1 / std.float().clamp_min(1e-8)
    held_BD = (evaluation.float() - center_D) * scale_D
    sae = TopKSAE(len(center_D), n_latents, k)
    # Not fused, the optimizer's step would cost as much as the gradients.
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    idle_N = torch.zeros(n_latents, dtype=torch.int64)
    step, stride = 0, max(1, steps // 10)
    for step, batch in enumerate(islice(batches, steps), 1):
        # Rises over the first 5 % of the steps, falls over the last 30 %.
        optimizer.param_groups[0]["lr"] = lr * min(1.0, step / (0.05 * steps), (steps + 1 - step) / (0.3 * steps))
        optimizer.zero_grad()
        _loss(sae, (batch.float() - center_D) * scale_D, idle_N).backward()
        optimizer.step()
        sae.decoder.data = functional.normalize(sae.decoder.data)
        if step % stride == 0 or step == steps:
            on_step(step, variance_explained(sae, held_BD))
    if step < steps:
        raise ValueError(f"the batches ended after {step} of {steps} steps; stream more epochs or ask for fewer steps")
    return sae


def _loss(sae: TopKSAE, x_BD: Tensor, idle_N: Tensor, patience: int = 25) -> Tensor:
    """Return the mean squared error of a batch; ``idle_N`` counts the steps since each latent was last active."""
    scores_BN = sae.scores(x_BD)
    values_BK, latents_BK = top(scores_BN, sae.k)
    error_BD = x_BD - sae.decode(values_BK, latents_BK)
    loss = error_BD.square().mean()
    idle_N += 1
    idle_N[latents_BK[values_BK > 0]] = 0
    dead_N = idle_N > patience
    if dead_N.any():
        # Dead latents learn what the others leave: the auxiliary loss of Gao et al., with their weight of 1/32.
        revived_BD = sae.decode(*top(scores_BN.masked_fill(~dead_N, 0), sae.k)) - sae.bias
        loss = loss + (error_BD.detach() - revived_BD).square().mean() / 32
    return loss


def fit(
    dataset: "actlake.ActivationDataset",
    point: str,
    *,
    seed: int = 0,
    steps: int = 80,
    on_step: Callable[[int, float], None],
) -> TopKSAE:
    """Train on one hook point of a dataset, standardised by its stored statistics, judged on held-out documents."""
    torch.manual_seed(seed)
    moments = dataset.statistics(point)
    mean, std = torch.from_numpy(moments.mean), torch.from_numpy(moments.variance).sqrt()
    heldout = dataset.heldout.tensor(point, slice(0, min(4096, dataset.heldout.n_rows)))
    batches = (batch[point] for batch in dataset.stream([point], batch_size=2048, seed=seed, epochs=None))
    return train(batches, heldout, mean, std, steps=steps, on_step=on_step)


def save(sae: TopKSAE, path: str | Path, *, point: str, mean: Tensor, std: Tensor) -> None:
    """Write the autoencoder of one hook point, with what standardises its rows ([D] each), as safetensors."""
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in sae.state_dict().items()}
    tensors |= {"mean": mean.float(), "std": std.float()}
    save_file(tensors, path, metadata={"kind": "topk_sae", "point": point, "k": str(sae.k)})


def load(path: str | Path) -> tuple[TopKSAE, str, Tensor, Tensor]:
    """Read what ``save`` wrote: the autoencoder, its hook point, mean and standard deviation; ``ValueError`` else."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        made, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if made.get("kind") != "topk_sae":
        raise ValueError(f"{path} is no autoencoder that examples/topk_sae.py saved with --save")
    mean, std = tensors.pop("mean"), tensors.pop("std")
    n_latents, d = tensors["decoder"].shape
    sae = TopKSAE(d, n_latents, int(made["k"]))
    sae.load_state_dict(tensors)
    return sae, made["point"], mean, std


def main() -> None:
    """Train on the dataset named on the command line and print the variance explained as it rises."""
    parser = argparse.ArgumentParser(description="Train a TopK sparse autoencoder from an activation dataset.")
    parser.add_argument("dataset", help="folder or URL of the dataset, e.g. data/demo")
    parser.add_argument("--point", default="layers.9.resid_post", help="hook point (default: %(default)s)")
    parser.add_argument("--save", help="write the autoencoder there, as safetensors, for examples/evaluate.py")
    options = parser.parse_args()
    report = "step {:4d}: {:.1%} of the variance of held-out rows explained".format
    dataset = actlake.open(options.dataset)
    sae = fit(dataset, options.point, on_step=lambda *found: print(report(*found)))
    if options.save:
        moments = dataset.statistics(options.point)
        mean, std = torch.from_numpy(moments.mean), torch.from_numpy(moments.variance).sqrt()
        save(sae, options.save, point=options.point, mean=mean, std=std)


if __name__ == "__main__":
    main()
