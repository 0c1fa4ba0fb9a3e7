"""Next-token cross-entropy."""

from __future__ import annotations

from torch import Tensor


def nll(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood of the demonstrated tokens.

        loss = -log p(token | its path)

    Args:
        logprobs: float[N], of the scored tokens, nats.
    Returns:
        float[N], nats per token. A uniform model over V tokens gives ln V.
    """
    return -logprobs
