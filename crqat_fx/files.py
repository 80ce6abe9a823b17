"""Writing a file whole or not at all."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crqat_fx.errors import UserError


@contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place when the block ends well and is removed when it does not."""
    target = Path(path)
    try:
        if target.is_dir():
            raise UserError("is a folder, not a file", where=target, remedy="name a file to write")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
        temporary.touch(exist_ok=False)  # with the rights that any new file gets, which tempfile would withhold from others
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=target, remedy="name a path in a folder you may write to") from error
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=target, remedy="make room, or name another place") from error
    finally:
        temporary.unlink(missing_ok=True)
