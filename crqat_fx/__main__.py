"""The entry of the command line: a UserError, or a pass that meets what it cannot take, becomes one line on stderr and exit status 2."""

import sys

from crqat_fx.cli import app
from crqat_fx.console import write_what_the_terminal_cannot
from crqat_fx.errors import UserError
from passes.base import PassError


def main() -> None:
    write_what_the_terminal_cannot()
    try:
        app(prog_name="crqat-fx")
    except (UserError, PassError) as error:
        print(f"crqat-fx: error: {error}", file=sys.stderr)  # noqa: T201  # the one place that speaks to the user of an error
        sys.exit(2)


if __name__ == "__main__":
    main()
