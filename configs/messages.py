"""What went wrong on the machine, in one sentence for the user: for the command lines of both halves."""

import errno

_DENIED = (errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def os_sentence(error: OSError) -> str:
    """An error of the file system or network, with the file that it is about and what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _FULL:
        return f"the disk is full{where}. Free some space, then run the same command; it continues where it stopped."
    if error.errno in _DENIED:
        return f"no permission{where}. Change the permissions or choose another --out, then run the same command."
    if error.errno == errno.EROFS:
        return f"the file system is read-only{where}. Choose another --out, then run the same command."
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"a file stands where a folder is needed{where}. Move it away or choose another --out."
    return f"{' '.join(str(error).split())}. Mend that, then run the same command; it continues where it stopped."
