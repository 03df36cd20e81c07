"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from autopar.errors import InputError


def write_text(path: str | Path, text: str) -> None:
    """Put `text` at `path`: readers see what was there before or the whole of it. InputError where that fails.

    A link stays and its file is written; into a device or a pipe, such as /dev/null, the text goes as it is.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            with target.open("w", encoding="utf-8") as file:
                file.write(text)
            return
        target = Path(os.path.realpath(target))
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # as an ordinary new file; mkstemp's are the owner's alone
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); name another place") from None
