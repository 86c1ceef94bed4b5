"""Writing files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file in place of the one that is there, if any.

    Whatever happens meanwhile, a kill or a power cut included, the path holds the old file or the
    new one, each whole. Once this returns, the new one survives a power cut.

    Args:
        path: the file; missing folders are made.
        data: its contents.

    Raises:
        OSError: the new file could not be written, and the old one is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because only there can it be renamed without a copy; and not by tempfile,
    # whose files nobody else may read.
    temporary = path.with_name(_prefix(path) + uuid.uuid4().hex[:8])
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep others that call this on the same folder out while the context is open.

    The end of the process, whatever it is, opens the folder again. Where the system or the file
    system has no locks, nobody is kept out.

    Args:
        folder: an existing folder.

    Raises:
        BlockingIOError: another one has it.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            try:
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Closing is not enough where a fork has the handle, too.
                stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)
            except BlockingIOError:
                raise
            except OSError:
                pass
        yield


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete what killed writers of this file left behind; nobody may be writing it now."""
    path = Path(path)
    for other in path.parent.iterdir():
        if other.name.startswith(_prefix(path)):
            other.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _sync_folder(folder: Path) -> None:
    """Put a rename within the folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(handle)
