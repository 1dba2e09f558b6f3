"""Train a Matryoshka sparse autoencoder: ``python examples/matryoshka_sae.py data/demo``.

The first 128, 256, .. latents must each reconstruct a row on their own, so that general directions come first and are
not split up as the dictionary grows (Bussmann et al., 2025, "Learning multi-level features with Matryoshka SAEs").
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

import actlake
from actlake.examples.common import (
    Dictionary,
    Rows,
    command_line,
    directions,
    heldout_rows,
    mean_squared_error,
    top_k,
    train,
)

# Shapes: B rows of a batch, D channels, N latents.


class MatryoshkaSAE(Dictionary):
    """TopK autoencoder of one hook point whose prefixes of latents are autoencoders too."""

    def __init__(self, point: str, d: int, n_latents: int, k: int, n_prefixes: int = 4) -> None:
        super().__init__()
        self.point, self.k = point, k
        #: Each prefix has twice the latents of the one before: 1/8, 1/4, 1/2 and all.
        self.prefixes = [n_latents >> place for place in reversed(range(n_prefixes))]
        self.decoder = nn.Parameter(directions(n_latents, d))
        # A tied start leaves next to no latent dead.
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(n_latents))
        self.bias = nn.Parameter(torch.zeros(d))

    def latents(self, rows: Rows) -> Tensor:
        """Return the latents of rows, float32 [B, N]."""
        scores_BN = (rows[self.point] - self.bias) @ self.encoder.T + self.encoder_bias
        return top_k(scores_BN, self.k)

    def reconstructions(self, rows: Rows) -> Iterator[Rows]:
        """Yield the reconstruction from each prefix of the latents, the last one from all."""
        latents_BN = self.latents(rows)
        found_BD: Tensor = self.bias
        for start, stop in pairwise([0, *self.prefixes]):
            found_BD = found_BD + latents_BN[:, start:stop] @ self.decoder[start:stop]
            yield {self.point: found_BD}

    def forward(self, rows: Rows) -> Rows:
        """Return the reconstruction from all latents."""
        *_, last = self.reconstructions(rows)
        return last

    def loss(self, rows: Rows) -> Tensor:
        """Return the squared error of the reconstructions from every prefix, averaged."""
        return torch.stack([mean_squared_error(found, rows) for found in self.reconstructions(rows)]).mean()


def fit(
    dataset: "actlake.ActivationDataset", *, point: str, steps: int, n_latents: int, k: int, batch_size: int = 1024
) -> tuple[MatryoshkaSAE, float]:
    """Return the trained model and the unexplained variance of held-out rows."""
    torch.manual_seed(0)
    stream = dataset.stream(point, batch_size=batch_size, epochs=None, normalize="standardize")
    model = MatryoshkaSAE(point, stream.widths[point], n_latents, k)
    return model, train(model, stream, heldout_rows(dataset, stream), steps=steps)


def main() -> None:
    """Train on the dataset named on the command line."""
    options = command_line(
        "Train a Matryoshka sparse autoencoder.",
        "dataset",
        point="layers.9.resid_post",
        steps=150,
        n_latents=1024,
        k=64,
    )
    arguments = vars(options)
    fit(actlake.open(arguments.pop("dataset")), **arguments)


if __name__ == "__main__":
    main()
