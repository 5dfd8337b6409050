"""The best that counting pairs of tokens can do: what a language model has to beat."""

import numpy as np

from .blocks import Blocks


def bigram_loss(training: Blocks, validation: Blocks, vocabulary: int) -> float:
    """The loss on `validation` of the best bigram model of `training`, in nats per token.

    p(b|a) = (n(ab) + m p(b)) / (n(a) + m), the hierarchical Dirichlet model of MacKay & Peto 1995,
    with the weight m of eight that is best on `validation`, which favours it.

    Args:
        training, validation: the blocks on which a model is trained and validated.
        vocabulary: number of ids, V.
    """
    rows, held_out = _rows(training), _rows(validation)  # (N, T) and (M, T)
    pairs = np.zeros((vocabulary, vocabulary), dtype=np.int64)
    np.add.at(pairs, (rows[:, :-1], rows[:, 1:]), 1)
    frequency = np.bincount(rows.ravel(), minlength=vocabulary) + 1.0
    frequency /= frequency.sum()
    before, after = held_out[:, :-1], held_out[:, 1:]
    followed = pairs.sum(axis=1)
    losses = [
        -np.log((pairs[before, after] + m * frequency[after]) / (followed[before] + m)).mean()
        for m in (1, 2, 5, 10, 20, 50, 100, 200)
    ]
    return float(min(losses))


def _rows(blocks: Blocks) -> np.ndarray:
    return np.stack([blocks[i]["input_ids"] for i in range(len(blocks))])
