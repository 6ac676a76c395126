"""What went wrong, in one sentence for the user: for the command lines of both halves."""

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path

_DENIED = (errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)
CONTINUES = "; it continues where it stopped"


def named_folder(text: str) -> Path:
    """The type of a command line's folder: empty, as from an unset variable, would be the working directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a folder.")
    return Path(text)


def answered(work: Callable[[], int], stopped: str) -> int:
    """The status of a command: its own; 130 after Ctrl-C; 2 for a wrong input or a file's failure, told in a sentence.

    Args:
        stopped: what is told after Ctrl-C.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print(f"stopped; {stopped}.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2


def sentence(error: BaseException, then: str = "") -> str:
    """A ValueError's or OSError's words on one line; `then`: what running the same command again does."""
    return os_sentence(error, then) if isinstance(error, OSError) else " ".join(str(error).split())


def os_sentence(error: OSError, then: str = CONTINUES) -> str:
    """An error of the file system or network, with the file that it is about and what to do."""
    where, again = f" ({error.filename})" if error.filename else "", f"run the same command{then}."
    if error.errno in _FULL:
        return f"the disk is full{where}. Free some space, then {again}"
    if error.errno in _DENIED:
        return f"no permission{where}. Change the permissions or choose another --out, then {again}"
    if error.errno == errno.EROFS:
        return f"the file system is read-only{where}. Choose another --out, then {again}"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"a file stands where a folder is needed{where}. Move it away or choose another --out, then {again}"
    return f"{' '.join(str(error).split())}. Mend that, then {again}"
