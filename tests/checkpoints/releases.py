"""Write a folder in the layout of OpenAI's release, from the public descriptions of its formats.

A TensorFlow V2 checkpoint is data shards of raw tensors and an index of protocol buffers
(tensorflow/core/protobuf/tensor_bundle.proto) in a LevelDB table (leveldb/doc/table_format.md).
"""

import json
import shutil
import struct
from pathlib import Path

import google_crc32c
import torch

from hf_scratch_gpt.checkpoints.tensor_bundle import read_bundle


def masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number: int) -> bytes:
    digits = []
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """A block of a table, in which no key borrows from the one before it."""
    entries = [
        varint(0) + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs
    ]
    return b"".join(entries) + struct.pack("<II", 0, 1)


def table(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """A table of one data block, an empty meta block and an index block."""
    data, handles = b"", []
    for content in (block(pairs), block([])):
        handles.append(varint(len(data)) + varint(len(content)))
        data += content + b"\0" + struct.pack("<I", masked_crc(content + b"\0"))
    content = block([(b"\xff", handles[0])])
    handles.append(varint(len(data)) + varint(len(content)))
    data += content + b"\0" + struct.pack("<I", masked_crc(content + b"\0"))
    footer = (handles[1] + handles[2]).ljust(40, b"\0")
    return data + footer + struct.pack("<Q", 0xDB4775248B80FB57)


def write_checkpoint(prefix: Path, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """Write float32 tensors, dealt to the shards in turn."""
    shards = [bytearray() for _ in range(num_shards)]
    pairs = [(b"", field(1, num_shards))]
    for count, (name, tensor) in enumerate(sorted(tensors.items())):
        number, data = count % num_shards, tensor.contiguous().numpy().tobytes()
        shape = b"".join(field(2, field(1, length)) for length in tensor.shape)
        entry = field(1, 1) + field(2, shape)
        entry += field(3, number) + field(4, len(shards[number])) + field(5, len(data))
        entry += varint(6 << 3 | 5) + struct.pack("<I", masked_crc(data))  # a fixed32
        shards[number] += data
        pairs.append((name.encode(), entry))
    for number, data in enumerate(shards):
        prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{num_shards:05d}").write_bytes(data)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(pairs))


def change_release(release: Path, folder: Path, change=lambda tensors: None, num_shards: int = 1):
    """A copy of a release with its tensors as `change` leaves them."""
    names = ("encoder.json", "vocab.bpe", "hparams.json", "checkpoint")
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes((release / name).read_bytes())
    tensors = {stored.name: stored.read().clone() for stored in read_bundle(release / "model.ckpt")}
    change(tensors)
    write_checkpoint(folder / "model.ckpt", tensors, num_shards)


def write_release(
    folder: Path, vocabulary: Path, sizes: dict[str, int], seed: int = 0, num_shards: int = 1
) -> None:
    """A release of random weights with the tokens of the release `vocabulary`."""
    folder.mkdir(parents=True)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(vocabulary / name, folder / name)
    (folder / "hparams.json").write_text(json.dumps(sizes))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    generator = torch.Generator().manual_seed(seed)
    width = sizes["n_embd"]
    shapes = {"wte": (sizes["n_vocab"], width), "wpe": (sizes["n_ctx"], width)}
    shapes |= {"ln_f/g": (width,), "ln_f/b": (width,)}
    for layer in range(sizes["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h{layer}/{norm}/{leaf}": (width,) for leaf in "gb"}
        for linear, inputs, outputs in (
            ("attn/c_attn", width, 3 * width),
            ("attn/c_proj", width, width),
            ("mlp/c_fc", width, 4 * width),
            ("mlp/c_proj", 4 * width, width),
        ):
            shapes[f"h{layer}/{linear}/w"] = (1, inputs, outputs)
            shapes[f"h{layer}/{linear}/b"] = (outputs,)
    weights = {
        f"model/{name}": name.endswith("/g") + torch.randn(shape, generator=generator) * 0.02
        for name, shape in shapes.items()
    }
    write_checkpoint(folder / "model.ckpt", weights, num_shards)
