"""Output that appears whole or not at all: written under a temporary name beside the target, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp


@contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and disappears otherwise.

    Raises:
        FileExistsError: the folder exists, is not empty, and must not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f'"folder" must not be a file, got {str(folder)!r}.')
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f'"folder" must be new or empty, or give --overwrite; {str(folder)!r} holds files.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        old = None
        if folder.exists():
            old = temporary.with_name(temporary.name + ".old")
            folder.rename(old)
        temporary.rename(folder)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and disappears otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
