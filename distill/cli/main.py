"""The command `distill`: its subcommands and error handling."""

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import distill
from distill.cli import (
    cache,
    catalogue,
    compare,
    convert,
    doctor,
    emoji,
    encode,
    export,
    follow,
    inspect,
    jobs,
    lora,
    pairs,
    reflow,
    runs,
    schedule,
    settings,
    stage,
    students,
    tools,
    track,
    work,
)
from distill.core import printing
from distill.core.errors import (
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_PEER,
    EXIT_STOPPED,
    InputError,
    PeerLost,
    RunError,
    Stopped,
)
from distill.core.printing import say, say_error
from distill.core.text import printable, short
from distill.launch import tasks
from distill.runs.progress import stamp

EXIT_PIPE = 141  # the reader of stdout has exited, as `head` does; shells use the same code for SIGPIPE
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]  # of Typer; click in old versions

# What the user can do about a system error. Errors that are not listed are not caused by the user's input.
REMEDIES = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "check its spelling, and that it still exists",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "give a file, not a folder",
    errno.EEXIST: "give another name",
    errno.EINVAL: "use another path or name",
    errno.ELOOP: "its links form a loop",
    errno.EACCES: "give a path that you may use, or ask its owner",
    errno.EPERM: "give a path that you may use, or ask its owner",
    errno.EROFS: "give a path that is writable",
}

app = typer.Typer(
    help="Distil diffusion and flow teachers into students that sample in one, two or four network calls.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MAKE, LOOK, STUDENTS, TOOLS = "Run", "Inspect", "Students", "Tools"
app.command(rich_help_panel=MAKE)(work.quickstart)
app.command(rich_help_panel=MAKE)(emoji.emoji)
app.command(rich_help_panel=MAKE)(work.run)
app.command(rich_help_panel=MAKE)(reflow.reflow)
app.command(rich_help_panel=MAKE)(compare.compare)
app.command(rich_help_panel=MAKE)(work.plan)
app.command(rich_help_panel=MAKE)(jobs.submit)
app.command(rich_help_panel=MAKE)(jobs.cancel)
app.command(rich_help_panel=MAKE)(catalogue.init)
app.command(rich_help_panel=MAKE)(catalogue.recipes)
app.command("list", rich_help_panel=LOOK)(runs.list_runs)
app.command(rich_help_panel=LOOK)(follow.status)
app.command(rich_help_panel=LOOK)(follow.logs)
app.command(rich_help_panel=LOOK)(runs.show)
app.command(rich_help_panel=LOOK)(tools.report)
app.command(rich_help_panel=LOOK)(track.track)
app.command(rich_help_panel=LOOK)(inspect.inspect)
app.command(rich_help_panel=LOOK)(inspect.teachers)
app.command(rich_help_panel=LOOK)(doctor.doctor)
app.command(rich_help_panel=LOOK)(runs.clean)
app.command(rich_help_panel=LOOK)(settings.config)
app.command(rich_help_panel=STUDENTS)(students.publish)
app.command(rich_help_panel=STUDENTS)(students.students)
app.command(rich_help_panel=STUDENTS)(students.pull)
app.command(rich_help_panel=STUDENTS)(students.verify)
app.command(rich_help_panel=STUDENTS)(lora.merge)
app.command(rich_help_panel=STUDENTS)(lora.unmerge)
app.command(rich_help_panel=STUDENTS)(lora.extract)
app.command("lora-check", rich_help_panel=STUDENTS)(lora.lora_check)
app.command(rich_help_panel=TOOLS)(tools.sample)
app.command("eval", rich_help_panel=TOOLS)(tools.evaluate)
app.command(rich_help_panel=TOOLS)(pairs.pairs)
app.command(rich_help_panel=TOOLS)(cache.cache)
app.command(rich_help_panel=TOOLS)(export.export)
app.command(rich_help_panel=TOOLS)(convert.convert)
app.command(rich_help_panel=TOOLS)(schedule.schedule)
app.command(rich_help_panel=TOOLS)(encode.encode)
app.command(hidden=True)(stage.stage)
app.command(hidden=True)(stage.job)
app.command(hidden=True)(doctor.probe)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"distill {distill.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None, tell: Callable[[object], None] | None = None) -> int:
    """Run a command and return its exit code. Expected errors are printed as one message; others keep their traceback.

    tell: prints a message; given for a rank or a process of a job. System errors then keep their traceback. System
    errors in a user's own recipe always keep it, since its author needs to see the line.
    """
    # PEFT and diffusers import bitsandbytes if it is installed, and it warns of optional packages of its own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    printing.prepare()
    code = 0
    try:
        code = _outcome(arguments, tell or _tell)
        sys.stdout.flush()
    except OSError as error:
        if _is_of_recipe(error):
            raise
        if isinstance(error, BrokenPipeError):
            printing.abandon()
            return code or EXIT_PIPE
        if tell is not None:
            raise
        message, code = described(error)
        with suppress(OSError):
            say_error(f"error: {message}")
        try:
            sys.stdout.flush()
        except OSError:  # stdout cannot be written
            printing.abandon()
    return code


def _outcome(arguments: Sequence[str] | None, tell: Callable[[object], None]) -> int:
    try:
        code = app(arguments, prog_name="distill", standalone_mode=False)
    except UsageError as error:
        return _refuse_usage(error)
    except SystemExit as leaving:
        return _left(leaving, tell)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except InputError as error:
        tell(f"error: {error}")
        return EXIT_INPUT
    except RunError as error:
        tell(f"error: {error}")
        return EXIT_FAILED
    except Stopped as stopped:
        tell("; ".join(filter(None, [str(stopped), stopped.resume])))
        return EXIT_STOPPED
    except PeerLost as lost:
        tell(lost)
        return EXIT_PEER
    return code if isinstance(code, int) else 0


def _refuse_usage(error: Exception) -> int:
    """Print Typer's message about wrong options, with unsafe characters replaced."""
    from typer import rich_utils

    found = vars(error)
    found["message"] = printable(str(found.get("message", "")))
    rich_utils.rich_format_error(error)  # type: ignore[arg-type]
    return EXIT_INPUT


def _left(leaving: SystemExit, tell: Callable[[object], None]) -> int:
    """The exit code after SystemExit. Typer may raise it; if a recipe raised it, that is an error."""
    if isinstance(leaving.__context__, BrokenPipeError):
        raise leaving.__context__
    last = traceback.extract_tb(leaving.__traceback__)[-1]
    if "typer" in Path(last.filename).parts:
        return leaving.code if isinstance(leaving.code, int) else 0
    tell(
        f"error: {last.filename}, line {last.lineno}, exits the program: {last.line}. A recipe must not do this; "
        "remove the line, or raise an exception that describes the problem"
    )
    return EXIT_INPUT


def _is_of_recipe(error: OSError) -> bool:
    if "distill.spec.registry" not in sys.modules:  # no recipe was loaded
        return False
    from distill.spec import registry

    return registry.is_of_foreign_recipe(error)


def described(error: OSError) -> tuple[str, int]:
    """(message, exit code) for a system error. The exit code is 2 if another path or name would help."""
    places = [short(str(each)) for each in (error.filename, error.filename2) if each is not None]
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOENT and not places and not _has_folder():
        return "the current folder no longer exists; cd to another one", EXIT_INPUT
    remedy = REMEDIES.get(error.errno or 0)
    message = ": ".join([*places, reason]) + (f"; {remedy}" if remedy else "; what was saved is intact")
    return message, EXIT_FAILED if remedy is None else EXIT_INPUT


def _has_folder() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True


def run() -> NoReturn:
    """Run `main` and exit; the entry point of the program.

    A rank exits with os._exit, without a normal interpreter shutdown: remaining threads of gloo and NCCL can abort it
    (one time in ten with torch 2.14) after all the work is done. A process of a cluster job records how it ended.
    """
    in_job = tasks.is_task()
    if in_job:
        tasks.adopt()
    is_rank = in_job or "WORLD_SIZE" in os.environ
    said = [""]

    def tell(message: object) -> None:
        _tell(message)
        said.append(str(message))

    def leave(code: int, message: str) -> NoReturn:
        if in_job:
            tasks.leave_word(code, message)
        if not is_rank:
            sys.exit(code)
        _leave(code)

    try:  # sys.excepthook is not used, since both Typer and torch replace it
        code = main(tell=tell if is_rank else None)
    finally:
        error = sys.exception()
        if error is not None:
            if is_rank:
                say_error(f"{stamp()}  rank {os.environ.get('RANK', 0)} failed:")
            say_error("".join(traceback.format_exception(error)), end="")
            leave(EXIT_FAILED, f"{type(error).__name__}: {error}")
    leave(code, said[-1])


def _leave(code: int) -> NoReturn:
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _tell(message: object) -> None:
    with suppress(OSError):  # `main` handles this error at its last flush
        sys.stdout.flush()
    say_error(message)
