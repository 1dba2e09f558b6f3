"""Train a crosscoder over several layers: ``python examples/crosscoder.py data/demo``.

One set of latents reads and writes all the hook points together (Lindsey et al., 2024, "Sparse crosscoders for
cross-layer features and model diffing"). The layers are those of Gemma Scope 2's crosscoder of the 270M.
"""

import torch
from torch import Tensor, nn

import actlake
from actlake.examples.common import Dictionary, Rows, command_line, directions, heldout_rows, top_k, train

LAYERS = (5, 9, 12, 15)
POINTS = tuple(f"layers.{layer}.resid_post" for layer in LAYERS)

# Shapes: B rows of a batch, W channels of all hook points together, N latents.


class Crosscoder(Dictionary):
    """TopK crosscoder of hook points of one width."""

    def __init__(self, points: tuple[str, ...], d: int, n_latents: int, k: int) -> None:
        super().__init__()
        self.points, self.k = points, k
        # The rows of all points side by side are one wide row.
        self.decoder = nn.Parameter(directions(n_latents, len(points) * d))
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(n_latents))
        self.bias = nn.Parameter(torch.zeros(len(points) * d))

    def latents(self, rows: Rows) -> Tensor:
        """Return the latents of rows, float32 [B, N]."""
        x_BW = torch.cat([rows[name] for name in self.points], dim=1)
        return top_k((x_BW - self.bias) @ self.encoder.T + self.encoder_bias, self.k)

    def forward(self, rows: Rows) -> Rows:
        """Return the reconstruction of every hook point."""
        found_BW = self.latents(rows) @ self.decoder + self.bias
        return dict(zip(self.points, found_BW.chunk(len(self.points), dim=1), strict=True))


def fit(
    dataset: "actlake.ActivationDataset",
    *,
    points: tuple[str, ...] = POINTS,
    steps: int,
    n_latents: int,
    k: int,
    batch_size: int = 1024,
) -> tuple[Crosscoder, float]:
    """Return the trained model and the unexplained variance of held-out rows."""
    torch.manual_seed(0)
    stream = dataset.stream(list(points), batch_size=batch_size, epochs=None, normalize="standardize")
    model = Crosscoder(stream.hook_points, stream.widths[points[0]], n_latents, k)
    return model, train(model, stream, heldout_rows(dataset, stream), steps=steps)


def main() -> None:
    """Train on the dataset named on the command line."""
    options = command_line("Train a crosscoder over four layers.", "dataset", steps=150, n_latents=1024, k=64)
    arguments = vars(options)
    fit(actlake.open(arguments.pop("dataset")), **arguments)


if __name__ == "__main__":
    main()
