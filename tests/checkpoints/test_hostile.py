"""Whatever a file holds, a command ends soon, in little memory, with one short printable line."""

import json
import os
import re
import shutil
import struct
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_scratch_gpt.checkpoints.bundled import BUNDLED
from hf_scratch_gpt.model.vocabulary_scratch_gpt import BYTE_TO_UNICODE

from ..commands import convert as convert_command
from ..commands import export as export_command
from .hostile import CLI, CONVERT, ESCAPE, EXPORT, VERIFY, spoil, write_sources
from .releases import block, masked_crc, varint
from .worker import Worker

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures by Linux's /proc"
)
CASES, GROUPS = 4200, 12


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory, converted_tiny):
    exported = tmp_path_factory.mktemp("exported") / "gpt2"
    assert export_command([str(converted_tiny), str(exported)]) == 0
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder, converted_tiny, exported)
    return folder


def command(kind: str, file: Path, out: Path, chance: Random) -> list[str]:
    """A command on the source of `kind` in which `file` lies, and its arguments."""
    source = file.parent
    generates = [CLI, "generate", str(source), "Hello", "--max-new-tokens", "2"]
    if kind == "saved":
        release = str(BUNDLED)
        commands = [[EXPORT, str(source), str(out)], [VERIFY, release, str(source)], generates]
        return chance.choice([*commands, [CLI, "info", str(source)]])
    if kind in ("hf", "bin") and chance.random() < 0.4:
        return chance.choice([generates, [CLI, "info", str(source)]])
    if kind in ("textbook", "legacy", "llmc"):
        options = ["--num-heads", "2"] if kind != "llmc" else []
        return [CONVERT, str(file), str(out), *options]
    return [CONVERT, str(source), str(out)]


def is_read(path: Path) -> bool:
    return path.suffix not in (".py", ".md")


NAMED = {}  # how to make a source in a folder of sources, and what is said of it


def named(message=""):
    def keep(make):
        NAMED[make.__name__] = make, message
        return make

    return keep


def rewritten(path: Path, more=(), change=lambda name, data: data) -> bytes:
    """The archive `path` as Python writes it, with `more` members."""
    with zipfile.ZipFile(path) as old:
        members = [(name, change(name, old.read(name))) for name in old.namelist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in [*more, *members]:
            new.writestr(name, data)
    return path.read_bytes()


def textbook_of(sources: Path, out: str, kind="textbook/model.pth") -> list[str]:
    return [CONVERT, str(sources / kind), out, "--num-heads", "2"]


TUPLES = b"\x80\x02})" + b"q\x00h\x00\x86" * 45 + b"K\x01s."  # {((.., ..), (.., ..)): 1}


@named()
def one_member_named_sixty_thousand_times(sources, out):
    path = sources / "textbook" / "model.pth"
    rewritten(path, [("model/data/999", bytes(1 << 21))])
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += archive.filelist[:1] * 60_000
        archive._didModify = True
    return textbook_of(sources, out)


@named("has a tuple for a key")
def nested_tuples_for_a_key(sources, out):
    path = sources / "textbook" / "model.pth"
    rewritten(path, change=lambda name, data: TUPLES if name.endswith("data.pkl") else data)
    return textbook_of(sources, out)


@named("has a tuple for a key")
def nested_tuples_for_a_key_of_old(sources, out):
    path = sources / "legacy" / "old.pth"
    data = path.read_bytes()
    start = data.index(b"\x80\x02}q\x00(X", 1 + data.index(b"little_endian"))
    path.write_bytes(data[:start] + TUPLES + data[start:])
    return textbook_of(sources, out, "legacy/old.pth")


@named("its tensors would take|does not fit its storage")
def a_tensor_that_repeats_one_number(sources, out):
    path = sources / "textbook" / "model.pth"
    large = torch.zeros(16).expand(1 << 26, 16)
    torch.save(torch.load(path) | {"tok_emb.weight": large, "out_head.weight": large}, path)
    return textbook_of(sources, out)


def index_of(sources: Path, entries: bytes, handles: int) -> None:
    content = entries + struct.pack("<II", 0, 1)
    handle = varint(0) + varint(len(content))
    data = content + b"\0" + struct.pack("<I", masked_crc(content + b"\0"))
    index = block([(b"%05d" % number, handle) for number in range(handles)])
    place = varint(len(data)) + varint(len(index))
    data += index + b"\0" + struct.pack("<I", masked_crc(index + b"\0"))
    footer = (handle + place).ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    (sources / "openai" / "model.ckpt.index").write_bytes(data + footer)


@named("blocks that lie in one another")
def an_index_of_the_same_block_many_times(sources, out):
    entries = b"".join(varint(0) + varint(5) + varint(0) + b"%05d" % n for n in range(9000))
    index_of(sources, entries, handles=40_000)
    return [CONVERT, str(sources / "openai"), out]


@named("has a name of 900000 bytes")
def an_index_of_long_names(sources, out):
    entries = varint(0) + varint(900_000) + varint(0) + b"k" * 900_000
    more = (varint(899_995) + varint(5) + varint(0) + b"%05d" % n for n in range(3000))
    index_of(sources, entries + b"".join(more), handles=1)
    return [CONVERT, str(sources / "openai"), out]


@named("tokens too long to merge")
def merges_in_a_chain(sources, out):
    ids = dict.fromkeys(BYTE_TO_UNICODE.values()) | {"a" * n: 0 for n in range(2, 5000)}
    ids = {token: number for number, token in enumerate([*ids, "<|endoftext|>"])}
    merges = "\n".join(f"{'a' * n} a" for n in range(1, 4999))
    (sources / "openai" / "encoder.json").write_text(json.dumps(ids))
    (sources / "openai" / "vocab.bpe").write_text(merges)
    return [CONVERT, str(sources / "openai"), out]


@named("vocab.bpe has no merge|has over")
def a_million_tokens(sources, out):
    path = sources / "openai" / "encoder.json"
    more = {f"token{n}": 400 + n for n in range(1_100_000)}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return [CONVERT, str(sources / "openai"), out]


@named("index is missing, or is not a file")
def a_pipe_in_the_place_of_an_index(sources, out):
    (sources / "openai" / "model.ckpt.index").unlink()
    os.mkfifo(sources / "openai" / "model.ckpt.index")
    return [CONVERT, str(sources / "openai"), out]


@named("config.json has 3221225472 bytes, over")
def a_configuration_of_gigabytes(sources, out):
    os.truncate(sources / "hf" / "config.json", 3 << 30)
    return [CONVERT, str(sources / "hf"), out]


@named("has a header of 90000000 bytes, over")
def a_header_of_megabytes(sources, out):
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % n for n in range(1_500_000)) + b"}"
    data = (90_000_000).to_bytes(8, "little") + header.ljust(90_000_000)
    (sources / "hf" / "model.safetensors").write_bytes(data)
    return [CONVERT, str(sources / "hf"), out]


@named("holds|has tensors that GPT-2 has not|are too few")
def a_name_of_megabytes_with_escape_codes(sources, out):
    path = sources / "hf" / "model.safetensors"
    save_file(load_file(path) | {ESCAPE + "x" * (3 << 20): torch.ones(2)}, path)
    return [CONVERT, str(sources / "hf"), out]


@named("home directory")
def the_home_of_nobody(sources, out):
    return [CONVERT, str(sources / "openai"), "~nobody-of-that-name/out"]


@named("out")
def links_in_a_loop(sources, out):
    (sources / "out").symlink_to("out")
    return [CONVERT, str(sources / "openai"), str(sources / "out")]


@named("index.json should give each tensor's file in weight_map")
def a_flag_for_a_table_of_files(sources, out):
    (sources / "hf" / "model.safetensors").unlink()
    (sources / "hf" / "model.safetensors.index.json").write_text('{"weight_map": true}')
    return [CONVERT, str(sources / "hf"), out]


@pytest.mark.parametrize("name", NAMED)
def test_named_inputs(name, sources, worker, tmp_path):
    shutil.copytree(sources, tmp_path / "sources")
    make, message = NAMED[name]
    outcome = worker.run(*make(tmp_path / "sources", str(tmp_path / "out")))
    assert not outcome.faults(), outcome.text[-3000:]
    assert outcome.code == 0 or re.search(rf"error: .*({message})", outcome.text), outcome.text


LAYERS, LABELS = {"num_hidden_layers": 100_000}, {"num_labels": 2**31}
ODD_FIELDS = [
    ("convert", "hf/config.json", LABELS, "config.json: num_labels is 2147483648"),
    ("generate", "hf/config.json", LABELS, "config.json: num_labels is 2147483648"),
    ("info", "hf/config.json", LABELS, "config.json: num_labels is 2147483648"),
    ("export", "saved/config.json", LAYERS, "tensors are too few for 100000 layers"),
    ("generate", "saved/config.json", LAYERS, "tensors are too few for 100000 layers"),
    ("info", "hf/config.json", {"model_type": ESCAPE}, "is a model of type"),
    ("convert", "hf/tokenizer.json", {"model": True}, "json: model is a bool; it should be a dict"),
    ("generate", "hf/tokenizer.json", {"post_processor": 5}, "post_processor is a int"),
    ("generate", "saved/config.json", {"is_encoder_decoder": True}, "is_encoder_decoder is set"),
    ("generate", "saved/generation_config.json", {"eos_token_id": "x"}, "saved: "),
    ("generate", "hf/config.json", {"auto_map": {"AutoConfig": 5}}, "cannot be loaded"),
]


@pytest.mark.parametrize(("verb", "file", "fields", "message"), ODD_FIELDS)
def test_odd_fields(verb, file, fields, message, sources, worker, tmp_path):
    shutil.copytree(sources, tmp_path / "sources")
    path = tmp_path / "sources" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    folder, out = str(path.parent), str(tmp_path / "out")
    commands = {"convert": [CONVERT, folder, out], "export": [EXPORT, folder, out]}
    commands |= {"generate": [CLI, "generate", folder, "Hello"], "info": [CLI, "info", folder]}
    outcome = worker.run(*commands[verb])
    assert not outcome.faults(), outcome.text[-3000:]
    assert re.search(rf"error: .*{message}", outcome.text), outcome.text


def test_a_directory_that_torch_reads_differently(sources, tmp_path):
    """Python finds it before the end record, torch where the end record says."""
    path = tmp_path / "model.pth"
    shutil.copy(sources / "textbook" / "model.pth", path)
    data = rewritten(path, [("model/pad", bytes(1 << 14))])
    weights = convert(path, tmp_path / "first")
    with zipfile.ZipFile(path) as archive:
        offsets = [member.header_offset for member in archive.infolist()]
        places = {member.filename: n for n, member in enumerate(archive.infolist())}
        start = archive.start_dir
    size = len(data) - 22 - start
    one, other = places["model/data/21"], places["model/data/22"]  # of the same shape
    swapped = list(offsets)
    swapped[one], swapped[other] = offsets[other], offsets[one]
    python = [max(0, offset - size) for offset in offsets]  # it adds what stands between
    directories = [with_offsets(data[start:-22], each) for each in (swapped, python)]
    path.write_bytes(data[:start] + b"".join(directories) + data[-22:])
    assert convert(path, tmp_path / "second") == weights


def with_offsets(directory: bytes, offsets: list[int]) -> bytes:
    """A directory of an archive with other places of its members."""
    entries = directory.split(b"PK\1\2")[1:]
    pairs = zip(entries, offsets, strict=True)
    return b"".join(b"PK\1\2" + e[:38] + struct.pack("<I", o) + e[42:] for e, o in pairs)


def convert(path: Path, out: Path) -> bytes:
    assert convert_command([str(path), str(out), "--num-heads", "2"]) == 0
    return (out / "model.safetensors").read_bytes()


# A third of them in the long run; `pytest -m "long or fuzz"` takes all.
MARKS = [pytest.mark.long if group == 0 else pytest.mark.fuzz for group in range(GROUPS)]


@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=mark) for group, mark in enumerate(MARKS)]
)
def test_spoilt_files(group, sources, worker, tmp_path):
    faults = []
    for seed in range(group, CASES, GROUPS):
        chance = Random(seed)
        kind = chance.choice([path.name for path in sorted(sources.iterdir())])
        source, out = tmp_path / kind, tmp_path / "out"
        shutil.copytree(sources / kind, source)
        file = chance.choice([path for path in sorted(source.iterdir()) if is_read(path)])
        spoil(file, chance)
        arguments = command(kind, file, out, chance)
        outcome = worker.run(*arguments)
        where = f"seed {seed}, {file.name}: {arguments}\n{outcome.text[-3000:]}"
        faults += [f"{fault}: {where}" for fault in outcome.faults()]
        for folder in (source, out):
            shutil.rmtree(folder, ignore_errors=True)
    assert not faults, "\n".join(faults)
