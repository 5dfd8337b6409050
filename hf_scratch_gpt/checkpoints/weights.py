"""Write weights to safetensors files one tensor at a time.

The safetensors library wants all tensors of a file in memory at once, which for a model of any size
is the whole model. The format is simple enough to be written in order
(github.com/huggingface/safetensors, section Format): the length of a header, the header in JSON
with the place of each tensor, the tensors.
"""

import json
import os
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import logging

from .assemble import Planned, num_parameters

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_weights(
    folder: Path, planned: Planned, dtype: torch.dtype, max_shard_size: str = "50GB"
) -> None:
    """Read all tensors of `planned` and write them to `folder`, cast to `dtype`.

    Args:
        max_shard_size: largest size of one file, such as "5GB"; several get an index.

    Raises:
        ValueError: `max_shard_size` is not a size, or a tensor holds NaN or infinity or does not
            fit `dtype`; names it.
    """
    file_of = _write_headers(folder, planned, dtype, max_shard_size)
    size = num_parameters(planned) * dtype.itemsize
    bar = logging.tqdm(total=size, unit="B", unit_scale=True, desc="Converting")
    with bar:
        for name, tensor in planned.items():
            data = _bytes(tensor.read(), dtype, tensor.where)
            with (folder / file_of[name]).open("ab") as shard:
                shard.write(data)
            bar.update(len(data))
    for file in set(file_of.values()):
        _bring_to_disk(folder / file)


def _write_headers(
    folder: Path, planned: Planned, dtype: torch.dtype, max_shard_size: str
) -> dict[str, str]:
    """Begin each file, and write the index of several; the file of each tensor."""
    tensors = {
        name: torch.empty(tensor.shape, dtype=dtype, device="meta")
        for name, tensor in planned.items()
    }
    try:
        if max_shard_size.startswith("-"):
            raise ValueError
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError:
        raise ValueError(f"{max_shard_size!r} is not a size of a file; try 5GB") from None
    if split.is_sharded:
        metadata = {"total_parameters": num_parameters(planned), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    for file, names in split.filename_to_tensors.items():
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends = accumulate((tensors[name].nbytes for name in names), initial=0)
        for name, place in zip(names, pairwise(ends), strict=True):
            shape = planned[name].shape
            fields[name] = dict(dtype=_NAMES[dtype], shape=shape, data_offsets=place)
        text = json.dumps(fields, separators=(",", ":"))
        text += " " * (-len(text) % 8)
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text.encode())
    return split.tensor_to_filename


def _bytes(stored: torch.Tensor, dtype: torch.dtype, where: str) -> memoryview:
    """The bytes of the tensor `stored`, which comes from `where`, as `dtype`."""
    tensor = stored.to(dtype).contiguous()
    lowest, highest = tensor.aminmax()  # both are NaN if any value is
    if not (lowest.isfinite() and highest.isfinite()):
        if stored.isfinite().all():
            raise ValueError(
                f"{where} has values past the {torch.finfo(dtype).max:.3g} that {dtype} holds; "
                "convert to bfloat16 or float32"
            )
        raise ValueError(f"{where} holds NaN or infinity")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _bring_to_disk(path: Path) -> None:
    """Wait until `path` is on the disk, and forget it in memory, so that it is read from there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
