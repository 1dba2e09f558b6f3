"""Say how good an autoencoder is: ``python examples/evaluate.py data/demo sae.safetensors``.

``python examples/topk_sae.py data/demo --save sae.safetensors`` makes one. On stored held-out rows: the variance that
it leaves unexplained, in all and by channel (in Gemma 3's residual stream one channel holds about 85 % of the energy,
so the first number alone says little), its active latents a row, and the latents that no row activates. In the running
model, on held-out sequences: the cross-entropy of the next token with the hook point untouched, with the
autoencoder's reconstruction in its place, and with zeros or the mean there. Sequences are run whole, BOS included; what
is spliced are the tokens that the dataset keeps as rows, BOS and other excluded ones keep their own activations.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import actlake
from actlake.examples import topk_sae
from actlake.ingest import splice
from actlake.ingest.loading import LoadedModel, load_model
from actlake.ingest.models import resolve_model
from actlake.storage.corpus import Corpus
from actlake.storage.stores import resolve_url

# Shapes: N rows, D channels of the point that is read, E of the one that is written, L latents, B x T tokens, V words.

#: Rows, and tokens with their logits, that are worked on at once.
_ROWS, _TOKENS = 2_048, 128


@dataclass(frozen=True, kw_only=True)
class Coder:
    """Anything to evaluate: an autoencoder writes the point that it reads, a transcoder another one.

    ``latents`` takes raw rows, float32 [N, D], to [N, L], zero where inactive; ``decode`` takes those to raw rows
    [N, E] of ``writes``, whose mean over the training rows is ``mean`` [E].
    """

    reads: str
    writes: str
    latents: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    mean: Tensor

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self.decode(self.latents(x_ND))


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """What held-out rows say: shares of variance from 0 (exact) to 1 (no better than the rows' mean), and latents."""

    n_rows: int
    variance_unexplained: float
    channel_variance_unexplained_median: float
    channel_variance_unexplained_mean: float
    channel_variance_unexplained_max: float
    l0: float
    n_latents: int
    dead_latents: int


@dataclass(frozen=True, kw_only=True)
class LossScores:
    """What the model says: nats a token over all ``n_predicted`` next tokens of the sequences."""

    n_sequences: int
    n_predicted: int
    n_spliced: int
    cross_entropy_clean: float
    cross_entropy_spliced: float
    cross_entropy_zero: float
    cross_entropy_mean: float

    @property
    def loss_recovered_zero(self) -> float:
        """The share of the harm of zeros that the reconstruction does not do: 1 as good as untouched."""
        return self._recovered(self.cross_entropy_zero)

    @property
    def loss_recovered_mean(self) -> float:
        """The same against the mean in place of zeros."""
        return self._recovered(self.cross_entropy_mean)

    def _recovered(self, ablated: float) -> float:
        harm = ablated - self.cross_entropy_clean
        return (ablated - self.cross_entropy_spliced) / harm if harm else float("nan")


def of_topk(sae: topk_sae.TopKSAE, point: str, mean: Tensor, std: Tensor) -> Coder:
    """Return an autoencoder of standardised rows as one of raw rows."""
    scale_D = std.float().clamp_min(1e-8)

    def latents(x_ND: Tensor) -> Tensor:
        values_NK, active_NK = topk_sae.top(sae.scores((x_ND - mean) / scale_D), sae.k)
        return values_NK.new_zeros(len(x_ND), len(sae.decoder)).scatter(1, active_NK, values_NK)

    def decode(latents_NL: Tensor) -> Tensor:
        return (latents_NL @ sae.decoder + sae.bias) * scale_D + mean

    return Coder(reads=point, writes=point, latents=latents, decode=decode, mean=mean)


@torch.no_grad()
def score_rows(coder: Coder, read_ND: Tensor, written_NE: Tensor) -> RowScores:
    """Return what raw rows, any float dtype, of the two points say."""
    parts = zip(read_ND.split(_ROWS), written_NE.split(_ROWS), strict=True)
    squares_E = torch.zeros(written_NE.shape[1], dtype=torch.float64)
    n_active, used_L = 0, torch.zeros(0, dtype=torch.bool)
    for x_ND, y_NE in parts:
        latents_NL = coder.latents(x_ND.float())
        squares_E += (coder.decode(latents_NL) - y_NE.float()).double().square().sum(0)
        active_NL = latents_NL != 0
        n_active += int(active_NL.sum())
        used_L = active_NL.any(0) | (used_L if len(used_L) else active_NL[0])
    total_E = (written_NE.double() - written_NE.double().mean(0)).square().sum(0)
    share_E = (squares_E / total_E)[total_E > 0]
    return RowScores(
        n_rows=len(read_ND),
        variance_unexplained=float(squares_E.sum() / total_E.sum()),
        channel_variance_unexplained_median=float(share_E.median()),
        channel_variance_unexplained_mean=float(share_E.mean()),
        channel_variance_unexplained_max=float(share_E.max()),
        l0=n_active / len(read_ND),
        n_latents=len(used_L),
        dead_latents=int((~used_L).sum()),
    )


@torch.no_grad()
def score_loss(coder: Coder, model: LoadedModel, sequences: Sequence[tuple[Tensor, Tensor]]) -> LossScores:
    """Return what happens to next-token prediction; a sequence is int64 ids [T] and bool [T], True where to splice."""
    ways: Mapping[str, Callable[[Tensor], Tensor] | None] = {
        "clean": None,
        "spliced": coder,
        "zero": lambda x_ND: x_ND.new_zeros(len(x_ND), len(coder.mean)),
        "mean": lambda x_ND: coder.mean.to(x_ND).expand(len(x_ND), -1),
    }
    nats = dict.fromkeys(ways, 0.0)
    for ids_T, chosen_T in sequences:
        for way, function in ways.items():
            nats[way] += _nats(model, coder, function, ids_T, chosen_T)
    n_predicted = sum(len(ids_T) - 1 for ids_T, _ in sequences)
    return LossScores(
        n_sequences=len(sequences),
        n_predicted=n_predicted,
        n_spliced=sum(int(chosen_T.sum()) for _, chosen_T in sequences),
        **{f"cross_entropy_{way}": total / n_predicted for way, total in nats.items()},
    )


def _nats(
    model: LoadedModel, coder: Coder, function: Callable[[Tensor], Tensor] | None, ids_T: Tensor, chosen_T: Tensor
) -> float:
    """Return the summed cross-entropy of a sequence's next tokens."""
    if function is None:
        logits_TV = model.logits(ids_T[None])[0]
    else:
        with splice(model, _splices(coder, function, chosen_T)):
            logits_TV = model.logits(ids_T[None])[0]
    pairs = zip(logits_TV[:-1].split(_TOKENS), ids_T[1:].to(logits_TV.device).split(_TOKENS), strict=True)
    # Parts, because a vocabulary of 262,144 words takes 1 MB a token in float32.
    return sum(
        float(torch.nn.functional.cross_entropy(some.float(), following, reduction="sum")) for some, following in pairs
    )


def _splices(
    coder: Coder, function: Callable[[Tensor], Tensor], chosen_T: Tensor
) -> dict[str | tuple[str, str], Callable[[Tensor], Tensor]]:
    """Return what puts ``function`` in at the chosen tokens; the others keep what the model computes."""
    if coder.reads == coder.writes:

        def replace(x_BTD: Tensor) -> Tensor:
            made_BTD = x_BTD.clone()
            made_BTD[:, chosen_T] = function(x_BTD[:, chosen_T].flatten(0, 1).float()).to(x_BTD).unsqueeze(0)
            return made_BTD

        return {coder.reads: replace}
    held: list[Tensor] = []

    def hold(x_BTD: Tensor) -> Tensor:
        held[:] = [x_BTD[:, chosen_T].flatten(0, 1).float()]
        return x_BTD

    def put(y_BTE: Tensor) -> Tensor:
        made_BTE = y_BTE.clone()
        made_BTE[:, chosen_T] = function(held.pop()).to(y_BTE).unsqueeze(0)
        return made_BTE

    return {coder.reads: hold, coder.writes: put}


def heldout_sequences(dataset: "actlake.ActivationDataset", n: int) -> list[tuple[Tensor, Tensor]]:
    """Return at most ``n`` held-out sequences: their token ids, and which of them the dataset keeps as rows."""
    header = dataset.heldout.header
    corpus = Corpus.open(resolve_url(header.corpus, dataset.heldout.store))
    n_sequences = corpus.row_index("heldout", header.spec.keep).n_sequences
    found = corpus.sequences("heldout", 0, min(n, n_sequences))
    masks = [header.spec.keep.mask(one.tokens, one.roles) for one in found]
    return [(torch.tensor(one.tokens).long(), torch.tensor(mask)) for one, mask in zip(found, masks, strict=True)]


def evaluate(
    dataset: "actlake.ActivationDataset", coder: Coder, model: LoadedModel, *, rows: int, sequences: int
) -> tuple[RowScores, LossScores]:
    """Return the scores on at most so many held-out rows and sequences of a dataset."""
    chosen = slice(0, min(rows, dataset.heldout.n_rows))
    read, written = (dataset.heldout.tensor(point, chosen) for point in (coder.reads, coder.writes))
    return score_rows(coder, read, written), score_loss(coder, model, heldout_sequences(dataset, sequences))


def report(coder: Coder, rows: RowScores, loss: LossScores) -> str:
    """Return the scores as a table to read."""
    channel = rows.channel_variance_unexplained_median, rows.channel_variance_unexplained_mean
    recovered = "   loss recovered {:.4f}".format
    lines = [
        f"{rows.n_rows:,} held-out rows of {coder.writes}",
        f"  variance unexplained       {rows.variance_unexplained:8.4f}",
        f"    by channel: median       {channel[0]:8.4f}",
        f"                mean         {channel[1]:8.4f}",
        f"                largest      {rows.channel_variance_unexplained_max:8.4f}",
        f"  active latents a row (L0)  {rows.l0:8.1f}",
        f"  dead latents               {rows.dead_latents:8,} of {rows.n_latents:,}",
        f"{loss.n_sequences} held-out sequences, {loss.n_predicted:,} next tokens",
        f"  spliced at {loss.n_spliced:,} tokens, those that are rows: not at BOS and other excluded ones",
        f"  cross-entropy clean        {loss.cross_entropy_clean:8.4f} nats",
        f"                spliced      {loss.cross_entropy_spliced:8.4f}",
        f"                zero-ablated {loss.cross_entropy_zero:8.4f}{recovered(loss.loss_recovered_zero)}",
        f"                mean-ablated {loss.cross_entropy_mean:8.4f}{recovered(loss.loss_recovered_mean)}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Evaluate what the command line names."""
    parser = argparse.ArgumentParser(description="Evaluate a sparse autoencoder on held-out documents.")
    parser.add_argument("dataset", help="folder or URL of the dataset that it was trained on, e.g. data/demo")
    parser.add_argument("sae", help="file that examples/topk_sae.py --save wrote")
    parser.add_argument("--model", help="the model's folder, where the dataset names one that is not a Hub model")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=16_384, help="held-out rows (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=8, help="held-out sequences (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    options = parser.parse_args()
    dataset = actlake.open(options.dataset)
    coder = of_topk(*topk_sae.load(options.sae))
    spec = dataset.spec
    ref = resolve_model(options.model or spec.model, revision=None if options.model else spec.model_revision)
    if ref.fingerprint != spec.model_fingerprint:
        raise SystemExit(
            f"{ref.name} has other weights than the model of {options.dataset}; name that one with --model"
        )
    model = load_model(ref, dtype=spec.dtype, device=options.device, head=True)
    rows, loss = evaluate(dataset, coder, model, rows=options.rows, sequences=options.sequences)
    if options.json:
        recovered = {"loss_recovered_zero": loss.loss_recovered_zero, "loss_recovered_mean": loss.loss_recovered_mean}
        print(json.dumps({"point": coder.writes, **asdict(rows), **asdict(loss), **recovered}, indent=1))
    else:
        print(report(coder, rows, loss))


if __name__ == "__main__":
    main()
