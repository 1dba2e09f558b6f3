"""Train a skip transcoder: ``python examples/skip_transcoder.py data/demo``.

A transcoder beside a dense linear map of its input, which takes over what is not sparse (Paulo et al., 2025,
"Transcoders beat sparse autoencoders for interpretability").
"""

import torch
from torch import nn

from actlake.examples import transcoder
from actlake.examples.common import Rows


class SkipTranscoder(transcoder.Transcoder):
    """TopK transcoder plus a linear map from source to target."""

    def __init__(self, source: str, target: str, d_in: int, d_out: int, n_latents: int, k: int) -> None:
        super().__init__(source, target, d_in, d_out, n_latents, k)
        self.skip = nn.Parameter(torch.zeros(d_in, d_out))

    def forward(self, rows: Rows) -> Rows:
        """Return what the latents and the linear map write to the target."""
        return {self.target: super().forward(rows)[self.target] + rows[self.source] @ self.skip}


def main() -> None:
    """Train on the dataset named on the command line."""
    transcoder.main(SkipTranscoder)


if __name__ == "__main__":
    main()
