"""Hostile inputs: folders of every format with one file spoilt, as a seed decides."""

import json
import os
import shutil
import struct
import zipfile
from io import BytesIO
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

from hf_scratch_gpt.checkpoints.bundled import BUNDLED
from hf_scratch_gpt.checkpoints.tensor_bundle import read_table

from .checkpoints import llmc, nanogpt, random_weights, textbook
from .releases import table

CONVERT, EXPORT, VERIFY = (f"tests.commands:{name}" for name in ("convert", "export", "verify"))
CLI = "hf_scratch_gpt.cli:main"
ESCAPE = "\x1b]0;evil\x07\x1b[31m"
NUMBERS = [-1, 0, 1, 5, 2**31, 2**31 - 1, 2**63, -(2**63), 10**30]
EVIL = [
    None,
    True,
    False,
    "",
    "x",
    ESCAPE,
    "x" * 100_000,
    "../../etc/passwd",
    "/dev/zero",
    "\ud800",
]
EVIL += [0.5, -0.5, 1e308, float("nan"), float("inf"), [], {}, [[]] * 50, {"a": {}}, ["x"]]
EVIL += [list(range(1000)), {str(number): number for number in range(1000)}, [None], *NUMBERS]
FIELDS = ["num_labels", "quantization_config", "compression_config", "custom_generate", "auto_map"]
FIELDS += ["is_encoder_decoder", "id2label", "dtype", "rope_scaling", "attn_implementation", ESCAPE]
FIELDS += ["num_hidden_layers", "pruned_heads", "architectures", "model_max_length", "extra"]


def write_sources(folder: Path, saved: Path, exported: Path) -> None:
    """A source of each kind in `folder`; the names of the kinds are those of their folders."""
    shutil.copytree(BUNDLED, folder / "openai")
    shutil.copytree(saved, folder / "saved")
    shutil.copytree(exported, folder / "hf")
    shutil.copytree(exported, folder / "bin")
    (folder / "bin" / "model.safetensors").unlink()
    weights = random_weights()
    for kind in ("nanogpt", "textbook", "llmc", "legacy"):
        (folder / kind).mkdir()
    nanogpt(folder / "nanogpt" / "ckpt.pt", weights)
    textbook(folder / "textbook" / "model.pth", weights)
    llmc(folder / "llmc" / "model.bin", weights)
    content = torch.load(folder / "textbook" / "model.pth")
    torch.save(content, folder / "legacy" / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(load_file(folder / "hf" / "model.safetensors"), folder / "bin" / "pytorch_model.bin")


def spoil(path: Path, chance: Random) -> None:
    """Spoil the file `path`, in a way that suits it."""
    if chance.random() < 0.06:
        return replace(path, chance)
    data, ways = path.read_bytes(), [spoil_bytes]
    if path.suffix == ".json":
        ways = [spoil_bytes, spoil_json, spoil_json, spoil_json]
    elif path.suffix in (".pt", ".pth") or path.name == "pytorch_model.bin":
        ways = [spoil_bytes, spoil_directory, spoil_content, spoil_content]
        if data[:2] == b"PK":
            ways += [spoil_pickle, spoil_pickle]
    elif path.suffix == ".safetensors":
        ways = [spoil_bytes, spoil_header, spoil_header, spoil_header]
    elif path.suffix == ".index":
        ways = [spoil_bytes, spoil_index, spoil_index]
    elif path.name == "model.bin":
        ways = [spoil_bytes, spoil_sizes, spoil_sizes]
    path.write_bytes(chance.choice(ways)(data, chance))


def replace(path: Path, chance: Random) -> None:
    """Something in the place of the file `path` that is no file, or not of its size."""
    size = path.stat().st_size
    path.unlink()
    how = chance.randrange(7)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how == 2:
        path.symlink_to(path.name)
    elif how == 3:
        path.symlink_to(chance.choice(["/dev/zero", "/dev/stdin", "/proc/self/mem", "/"]))
    elif how == 4:
        path.touch()
        os.truncate(path, chance.choice([0, 1, size, 1 << 33, 1 << 40]))


def spoil_bytes(data: bytes, chance: Random) -> bytes:
    place, few = chance.randrange(len(data) + 1), chance.randbytes(chance.randrange(1, 12))
    few = chance.choice([few, b"\xff" * 8, b"\0" * 8, ESCAPE.encode(), b"[" * 10_000, b"9" * 5000])
    start, end = data[:place], data[place:]
    return chance.choice([start, start + few + end, start + few + end[len(few) :], end, data * 2])


def spoil_json(data: bytes, chance: Random) -> bytes:
    content = json.loads(data)
    place, key = content, chance.choice([*content, *FIELDS])
    while isinstance(place.get(key), dict) and place[key] and chance.random() < 0.7:
        place = place[key]
        key = chance.choice([*place])
    if chance.random() < 0.1:
        place.pop(key, None)
    elif isinstance(place.get(key), list) and place[key] and chance.random() < 0.7:
        place[key][chance.randrange(len(place[key]))] = chance.choice(EVIL)
    else:
        place[key] = chance.choice(EVIL)
    return json.dumps(content).encode()


def spoil_content(data: bytes, chance: Random) -> bytes:
    content = torch.load(BytesIO(data))
    place = content if chance.random() < 0.3 else content.get("model", content)
    if chance.random() < 0.3:
        place = content.get("model_args", place)
    odd = [torch.ones(3), torch.ones(2, 2).to_sparse(), torch.zeros(1).expand(1 << 30, 48), {}]
    odd += [torch.tensor(float("nan")), torch.ones(60, 16).half(), torch.ones(9).bool(), *EVIL]
    key = chance.choice([*place, *place, *FIELDS, 5, None, 0.5])
    place[key] = chance.choice(odd)
    file = BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=data[:2] == b"PK")
    return file.getvalue()


def spoil_directory(data: bytes, chance: Random) -> bytes:
    """What stands at the end: the directory of an archive."""
    start = max(0, len(data) - chance.choice([30, 100, 5000]))
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        changed[chance.randrange(start, len(data))] = chance.choice([0, 1, 255, 128, 8])
    return bytes(changed)


def spoil_pickle(data: bytes, chance: Random) -> bytes:
    """A member of an archive, with its right checksum."""
    with zipfile.ZipFile(BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice([*members, *[n for n in members if n.endswith("data.pkl")] * len(members)])
    members[name] = spoil_bytes(members[name], chance)
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def spoil_header(data: bytes, chance: Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = spoil_json(data[8 : 8 + size], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def spoil_index(data: bytes, chance: Random) -> bytes:
    """An entry of a TensorFlow checkpoint, with its right checksum."""
    pairs = list(read_table(data))
    place = chance.randrange(len(pairs))
    key, value = pairs[place]
    if chance.random() < 0.3:
        key = spoil_bytes(key, chance)
    pairs[place] = (key, spoil_bytes(value, chance))
    return table(pairs)


def spoil_sizes(data: bytes, chance: Random) -> bytes:
    """A number in the header of llm.c."""
    place = 4 * chance.randrange(9)
    number = chance.choice([*NUMBERS, 100_000, 3, 16, 1 << 20]) % (1 << 32)
    return data[:place] + struct.pack("<I", number) + data[place + 4 :]
