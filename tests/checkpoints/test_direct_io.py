"""Files that are read and written past the page cache."""

import errno
import os

import pytest
import torch

from hf_scratch_gpt.checkpoints import direct_io
from hf_scratch_gpt.checkpoints.direct_io import DirectFile, read_tensor


def refuse_direct(monkeypatch):
    """Act as a file system that knows no O_DIRECT; return the flags of what is opened."""
    opened = []
    real = os.open

    def fake(path, flags, *mode, **keywords):
        opened.append(flags)
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", path)
        return real(path, flags, *mode, **keywords)

    monkeypatch.setattr(direct_io.os, "open", fake)
    return opened


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "sizes", [[0], [1], [4096], [5, 4095, 8], [3 * direct_io._BLOCK + 7, 1], [direct_io._BLOCK]]
)
def test_what_is_written_is_read(tmp_path, monkeypatch, sizes, cached):
    if cached:
        if not hasattr(os, "O_DIRECT"):
            pytest.skip("this system has no other way than the cache")
        opened = refuse_direct(monkeypatch)
    path = tmp_path / "file"
    generator = torch.Generator().manual_seed(0)
    written = [
        torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes
    ]
    file = DirectFile(path)
    for data in written:
        file.write(data)
    file.close()
    file.close()  # a second time does nothing
    assert path.read_bytes() == b"".join(data.numpy().tobytes() for data in written)
    offset = 0
    for data in written:
        assert torch.equal(read_tensor(path, offset, data.shape, torch.uint8), data)
        offset += len(data)
    if cached:
        assert any(flags & os.O_DIRECT for flags in opened)


def test_shape_and_type(tmp_path):
    tensor = torch.randn(37, 11)
    path = tmp_path / "file"
    path.write_bytes(b"before" * 1001 + tensor.numpy().tobytes())
    assert torch.equal(read_tensor(path, 6006, (37, 11), torch.float32), tensor)


@pytest.mark.parametrize("length", [0, 100, 4096, 8191])
def test_short_file(tmp_path, length):
    path = tmp_path / "file"
    path.write_bytes(bytes(length))
    with pytest.raises(ValueError, match=f"{path} ends at"):
        read_tensor(path, 0, (2048,), torch.float32)


def test_other_errors_are_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "no" / "file")
