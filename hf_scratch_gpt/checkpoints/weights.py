"""Write weights to safetensors files one tensor at a time.

The safetensors library wants all tensors of a file in memory at once, which for a model of any size
is the whole model. The format is simple enough to be written in order
(github.com/huggingface/safetensors, section Format): the length of a header, the header in JSON
with the place of each tensor, the tensors.
"""

import hashlib
import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers.utils import logging

from .assemble import Piece, num_parameters
from .direct_io import DirectFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BUFFERS = 3  # one is filled while two are written


def write_weights(
    folder: Path, pieces: list[Piece], dtype: torch.dtype, max_shard_size: str
) -> dict[str, str]:
    """Read all tensors of `pieces` and write them to `folder` as transformers does.

    Args:
        dtype: what to cast to.
        max_shard_size: largest size of one file, such as "5GB"; several get an index.

    Returns:
        The SHA-256 of each weight file by its name.

    Raises:
        ValueError: `max_shard_size` is no size, or a tensor holds NaN or infinity or does not fit
            `dtype`; names it.
    """
    ours = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for piece in pieces
        for name, shape in zip(piece.names, piece.shapes, strict=True)
    }
    try:
        split = split_torch_state_dict_into_shards(
            ours, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError:
        raise ValueError(f"{max_shard_size!r} is no size of a file; give one such as 5GB") from None
    files: dict[str, _ShardFile] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other cores write and hash
    try:
        size = split.metadata["total_size"]
        with logging.tqdm(total=size, unit="B", unit_scale=True, desc="Converting") as progress:
            for piece in pieces:
                for name, tensor, where in zip(
                    piece.names, piece.read(), piece.origins(), strict=True
                ):
                    file = split.tensor_to_filename[name]
                    if file not in files:
                        members = {key: ours[key] for key in split.filename_to_tensors[file]}
                        files[file] = _ShardFile(folder / file, members)
                    files[file].append(tensor, dtype, where)
                    progress.update(tensor.numel() * dtype.itemsize)
    finally:
        for shard in files.values():
            shard.close()
        torch.set_num_threads(threads)
    if split.is_sharded:
        metadata = {"total_parameters": num_parameters(pieces), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return {file: shard.digest.hexdigest() for file, shard in files.items()}


class _ShardFile:
    """A safetensors file, to which tensors are appended in the order of its header.

    It closes after the last one: a tensor larger than a shard may be has one of its own, and the
    shard before it goes on after it.

    Writing and hashing have a thread each, and run while the next tensor is prepared.
    """

    def __init__(self, path: Path, members: dict[str, torch.Tensor]) -> None:
        self.digest = hashlib.sha256()
        self._awaited = len(members)
        self._file = DirectFile(path)
        self._writing, self._hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._pending: deque[list[Future[object]]] = deque()
        self._buffers = deque(torch.empty(0, dtype=torch.uint8) for _ in range(_BUFFERS))
        self._submit(_header(members))

    def append(self, stored: torch.Tensor, dtype: torch.dtype, where: str) -> None:
        """Write the tensor `stored`, which comes from `where`, as `dtype`."""
        tensor = stored
        if tensor.dtype != dtype or not tensor.is_contiguous():
            target = self._buffer(tensor.numel() * dtype.itemsize).view(dtype).view(tensor.shape)
            tensor = target.copy_(stored)
        lowest, highest = tensor.aminmax()  # both are NaN if any value is
        if not (lowest.isfinite() and highest.isfinite()):
            if stored.isfinite().all():
                raise ValueError(
                    f"{where} has values past the {torch.finfo(dtype).max:.3g} that {dtype} holds; "
                    "convert to bfloat16 or float32"
                )
            raise ValueError(f"{where} holds NaN or infinity")
        self._submit(tensor.reshape(-1).view(torch.uint8))
        self._awaited -= 1
        if not self._awaited:
            self.close()

    def _buffer(self, size: int) -> torch.Tensor:
        """`size` bytes of memory of which nothing pending makes use."""
        buffer = self._buffers.popleft()
        if buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8)
        self._buffers.append(buffer)
        return buffer[:size]

    def _submit(self, data: torch.Tensor) -> None:
        self._pending.append(
            [
                self._writing.submit(self._file.write, data),
                self._hashing.submit(self.digest.update, data.numpy().data),
            ]
        )
        if len(self._pending) == _BUFFERS:
            self._wait()

    def _wait(self) -> None:
        for future in self._pending.popleft():
            future.result()

    def close(self) -> None:
        """Wait until all is written."""
        try:
            while self._pending:
                self._wait()
        finally:
            self._writing.shutdown()
            self._hashing.shutdown()
            self._buffers.clear()
            self._file.close()


def _header(members: dict[str, torch.Tensor]) -> torch.Tensor:
    """The bytes before the tensors `members` (on the meta device) in their file."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in members.items():
        start, end = end, end + tensor.nbytes
        fields[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
