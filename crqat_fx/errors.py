"""The one exception that stands for a mistake in what the user gave, not for a bug."""


class UserError(Exception):
    """What is wrong, where, and what to do about it, in one line. The command line prints it and exits with status 2."""

    def __init__(self, what: str, *, where: object = None, remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        place = "" if where is None else f"{where}: "
        advice = f"; {remedy}" if remedy else ""
        super().__init__(" ".join(f"{place}{what}{advice}".split()))
