"""Named selections of hook points, after the releases that trained on them."""

from collections.abc import Sequence

from actlake.ingest.models import ModelShape
from actlake.storage.errors import BadInputError, UnknownNameError, nearest
from actlake.storage.hookpoints import expand

#: Streams and whether a preset takes all layers (True) or the subset below.
PRESETS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gemma-scope-2": (("attn_z", "mlp_in", "mlp_out", "resid_post"), True),
    "gemma-scope-2-subset": (("attn_z", "mlp_in", "mlp_out", "resid_post"), False),
    "clt": (("mlp_in", "mlp_out"), True),
    "crosscoder": (("resid_post",), False),
}

#: (layers, d_model) of each Gemma 3 model -> the layers that Gemma Scope 2 covers most thoroughly.
SUBSET_LAYERS: dict[tuple[int, int], tuple[int, ...]] = {
    (18, 640): (5, 9, 12, 15),
    (26, 1152): (7, 13, 17, 22),
    (34, 2560): (9, 17, 22, 29),
    (48, 3840): (12, 24, 31, 41),
    (62, 5376): (16, 31, 40, 53),
}


def expand_points(hook_points: Sequence[str] | None, preset: str | None, shape: ModelShape) -> tuple[str, ...]:
    """Return the hook points that a job's ``hook_points`` or ``preset`` selects, in layer then stream order.

    Raises ``BadInputError`` unless exactly one of the two is given, or for a preset without layers for this model;
    ``UnknownNameError`` with the nearest valid name for an unknown preset or hook point.
    """
    if (hook_points is None) == (preset is None):
        given = "both" if preset is not None else "neither"
        raise BadInputError(f"give either hook_points or preset, not {given} (presets: {', '.join(PRESETS)})")
    patterns = hook_points if preset is None else _patterns(preset, shape)
    return expand(patterns or (), shape.widths(), shape.architecture)


def _patterns(preset: str, shape: ModelShape) -> tuple[str, ...]:
    if preset not in PRESETS:
        raise UnknownNameError(f"no preset {preset!r}{nearest(preset, PRESETS)}")
    streams, every_layer = PRESETS[preset]
    layers = range(shape.n_layers) if every_layer else _subset_layers(preset, shape)
    return tuple(f"layers.{layer}.{stream}" for layer in layers for stream in streams)


def _subset_layers(preset: str, shape: ModelShape) -> tuple[int, ...]:
    layers = SUBSET_LAYERS.get((shape.n_layers, shape.d_model))
    if layers is None:
        streams = ", ".join(f"'layers.<layer>.{stream}'" for stream in PRESETS[preset][0])
        raise BadInputError(
            f"preset {preset!r} has no layers for a model of {shape.n_layers} layers and width {shape.d_model} "
            f"(it knows the Gemma 3 sizes 270M to 27B); list your own as hook_points = [{streams}]"
        )
    return layers
