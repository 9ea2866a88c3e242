"""Archives that other programs made (tar(5)): plain, or compressed with gzip, bzip2 or xz."""

import gzip
import lzma
import tarfile
import zlib

UNREADABLE = (
    FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError,
    tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError,
)  # fmt: skip
"""The exceptions of an archive that does not exist, is not an archive, or is damaged.

Other errors are not the archive's fault: it may be unpacked onto a disk that is full.
"""
