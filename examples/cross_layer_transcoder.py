"""Train a cross-layer transcoder: ``python examples/cross_layer_transcoder.py DATASET``.

Latents read the MLP input of one layer and write to the MLP outputs of that layer and all later ones (Ameisen et al.,
2025, "Circuit tracing: revealing computational graphs in language models"). The dataset needs mlp_in and mlp_out of
every layer: ``preset = "clt"`` in the job file instead of ``hook_points``.
"""

import torch
from torch import Tensor, nn

import actlake
from actlake.examples.common import Dictionary, Rows, command_line, directions, heldout_rows, top_k, train

# Shapes: B rows of a batch, L layers, D channels, N latents of each layer.


class CrossLayerTranscoder(Dictionary):
    """TopK over the latents of all layers; layer l's latents have a decoder for each target from l on."""

    def __init__(self, sources: tuple[str, ...], targets: tuple[str, ...], d: int, n_latents: int, k: int) -> None:
        super().__init__()
        self.sources, self.targets, self.k = sources, targets, k
        n_layers = len(sources)
        self.encoder = nn.Parameter(torch.stack([directions(n_latents, d) for _ in sources]))
        self.encoder_bias = nn.Parameter(torch.zeros(n_layers, n_latents))
        # What target l gets from the latents of layers 0..l.
        self.decoders = nn.ParameterList(torch.zeros((layer + 1) * n_latents, d) for layer in range(n_layers))
        self.bias = nn.Parameter(torch.zeros(n_layers, d))

    def latents(self, rows: Rows) -> Tensor:
        """Return the latents of rows, the first layer's first, float32 [B, L * N]."""
        x_BLD = torch.stack([rows[name] for name in self.sources], dim=1)
        scores_BLN = torch.einsum("bld,lnd->bln", x_BLD, self.encoder) + self.encoder_bias
        return top_k(scores_BLN.flatten(1), self.k)

    def forward(self, rows: Rows) -> Rows:
        """Return what the latents of each target's layer and of those before write to it."""
        latents = self.latents(rows)
        return {
            name: latents[:, : len(decoder)] @ decoder + bias_D
            for name, decoder, bias_D in zip(self.targets, self.decoders, self.bias, strict=True)
        }


def fit(
    dataset: "actlake.ActivationDataset", *, steps: int, n_latents: int, k: int, batch_size: int = 512
) -> tuple[CrossLayerTranscoder, float]:
    """Return the trained model, ``n_latents`` a layer, and the unexplained variance of held-out rows."""
    torch.manual_seed(0)
    points = {"inputs": ["layers.*.mlp_in"], "targets": ["layers.*.mlp_out"]}
    stream = dataset.stream(points, batch_size=batch_size, epochs=None, normalize="standardize")
    model = CrossLayerTranscoder(stream.inputs, stream.targets, stream.widths[stream.inputs[0]], n_latents, k)
    return model, train(model, stream, heldout_rows(dataset, stream), steps=steps)


def main() -> None:
    """Train on the dataset named on the command line."""
    options = command_line("Train a cross-layer transcoder.", "dataset", steps=100, n_latents=128, k=256)
    arguments = vars(options)
    fit(actlake.open(arguments.pop("dataset")), **arguments)


if __name__ == "__main__":
    main()
