"""How a corpus's prompts are completed by the model: what its spec says of replies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from actlake.storage.errors import BadInputError
from actlake.storage.stored_json import require_fields


@dataclass(frozen=True, kw_only=True)
class ReplyRule:
    """Whose replies complete the prompts of a corpus, and how they are drawn.

    ``model`` is the fingerprint of the model's weights and config, ``dtype`` that of its computation. A reply has at
    most ``max_new_tokens``; ``temperature`` 0 takes the likeliest token every time. Each prompt gets ``n`` replies.
    """

    model: str
    dtype: str = "bfloat16"
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        if not self.model:
            raise BadInputError("replies.model is empty; give the fingerprint of a model")
        for name in ("max_new_tokens", "n"):
            if getattr(self, name) < 1:
                raise BadInputError(f"replies.{name} = {getattr(self, name)} gives no reply; use 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise BadInputError(
                f"replies.temperature = {self.temperature}; use 0 for the likeliest tokens, or e.g. 1.0"
            )
        if not 0 <= self.seed < 2**64:
            raise BadInputError(f"replies.seed = {self.seed} is out of range; use a whole number from 0 to 2**64 - 1")
        if self.temperature == 0 and self.n > 1:
            raise BadInputError(f"replies.n = {self.n} at temperature 0 gives the same reply {self.n} times; use n = 1")
        object.__setattr__(self, "temperature", float(self.temperature))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read a rule from JSON values; ``TypeError`` for what is none."""
        return cls(**require_fields(cls, value))
