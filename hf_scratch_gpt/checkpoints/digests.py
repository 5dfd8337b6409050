"""Compare files with the SHA-256 that somebody recorded for them."""

import hashlib
import re
import zipfile
from pathlib import Path

from transformers.utils import logging

_CHUNK = 1 << 22
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(path: Path) -> str:
    """The SHA-256 of the file `path`, in hexadecimal digits."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        logging.tqdm(
            total=size,
            unit="B",
            unit_scale=True,
            desc=f"Checking {path.name}",
            leave=False,
            delay=1,
        ) as progress,
    ):
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()


def unchecked_files(paths: list[Path]) -> list[str]:
    """Those files of `paths` in which a flipped bit would go unnoticed.

    The others have checksums of their own, as archives of torch.save do, or a digest is recorded
    for them: in `SHA256SUMS` or `NAME.sha256` beside the file, as sha256sum writes them, or where
    the hub's client keeps what the hub says.

    Raises:
        ValueError: a file is not what was recorded.
    """
    return [
        str(path) for path in paths if not _matches_a_digest(path) and not zipfile.is_zipfile(path)
    ]


def _matches_a_digest(path: Path) -> bool:
    """Whether a digest of the file `path` is recorded, and, if so, is right."""
    recorded = _recorded(path)
    if recorded is None:
        return False
    where, expected = recorded
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"{path} has the SHA-256 {found}, and {where} says {expected}: it is damaged; fetch it "
            "again"
        )
    return True


def _recorded(path: Path) -> tuple[str, str] | None:
    """Where a digest of `path` is recorded, and the digest."""
    for sums in (path.with_name("SHA256SUMS"), path.with_name(f"{path.name}.sha256")):
        if not sums.is_file():
            continue
        for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
            digest, _, name = line.lower().partition(" ")
            if _SHA256.fullmatch(digest) and name.lstrip(" *") in ("", "-", path.name.lower()):
                return str(sums), digest
    # The hub's client names large files in its cache, and their entity tags, by their digest.
    if path.is_symlink() and _SHA256.fullmatch(path.resolve().name):
        return "the hub", path.resolve().name
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if metadata.is_file():
        lines = metadata.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) > 1 and _SHA256.fullmatch(lines[1]):
            return str(metadata), lines[1]
    return None
