"""The two ways to fail that are not our bug."""

from __future__ import annotations


class UserError(Exception):
    """The user's input cannot be used: one sentence that names it, and how to mend it. Exit code 2."""

    exit_code = 2


class CheckFailed(Exception):
    """A check ran to its end and failed; what it measured is in the report. Exit code 1."""

    exit_code = 1
