"""The errors that autopar raises for a user's mistake, one class for each exit code.

Every message is one line that says what is wrong, where, and what to do about it. Anything else that escapes is a bug
of autopar's own.
"""


class AutoparError(Exception):
    """A user's mistake or an impossible request; `exit_code` is the command's exit status."""

    exit_code = 2


class InputError(AutoparError, ValueError):
    """Bad input: a missing or malformed file, an unknown name, a number that does not divide. Exit code 2."""


class CaptureError(InputError):
    """A model that cannot be captured; the message names the module and the source line. Exit code 2."""


class PlanMismatchError(InputError):
    """A plan that was made for another model, cluster or world size. Exit code 2."""


class InfeasibleError(AutoparError):
    """No plan fits; the message says the smallest change that would make one fit. Exit code 1."""

    exit_code = 1


class NotFiniteError(AutoparError, ArithmeticError):
    """A loss that is NaN or infinite, where the user asked to stop then. Exit code 1."""

    exit_code = 1


class RankFailedError(AutoparError, RuntimeError):
    """Another rank of the job died, failed or hangs; the message names it. Exit code 1."""

    exit_code = 1
