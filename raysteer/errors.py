"""The exceptions of raysteer: what a user can fix is one line that names the subject, the problem and the remedy.

``UserError`` and its children mean "your input, fix it" (exit code 2); ``DeadlineExceeded`` and ``ParityError`` mean
"the run could not go on" (exit code 3). Anything else that escapes is a bug of ours and keeps its stack trace.
"""

from typing import Any


class UserError(Exception):
    """Something the user can fix.

    Args:
        subject: the file, key, address or run the error is about.
        problem: what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, subject: str, problem: str, remedy: str) -> None:
        super().__init__(subject, problem, remedy)
        self.subject = subject
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return _one_line(f"{self.subject}: {self.problem}; {self.remedy}")


class ConfigError(UserError):
    """A recipe key has an impossible value.

    Args:
        key: full dotted path of the key.
        value: the value found (``None`` prints as "missing or null").
        remedy: what would be right.
    """

    def __init__(self, key: str, value: Any, remedy: str) -> None:
        Exception.__init__(self, key, value, remedy)  # args must equal the parameters, or unpickling in Ray fails
        self.key = self.subject = key
        self.value = value
        self.problem = "missing or null" if value is None else f"{_shorten(repr(value))} cannot be used"
        self.remedy = remedy


class ModelError(UserError):
    """A model folder is missing, is not a pipeline, or is of a class we do not know."""


class PromptError(UserError):
    """A prompt file is missing, empty or malformed."""


class CheckpointError(UserError):
    """A checkpoint belongs to another recipe or cannot be read."""


class DatasetError(UserError):
    """A dataset of scored groups is not there, cannot be read, or was made with another model."""


class StorageError(UserError):
    """The run folder cannot be used: no space, not writable, in use."""


class TrackingError(UserError):
    """MLflow cannot be reached or refuses us."""


class ClusterError(UserError):
    """The Ray cluster cannot be reached or is too small."""


class ExportError(UserError):
    """An adapter cannot be exported."""


class CardError(UserError):
    """A metric card is not there, cannot be read, or cannot be compared with another."""


class DeadlineExceeded(RuntimeError):
    """A bounded wait ended without what it waited for.

    Args:
        waited_for: what did not come, in words.
        seconds: how long we waited.
        hint: who is probably at fault, and where to look.
    """

    def __init__(self, waited_for: str, seconds: float, hint: str) -> None:
        super().__init__(waited_for, seconds, hint)
        self.waited_for = waited_for
        self.seconds = seconds
        self.hint = hint

    def __str__(self) -> str:
        return _one_line(f"waited {self.seconds:.1f} s for {self.waited_for}; {self.hint}")


class ParityError(RuntimeError):
    """Replaying fresh trajectories did not reproduce their log-probabilities: sampler and learner disagree."""


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
