"""What the same recipe would need with a larger model: arithmetic from stated formulas, nothing measured.

The memory of the weights is 16 bytes x trained parameters (float32 weight, gradient and the two moments of AdamW) plus
2 bytes x frozen parameters (bfloat16). With P the parameters of the model and A those of one adapter:

- four full models: policy and value trained, reference and reward frozen: 36 P;
- two full models: policy with the value head trained, reference frozen, the reward model an adapter on it: 18 P + 2 A;
- roles on one trunk: the trunk frozen, adapters of policy and value trained, the reward model's frozen: 2 P + 34 A.

The computation is 2 P a token read or written and 6 P a token trained on (Kaplan et al. 2020, arXiv 2001.08361, section
2.1); attention over long contexts comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kilter.report.figures import number

TRAINED_BYTES, FROZEN_BYTES = 16, 2
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in 4 bits, a scale in 8 for 64 of them, one in 32 for 256 of those: 4.127 bits (arXiv 2305.14314, 3)."""
GIB = 2**30
LORA_RANK = 16
SUSTAINED_FLOPS = 2e14
"""A large GPU's sustained bfloat16 rate in training, per second. Generation is slower: memory bandwidth binds it."""
BATCH_TOKENS, NUM_SEQUENCES, SEQUENCE_TOKENS = 8192, 64, 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a decoder with gated MLP and grouped heads, as in its configuration file."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def _matrices(self) -> list[tuple[int, int]]:
        """(in, out) of each linear map of one layer: query, key, value, output, gate, up, down."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*attention, (self.hidden, self.inner), (self.hidden, self.inner), (self.inner, self.hidden)]

    @property
    def parameters(self) -> int:
        """P: matrices and embeddings; norms are left out (below 0.1%)."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.linear

    @property
    def linear(self) -> int:
        """Parameters of the linear maps of all layers: what a base in 4 bits holds in 4 bits."""
        return self.layers * sum(rows * columns for rows, columns in self._matrices)

    def base_bytes(self, held: str) -> float:
        """Of the frozen model: 4 bytes a weight, or 2, of which "nf4" takes the linear maps to NF4_BYTES."""
        if held == "nf4":
            return NF4_BYTES * self.linear + FROZEN_BYTES * (self.parameters - self.linear)
        return (FROZEN_BYTES if held == "bfloat16" else 4) * self.parameters

    def cache_bytes(self, tokens: int, number: int) -> int:
        """Keys and values of so many tokens, in numbers of so many bytes."""
        return 2 * self.layers * self.kv_heads * self.head_size * number * tokens

    def activation_bytes(self, tokens: int, number: int, *, checkpointing: bool) -> int:
        """What a step keeps for its backward: about `(2 hidden + 3 inner + 2 queries)` numbers a token and layer; with
        checkpointing those of one layer, and one hidden state for each."""
        layer = 2 * self.hidden + 3 * self.inner + 2 * self.heads * self.head_size
        kept = self.layers * self.hidden + layer if checkpointing else self.layers * layer
        return tokens * number * kept

    def adapter(self, rank: int = LORA_RANK) -> int:
        """A: parameters of one LoRA adapter of `rank` on every linear map: rank (in + out) each."""
        return self.layers * sum(rank * (rows + columns) for rows, columns in self._matrices)

    @property
    def working_bytes(self) -> int:
        """What lies beside the weights: the rollout's keys and values, or a step's activations, whichever is more.

        Keys and values: 2 x layers x kv heads x head size x 2 bytes a token. Activations with checkpointing: one hidden
        state a layer in bfloat16, and one layer in full: about (2 hidden + 3 inner + 2 queries) x 4 bytes a token.
        """
        cache = 2 * self.layers * self.kv_heads * self.head_size * 2 * NUM_SEQUENCES * SEQUENCE_TOKENS
        layer = (2 * self.hidden + 3 * self.inner + 2 * self.heads * self.head_size) * 4
        return max(cache, BATCH_TOKENS * (self.layers * self.hidden * 2 + layer))


SHAPES = (
    Shape("0.6B", 28, 1024, 3072, 16, 8, 128, 151_936, True),  # Qwen3-0.6B
    Shape("8B", 36, 4096, 12_288, 32, 8, 128, 151_936, False),  # Qwen3-8B
)


@dataclass(frozen=True, slots=True)
class Need:
    """What one size needs: weights and working memory in GiB, computation, and hours of it at `SUSTAINED_FLOPS`."""

    name: str
    parameters: int
    four_models: float
    two_models: float
    one_trunk: float
    working: float
    flops: float
    hours: float


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens that a run trained on (counted once a pass), sampled, and scored without gradient."""

    trained: float
    sampled: float
    scored: float

    def flops(self, parameters: int) -> float:
        return parameters * (6 * self.trained + 2 * (self.sampled + self.scored))


MILLION_TRAINED = Work(1e6, 0, 0)


def memory(shape: Shape, rank: int = LORA_RANK) -> tuple[float, float, float]:
    """GiB of weights as four full models, two full models, and roles on one trunk."""
    full, adapter = shape.parameters, shape.adapter(rank)
    four = 2 * TRAINED_BYTES * full + 2 * FROZEN_BYTES * full
    two = TRAINED_BYTES * full + FROZEN_BYTES * full + FROZEN_BYTES * adapter
    one = FROZEN_BYTES * full + 2 * TRAINED_BYTES * adapter + FROZEN_BYTES * adapter
    return four / GIB, two / GIB, one / GIB


def read_work(summary: Mapping[str, Any]) -> Work | None:
    """The tokens of all stages from `summary.work`, or None when it says nothing."""
    stages = summary.get("work")
    rows = [row for row in stages.values() if isinstance(row, Mapping)] if isinstance(stages, Mapping) else []
    totals = [
        sum(value for row in rows if (value := number(row.get(key))) is not None and value > 0)
        for key in ("trained_tokens", "sampled_tokens", "scored_tokens")
    ]
    return Work(*totals) if any(totals) else None


def needs(summary: Mapping[str, Any]) -> list[Need]:
    """One row for each size; the computation is that of the run's tokens, or of a million trained on."""
    work = read_work(summary) or MILLION_TRAINED
    rows = []
    for shape in SHAPES:
        flops = work.flops(shape.parameters)
        hours = flops / SUSTAINED_FLOPS / 3600
        rows.append(Need(shape.name, shape.parameters, *memory(shape), shape.working_bytes / GIB, flops, hours))
    return rows
