"""Next-token cross-entropy and its rescaled form."""

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


def dft(logprobs: Tensor) -> Tensor:
    """Dynamic fine-tuning: each token's loss weighted by its own probability, so that what is unlikely is not forced.

        loss = -p log p,  the first p without gradient

    Wu et al. 2025, arXiv 2508.05629.

    Args:
        logprobs: float[N], of the scored tokens, nats.
    Returns:
        float[N], nats per token. p = 0.5 gives 0.3466.
    """
    return -logprobs.detach().exp() * logprobs
