"""Train a transcoder: ``python examples/transcoder.py data/demo``.

From the input of an MLP it writes the MLP's output as a sum of few directions (Dunefsky et al., 2024, "Transcoders find
interpretable LLM feature circuits").
"""

import torch
from torch import Tensor, nn

import actlake
from actlake.examples.common import Dictionary, Rows, command_line, directions, heldout_rows, top_k, train

# Shapes: B rows of a batch, D channels, N latents.


class Transcoder(Dictionary):
    """TopK transcoder: reads the rows of ``source``, writes those of ``target``."""

    def __init__(self, source: str, target: str, d_in: int, d_out: int, n_latents: int, k: int) -> None:
        super().__init__()
        self.source, self.target, self.k = source, target, k
        self.encoder = nn.Parameter(directions(n_latents, d_in))
        self.encoder_bias = nn.Parameter(torch.zeros(n_latents))
        # Begins as the mean of the target, which is zero.
        self.decoder = nn.Parameter(torch.zeros(n_latents, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def latents(self, rows: Rows) -> Tensor:
        """Return the latents of rows, float32 [B, N]."""
        return top_k(rows[self.source] @ self.encoder.T + self.encoder_bias, self.k)

    def forward(self, rows: Rows) -> Rows:
        """Return what the latents of the source's rows write to the target."""
        return {self.target: self.latents(rows) @ self.decoder + self.bias}


def fit(
    dataset: "actlake.ActivationDataset",
    *,
    kind: type[Transcoder] = Transcoder,
    layer: int,
    steps: int,
    n_latents: int,
    k: int,
    batch_size: int = 1024,
) -> tuple[Transcoder, float]:
    """Return the trained model and the unexplained variance of held-out rows."""
    torch.manual_seed(0)
    source, target = f"layers.{layer}.mlp_in", f"layers.{layer}.mlp_out"
    points = {"inputs": [source], "targets": [target]}
    stream = dataset.stream(points, batch_size=batch_size, epochs=None, normalize="standardize")
    model = kind(source, target, stream.widths[source], stream.widths[target], n_latents, k)
    return model, train(model, stream, heldout_rows(dataset, stream), steps=steps)


def main(kind: type[Transcoder] = Transcoder) -> None:
    """Train on the dataset named on the command line."""
    options = command_line("Train a transcoder of one MLP.", "dataset", layer=9, steps=150, n_latents=1024, k=64)
    arguments = vars(options)
    fit(actlake.open(arguments.pop("dataset")), kind=kind, **arguments)


if __name__ == "__main__":
    main()
