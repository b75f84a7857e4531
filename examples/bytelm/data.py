"""Source text of Python's standard library, which every machine with Python has, as bytes."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

# Tests are half of the bytes and repeat themselves, not every distribution has them; the others are not the library's.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
HELD_OUT = 26  # of 256 values of a hash: a tenth of the files


class Text(NamedTuple):
    """Files one after the other, each followed by a zero byte, in the order of their paths."""

    train: torch.Tensor  # uint8
    held_out: torch.Tensor  # uint8
    files: int
    digest: str  # of all bytes: equal digests are equal texts

    def describe(self) -> dict[str, int | str]:
        return {
            "files": self.files,
            "train_bytes": len(self.train),
            "held_out_bytes": len(self.held_out),
            "digest": self.digest,
        }


def load(folder: Path | None = None, least: int = 1) -> Text:
    """The *.py files below a folder (None: the standard library). A file is held out or not by the hash of its path alone.

    Exits with one line if the folder is missing or either part has fewer bytes than `least`.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    parts, files, digest = {True: bytearray(), False: bytearray()}, 0, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root)
        # _sysconfigdata_*.py holds paths of the machine that built Python.
        if SKIPPED.isdisjoint(inner.parts) and not path.name.startswith("_sysconfigdata"):
            content = path.read_bytes() + b"\0"
            parts[hashlib.sha256(inner.as_posix().encode()).digest()[0] < HELD_OUT] += content
            digest.update(content)
            files += 1
    if min(map(len, parts.values())) < least:
        raise SystemExit(
            f"{root}: {len(parts[False])} bytes of *.py files to train on and {len(parts[True])} to hold out, {least} of each "
            "are needed; --text takes another folder"
        )
    train, held_out = (torch.frombuffer(parts[held], dtype=torch.uint8) for held in (False, True))
    return Text(train, held_out, files, digest.hexdigest()[:16])


def windows(text: torch.Tensor, starts: torch.Tensor, context: int) -> torch.Tensor:
    """(len(starts), context + 1) int64 bytes: the context and the byte after it."""
    return text[starts[:, None] + torch.arange(context + 1, device=text.device)].long()


def spaced(text: torch.Tensor, count: int, context: int) -> torch.Tensor:
    """`count` windows evenly spaced over the text."""
    starts = torch.linspace(0, len(text) - context - 1, count, dtype=torch.float64, device=text.device)
    return windows(text, starts.long(), context)
