"""Write a folder in the layout of OpenAI's release, from the public descriptions of its formats.

A TensorFlow V2 checkpoint is data shards of raw tensors and an index of protocol buffers
(tensorflow/core/protobuf/tensor_bundle.proto) in a LevelDB table (leveldb/doc/table_format.md).
"""

import json
import re
import shutil
import struct
from pathlib import Path

import google_crc32c
import torch
from transformers import GPT2LMHeadModel

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


def write_release(folder: Path, vocabulary: Path, model: GPT2LMHeadModel) -> None:
    """A release of the weights of `model`, with the tokens of the release `vocabulary`."""
    folder.mkdir(parents=True)
    for name in ("encoder.json", "vocab.bpe", "checkpoint"):
        shutil.copy(vocabulary / name, folder / name)
    config = model.config
    sizes = {name: getattr(config, name) for name in ("n_embd", "n_head", "n_layer")}
    sizes |= dict(n_vocab=config.vocab_size, n_ctx=config.n_positions)
    (folder / "hparams.json").write_text(json.dumps(sizes))
    weights = {}
    for name, tensor in model.transformer.state_dict().items():
        name = re.sub(r"^h\.", "h", name).replace(".", "/")
        name = re.sub(r"(ln_\w+)/weight", r"\1/g", name).replace("/bias", "/b")
        if name.endswith(("c_attn/weight", "c_proj/weight", "c_fc/weight")):
            name, tensor = name.removesuffix("eight"), tensor[None]
        weights["model/" + name.removesuffix("/weight")] = tensor
    write_checkpoint(folder / "model.ckpt", weights)
