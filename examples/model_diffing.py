"""Train a crosscoder over two models: ``python examples/model_diffing.py data/base data/chat``.

Two datasets whose rows line up, made from one corpus, are streamed as one. Latents that write to one model only are
what the models differ in (Lindsey et al., 2024, "Sparse crosscoders for cross-layer features and model diffing").
"""

import torch
from torch import Tensor

import actlake
from actlake.examples.common import command_line, heldout_rows, train
from actlake.examples.crosscoder import Crosscoder


@torch.no_grad()
def share_of_first(model: Crosscoder) -> Tensor:
    """Return for each latent how much of what it writes goes to the first model: 0..1, 0.5 where both get the same."""
    first_N, second_N = (part.norm(dim=1) for part in model.decoder.chunk(2, dim=1))
    share_N: Tensor = first_N / (first_N + second_N)
    return share_N


def fit(
    first: "actlake.ActivationDataset",
    second: "actlake.ActivationDataset",
    *,
    point: str,
    steps: int,
    n_latents: int,
    k: int,
    batch_size: int = 1024,
) -> tuple[Crosscoder, float]:
    """Return the trained model and the unexplained variance of held-out rows of both models."""
    torch.manual_seed(0)
    stream = actlake.align(first=first, second=second).stream(
        [f"first:{point}", f"second:{point}"], batch_size=batch_size, epochs=None, normalize="standardize"
    )
    model = Crosscoder(stream.hook_points, stream.widths[f"first:{point}"], n_latents, k)
    heldout = {**heldout_rows(first, stream, "first:"), **heldout_rows(second, stream, "second:")}
    return model, train(model, stream, heldout, steps=steps)


def main() -> None:
    """Train on the two datasets named on the command line, and show where the latents write."""
    options = command_line(
        "Train a crosscoder over two models.",
        "first",
        "second",
        point="layers.9.resid_post",
        steps=150,
        n_latents=1024,
        k=64,
    )
    arguments = vars(options)
    first, second = (actlake.open(arguments.pop(name)) for name in ("first", "second"))
    model, _ = fit(first, second, **arguments)
    share = share_of_first(model)
    print(f"latents that write to the first model: {share.min():.0%} to {share.max():.0%} of what they write")


if __name__ == "__main__":
    main()
