"""Compare files with the SHA-256 that somebody recorded for them."""

import re
from collections.abc import Mapping
from pathlib import Path

from ..files import sha256
from .pickles import is_archive

_LARGEST = 1 << 20  # bytes of a list of digests
_SHA256 = re.compile(r"[0-9a-f]{64}")


def unchecked_files(paths: list[Path], known: Mapping[str, str]) -> list[str]:
    """Those files of `paths` in which a flipped bit would go unnoticed.

    The others have checksums of their own, as archives of torch.save do, or a digest is recorded
    for them: in `known`, by their paths; in `SHA256SUMS` or `NAME.sha256` beside the file, as
    sha256sum writes them; or where the hub's client keeps what the hub says. A ValueError tells
    which file differs from that.
    """
    unchecked = []
    for path in paths:
        digest = known.get(str(path))
        recorded, where = (digest, "OpenAI's weights have") if digest else _recorded(path)
        if recorded is None:
            if not is_archive(path):
                unchecked.append(str(path))
        elif (found := sha256(path)) != recorded:
            raise ValueError(
                f"{path} has the SHA-256 {found}, and {where} {recorded}: it is damaged; remove "
                "it and fetch it again"
            )
    return unchecked


def _recorded(path: Path) -> tuple[str | None, str]:
    """The digest recorded for `path`, if any, and who says so."""
    for sums in (path.with_name("SHA256SUMS"), path.with_name(f"{path.name}.sha256")):
        for line in _lines(sums):
            digest, _, name = line.lower().partition(" ")
            if _SHA256.fullmatch(digest) and name.lstrip(" *") in ("", "-", path.name.lower()):
                return digest, f"{sums} says"
    # The hub's client names large files in its cache, and their entity tags, by their digest.
    if path.is_symlink() and _SHA256.fullmatch(path.resolve().name):
        return path.resolve().name, "the Hub says"
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    lines = _lines(metadata)
    if len(lines) > 1 and _SHA256.fullmatch(lines[1]):
        return lines[1], f"{metadata} says"
    return None, ""


def _lines(path: Path) -> list[str]:
    """The lines of the text file `path`; none if it is not there or too large."""
    is_there = path.is_file() and path.stat().st_size <= _LARGEST
    return path.read_text("utf-8", errors="replace").splitlines() if is_there else []
