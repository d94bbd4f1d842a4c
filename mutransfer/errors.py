"""The one error that a user's input raises: a single line that says what to do about it."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, said in one line: what, where, got, expected, cure.

    The command line prints it on stderr and exits with code 2.

    Args:
        what: What is wrong, as a short clause.
        where: The file, field or parameter that it was found in.
        got: The offending value, or `None` where there is none to show.
        expected: What would have been right, or `None`.
        cure: What the user can do, or `None` where `expected` says it already.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: object = None,
        cure: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.cure = what, where, got, expected, cure
        parts = [f"{where}: {what}" if where else what]
        if got is not None:
            parts.append(f"got {_short(got)}")
        if expected is not None:
            parts.append(f"expected {_short(expected)}")
        line = "; ".join(parts)
        text = " ".join((f"{line}. {cure}" if cure else line).split())
        super().__init__("".join(c if c.isprintable() else "?" for c in text))


def _short(value: object, limit: int = 300) -> str:
    """`value` on one line of at most `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
