"""The command `distill`: its commands, and what an error looks like to a user."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer

import distill
from distill.cli import (
    catalogue,
    compare,
    doctor,
    follow,
    jobs,
    pairs,
    reflow,
    runs,
    schedule,
    settings,
    stage,
    students,
    tools,
    work,
)
from distill.guard import EXIT_FAILED, EXIT_INPUT, EXIT_PEER, EXIT_STOPPED, InputError, PeerLost, RunError, Stopped
from distill.launch import tasks
from distill.progress import stamp

EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="Distil diffusion and flow teachers into students of one, two or four network calls.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MAKE, LOOK, STUDENTS, TOOLS = "Run", "Look", "Students", "Tools"
app.command(rich_help_panel=MAKE)(work.quickstart)
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
app.command(rich_help_panel=LOOK)(doctor.doctor)
app.command(rich_help_panel=LOOK)(runs.clean)
app.command(rich_help_panel=LOOK)(settings.config)
app.command(rich_help_panel=STUDENTS)(students.publish)
app.command(rich_help_panel=STUDENTS)(students.students)
app.command(rich_help_panel=STUDENTS)(students.pull)
app.command(rich_help_panel=STUDENTS)(students.verify)
app.command(rich_help_panel=TOOLS)(tools.sample)
app.command("eval", rich_help_panel=TOOLS)(tools.evaluate)
app.command(rich_help_panel=TOOLS)(pairs.pairs)
app.command(rich_help_panel=TOOLS)(tools.export)
app.command(rich_help_panel=TOOLS)(schedule.schedule)
app.command(hidden=True)(stage.stage)
app.command(hidden=True)(stage.job)
app.command(hidden=True)(doctor.probe)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"distill {distill.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None, say: Callable[[object], None] | None = None) -> int:
    """Run a command: its exit code. What a user can cause is one message, anything else keeps its traceback."""
    say = say or _say
    try:
        app(arguments, prog_name="distill")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except InputError as error:
        say(f"error: {error}")
        return EXIT_INPUT
    except RunError as error:
        say(f"error: {error}")
        return EXIT_FAILED
    except Stopped as stopped:
        say(stopped)
        return EXIT_STOPPED
    except PeerLost as lost:
        say(lost)
        return EXIT_PEER
    return 0


def run() -> NoReturn:
    """`main`, and the end of its process.

    A rank ends at once, without taking the interpreter down: threads of gloo and NCCL that are still there abort it
    (one time in ten with torch 2.14) after all the work is done. One of a cluster's job leaves word of its end.
    """
    in_job = tasks.is_task()
    if in_job:
        tasks.adopt()
    if not in_job and "WORLD_SIZE" not in os.environ:
        sys.exit(main())
    said = [""]

    def say(message: object) -> None:
        _say(message)
        said.append(str(message))

    def leave(code: int, message: str) -> NoReturn:
        if in_job:
            tasks.leave_word(code, message)
        _leave(code)

    try:  # not by sys.excepthook, which both Typer and torch make theirs
        code = main(say=say)
    finally:
        error = sys.exception()
        if error is not None:
            print(f"{stamp()}  rank {os.environ.get('RANK', 0)} failed:", file=sys.stderr)
            traceback.print_exception(error)
            leave(EXIT_FAILED, f"{type(error).__name__}: {error}")
    leave(code, said[-1])


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(message: object) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
