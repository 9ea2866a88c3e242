"""Archives that somebody else made (tar(5)), plain or compressed as Python's tarfile knows it: gzip, bzip2, xz."""

import gzip
import lzma
import tarfile
import zlib

UNREADABLE = (
    FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError,
    tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError,
)  # fmt: skip
"""What opening and reading one raises if it is not there, or is none, or not whole; a full disk, which it is often unpacked to, is not in it."""
