"""What a term of the loss knows of a teacher's distributions, one row per position."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TopK(NamedTuple):
    """The K most probable tokens of N distributions over V tokens, and the mass of the V - K others.

    Args:
        ids: (N, K) the tokens, the most probable first.
        log_probabilities: (N, K) theirs, in nats.
        tail_log_probability: (N,) of all other tokens together; ``-inf`` where there are none.
    """

    ids: Tensor
    log_probabilities: Tensor
    tail_log_probability: Tensor


class Samples(NamedTuple):
    """N distributions known by M weighted draws each: ``E[sum_m weights_m [ids_m = v]]`` is the probability of v.

    Args:
        ids: (N, M) the tokens drawn; one may stand there more than once.
        weights: (N, M), they sum to one.
        entropy: (N,) of the whole distribution, in nats.
    """

    ids: Tensor
    weights: Tensor
    entropy: Tensor
