"""Write weights to safetensors files one tensor at a time.

The safetensors library wants all tensors of a file in memory at once, which for a model of any size
is the whole model. The format is simple enough to be written in order
(github.com/huggingface/safetensors, section Format): the length of a header, the header in JSON
with the place of each tensor, the tensors.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import logging

from .assemble import Piece, num_parameters

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def write_weights(
    folder: Path, pieces: list[Piece], dtype: torch.dtype, max_shard_size: str = "50GB"
) -> dict[str, str]:
    """Read all tensors of `pieces` and write them to `folder` as transformers does.

    Args:
        dtype: what to cast to.
        max_shard_size: largest size of one file, such as "5GB"; several get an index.

    Returns:
        The SHA-256 of each weight file by its name.

    Raises:
        ValueError: `max_shard_size` is not a size, or a tensor holds NaN or infinity or does not
            fit `dtype`; names it.
    """
    tensors = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for piece in pieces
        for name, shape in zip(piece.names, piece.shapes, strict=True)
    }
    try:
        split = split_torch_state_dict_into_shards(
            tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError:
        raise ValueError(
            f"{max_shard_size!r} is not a size of a file; give one such as 5GB"
        ) from None
    digests = {}
    for file, names in split.filename_to_tensors.items():
        header = _header({name: tensors[name] for name in names})
        (folder / file).write_bytes(header)
        digests[file] = hashlib.sha256(header)
    size = split.metadata["total_size"]
    with (
        ThreadPoolExecutor(1) as pool,
        logging.tqdm(total=size, unit="B", unit_scale=True, desc="Converting") as progress,
    ):
        for piece in pieces:
            for name, tensor in zip(piece.names, piece.read(), strict=True):
                file = split.tensor_to_filename[name]
                data = _bytes(tensor, dtype, piece.where)
                hashing = pool.submit(digests[file].update, data)
                with (folder / file).open("ab") as shard:
                    shard.write(data)
                hashing.result()
                progress.update(len(data))
    for file in digests:
        _bring_to_disk(folder / file)
    if split.is_sharded:
        metadata = {"total_parameters": num_parameters(pieces), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return {file: digest.hexdigest() for file, digest in digests.items()}


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    """The bytes before `tensors` (on the meta device) in their file."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        fields[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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
