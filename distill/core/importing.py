"""Import of user code: any exception becomes an InputError that says what was imported and where it failed."""

import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from distill.core.errors import InputError
from distill.core.text import one_line

TRAIN = "distill's own recipes need: pip install 'distill[train]'"


@dataclass(frozen=True)
class Importing:
    """Context manager around an import. Any exception of the module becomes an InputError with its file and line."""

    what: str
    """begins the message, like: recipe 'reflow/reflow'"""
    path: Path
    """file of the module"""
    extra: str = TRAIN
    """how to install a package that is missing"""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and not self._is_ctrl_c(error):
            raise InputError(f"{self.what} {self._reason(error)}") from error

    def _is_ctrl_c(self, error: BaseException) -> bool:
        """Whether the user interrupted the import. False if the module itself raised KeyboardInterrupt."""
        if not isinstance(error, KeyboardInterrupt):
            return False
        last = traceback.extract_tb(error.__traceback__)[-1]
        return last.filename != str(self.path) or not (last.line or "").startswith("raise")

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return f"needs the package {error.name}; {self.extra}"
        if isinstance(error, SystemExit):
            return f"exits the program when it is imported: it calls sys.exit({error.code}); remove this call"
        if isinstance(error, SyntaxError):
            return f"cannot be imported: {error}"
        lines = [each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == str(self.path)]
        where = f"{self.path}, line {lines[-1]}" if lines else str(self.path)
        said = one_line(str(error), 500)
        return f"cannot be imported: {where}: {type(error).__name__}" + (f": {said}" if said else "")
