"""The entry of the command line. One line on stderr and exit status 2: a UserError, a pass that meets what it cannot take, a package that a
command needs and that is not installed."""

import sys

from crqat_fx.cli import app
from crqat_fx.console import write_what_the_terminal_cannot
from crqat_fx.errors import UserError
from passes.base import PassError

# the extra that brings a package
EXTRAS = {
    **dict.fromkeys(("onnxruntime", "onnx", "faster_coco_eval"), "runtime"),
    **dict.fromkeys(("torch", "onnx_ir", "onnxscript", "ml_dtypes", "tensorboardX", "matplotlib"), "full"),
}


def main() -> None:
    write_what_the_terminal_cannot()
    try:
        app(prog_name="crqat-fx")
    except (UserError, PassError) as error:
        print(f"crqat-fx: error: {error}", file=sys.stderr)  # noqa: T201  # the one place that speaks to the user of an error
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        remedy = f"pip install 'crqat-fx[{EXTRAS[package]}]'"
        print(f"crqat-fx: error: this needs {package}, which is not installed; {remedy}", file=sys.stderr)  # noqa: T201  # as above
        sys.exit(2)


if __name__ == "__main__":
    main()
