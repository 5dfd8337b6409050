"""A stream of token ids -> blocks that a model is trained on.

Blocks are equal parts of the stream: there is no padding, and a document may go on from block to
block.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Sampler, Subset

from .corpus import TokenFile


class Blocks(Dataset):
    """Equal parts of a stream of tokens, as a model is trained on them.

    Item i is `input_ids` and `labels`, both (`block_size`,) of int64 and equal: the model shifts
    the labels. Tokens at the end that do not fill a block are dropped.

    Args:
        file: the stream.
        block_size: tokens in a block.
        places: numbers of the blocks in the stream; all of them if not given.

    Raises:
        ValueError: the stream is shorter than a block.
    """

    def __init__(
        self, file: TokenFile, block_size: int, places: Sequence[int] | None = None
    ) -> None:
        if block_size < 2:
            raise ValueError(f"block_size={block_size} leaves no token to predict; give 2 or more")
        if file.tokens < block_size:
            raise ValueError(
                f"the texts are {file.tokens} tokens, less than one block of {block_size}; give "
                "more text, or a smaller block_size"
            )
        self.file, self.block_size = file, block_size
        self.places = range(file.tokens // block_size) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first = self.places[index] * self.block_size * np.dtype(self.file.dtype).itemsize
        # A memory map would be copied, with all its ids, to a data loader's processes.
        block = np.fromfile(self.file.path, self.file.dtype, self.block_size, offset=first)
        ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def split(self, fraction: float) -> "tuple[Blocks, Blocks]":
        """Take the last `fraction` of the blocks, at least one, for validation.

        Raises:
            ValueError: `fraction` is not between 0 and 1, or nothing would be left to train on.
        """
        if not 0 < fraction < 1:
            raise ValueError(
                f"validation={fraction} is not a part of the blocks; give a number from 0 to 1"
            )
        border = len(self) - max(1, round(fraction * len(self)))
        if border < 1:
            raise ValueError(
                f"{len(self)} blocks of {self.block_size} tokens are too few to train on some and "
                f"validate on {fraction:.0%}; give more text, a smaller block_size, or texts of "
                "their own to validate on"
            )
        training, validation = self.places[:border], self.places[border:]
        return (
            Blocks(self.file, self.block_size, training),
            Blocks(self.file, self.block_size, validation),
        )

    def spread(self, tokens: int) -> "Blocks":
        """Blocks of at most `tokens` tokens, or one block, spread evenly over these.

        Raises:
            ValueError: `tokens` is below 1.
        """
        if tokens < 1:
            raise ValueError(f"validation_tokens={tokens} is below 1; give 1 or more")
        count = min(len(self), max(1, tokens // self.block_size))
        places = [self.places[i * len(self) // count] for i in range(count)]
        return Blocks(self.file, self.block_size, places)


def whole_batches(blocks: Blocks, batch_size: int) -> Dataset:
    """Blocks, the first of them repeated at the end until they fill the last batch.

    All steps are then of one size, and the same for any number of processes that share a batch.
    """
    count = math.ceil(len(blocks) / batch_size) * batch_size
    repeated, rest = divmod(count, len(blocks))
    return ConcatDataset([*[blocks] * repeated, Subset(blocks, range(rest))])


class ShuffledOrder(Sampler):
    """The order of accelerate's `SeedableRandomSampler`, which makes a list of all numbers.

    A list takes 40 bytes a number, this takes 4.

    Args:
        count: how many numbers.
        seed: that of the first epoch; each later one adds 1.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator, dtype=torch.int32)
        for part in order.split(1 << 12):
            yield from part.tolist()
        self.epoch += 1

    def set_epoch(self, epoch: int) -> None:
        """Begin at this epoch; accelerate calls it."""
        self.epoch = epoch
