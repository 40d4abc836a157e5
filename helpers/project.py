"""What every module needs: where things are, how files are written, how errors are reported."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

WRITING = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM
ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "notebooks" / "parameters"
RUNS = ROOT / "notebooks" / "runs"
BENCHMARKS = ROOT / "notebooks" / "benchmarks"
FIGURES = ROOT / "figures"


class ProjectError(Exception):
    """Something a user can fix; the message is one sentence that names it and the remedy."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback (in notebooks, and so in papermill)."""
        return [f"{type(self).__name__}: {self}"]


def short(path: Path) -> str:
    """A path as a reader knows it: from the project's root, if it is inside."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names most like a wrong one (of a few names: all), and how many there are."""
    known, close = list(known), difflib.get_close_matches
    found = " or ".join(close(name, known, 3, 0.5) or sorted(known) * (len(known) < 6))
    meant = f"did you mean {found}? ({len(known)} are known)"
    return meant if found else f"none of the {len(known)} known names is similar"


def write_file(
    path: Path, content: str | bytes | Callable[[IO[bytes]], object], keep: Path | None = None
) -> None:
    """Write a file aside, sync it and move it into place, so that readers find it whole; `content`
    may be a function that writes into an open file. What was there before is moved to `keep`."""
    aside = path.with_name(path.name + ".new")
    if isinstance(content, str):
        content = content.encode("utf-8")
    try:
        with aside.open("wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.is_file():
            path.replace(keep)
        aside.replace(path)
    finally:  # half a file would take the room that the next one needs
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def exit_with_message(kept: str) -> Iterator[None]:
    """Report errors that a user can cause in one sentence, with status 1; `kept` is said when the
    command is stopped from the keyboard."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # printing never fails
    try:
        yield
    except ProjectError as error:
        sys.exit(str(error))
    except (OSError, MemoryError) as error:
        name = getattr(error, "filename", None)
        what = getattr(error, "strerror", None) or str(error) or "out of memory"
        where = f"{short(Path(name))}: " if name else ""
        is_writing = getattr(error, "errno", None) in WRITING
        remedy = "; free some space, or use a copy that you may write" * is_writing
        sys.exit(f"{where}{what}{remedy}.")
    except KeyboardInterrupt:
        sys.exit(f"Interrupted; {kept}.")
