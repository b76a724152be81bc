"""Runs commands in processes forked from one that has imported only the command line: `python planes.py FOLDER`.

Standard input is a JSON list of [[folder, arguments], ...]. FOLDER/N.out and FOLDER/N.err get the output of command N.
A JSON list with [exit code, imported modules] of each command is printed. A fork takes milliseconds, a new interpreter
half a second.
"""

import json
import os
import sys
from pathlib import Path

from distill.cli.main import main


def run(folder, arguments, out):
    """The exit code of one command and the names of the modules that its process has then."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.chdir(folder)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT), number)
        code = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(writing, "w") as pipe:
            json.dump([code, sorted(sys.modules)], pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    json.dump([run(*command, place / str(i)) for i, command in enumerate(json.load(sys.stdin))], sys.stdout)
