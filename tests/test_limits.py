"""Values far beyond any real use are refused before any work, and system errors give one message."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import command, snapshot
from pydantic import BaseModel
from runs import ENV, distill, make_run

from distill.cli import arguments
from distill.core import yamltext
from distill.core.errors import InputError
from distill.core.owners import Owner
from distill.core.records import read_json
from distill.core.text import whole_number
from distill.networks import architectures
from distill.runs import run_store
from distill.spec import registry, schema
from distill.spec.model import LaunchSpec, MlpSpec, Stage, UNetSpec

GAUSSIAN = "{kind: gaussian, mean: [0], std: [1]}"
SPEC = """
name: a
teacher: {{kind: gaussian, mean: [0, 1], std: [1, 1]}}
stages:
  p: {{kind: pairs, count: 256}}
  r: {{kind: train, recipe: {recipe}, pairs: p, images: 1280, network: {{kind: mlp}}}}
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path.parent / "no-config"))
    (tmp_path / "ok.yaml").write_text(SPEC.format(recipe="reflow/reflow"))


def refuse(capfd, tmp_path, arguments, said):
    """Refused with this message, and nothing written."""
    before = snapshot(tmp_path)
    done = command(capfd, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: {said}\n"
    assert snapshot(tmp_path) == before


# --- numbers ---

NUMBERS = {
    "stages.r.network.depth=10000000": "must be at most 1,000",
    "stages.r.network.width=1000000000": "must be at most 65,536",
    "stages.r.batch_size=1000000000": "must be at most 100,000,000",
    "stages.r.images=100000000000000": "must be at most 10,000,000,000,000",
    "stages.r.optimizer.lr=1e300": "must be at most 1000",
    "stages.p.count=1000000000000000000": "must be at most 104,857,600,000",
    "stages.p.steps=1000000000": "must be at most 10,000",
    "stages.p.shard=2097152": "must be at most 1,048,576",
    "stages.p.block=2097152": "must be at most 1,048,576",
    "stages.p.guidance_scale=1e300": "must be at most 10000",
    "launch.procs=1000000000": "must be at most 4,096",
    "launch.collective_minutes=1e12": "must be at most 1e+06",
}


@pytest.mark.parametrize("change", NUMBERS)
def test_a_number_out_of_all_proportion(capfd, tmp_path, change):
    done = command(capfd, "plan", "ok.yaml", change)
    field = change.partition("=")[0]
    assert done.code == 2
    assert done.err.startswith(f"error: ok.yaml: {field}: ") and done.err.endswith(f" given; {NUMBERS[change]}\n")


def _counts(described):
    """(name, its part of the JSON schema) of each field that is a whole number, in lists and mappings too."""
    for model in [described, *described.get("$defs", {}).values()]:
        for name, field in model.get("properties", {}).items():
            todo = [field]
            while todo:
                part = todo.pop()
                if part.get("type") == "integer":
                    yield f"{model.get('title')}.{name}", part
                todo += part.get("anyOf", [])
                todo += [inner for key in ("items", "additionalProperties") if isinstance(inner := part.get(key), dict)]


def test_every_count_has_a_bound():
    models = [*schema.models(Stage), LaunchSpec]
    models += [registry.load(name, Path()).Config for name in registry.names() if "/" in name]
    found = [each for model in models if issubclass(model, BaseModel) for each in _counts(model.model_json_schema())]
    assert len(found) > 40
    assert [name for name, field in found if not {"maximum", "exclusiveMaximum"} & field.keys()] == []


def test_a_network_beyond_any_machine(capfd, tmp_path):
    change = "stages.r.network={kind: mlp, depth: 1000, width: 65536}"
    said = (
        "spec 'a': stages.r.network: about 4,294,967,296,000 parameters, more than the maximum of "
        "100,000,000,000; make it smaller"
    )
    refuse(capfd, tmp_path, ["plan", "ok.yaml", change], said)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (MlpSpec(kind="mlp", width=65536, depth=23), (2,)),
        (UNetSpec(kind="unet", channels=[16384], layers_per_block=8), (3, 8, 8)),
    ],
)
def test_a_network_beyond_this_machine_is_not_allocated(network, shape):
    with pytest.raises(InputError, match=r"^network: its weights take about .* GB, and this machine has .*; make it"):
        architectures.build(network, shape, None, 0)


OPTIONS = {
    "sample --steps": ["sample", "x", "--steps", "1000000000", "--out", "a.png"],
    "sample --count": ["sample", "x", "--count", "1000000000000", "--out", "a.png"],
    "schedule --fine": ["schedule", GAUSSIAN, "--steps", "2", "--fine", "1000000000"],
    "reflow --rounds": ["reflow", "digits", "--rounds", "1000000000"],
    "run --procs": ["run", "digits", "--procs", "1000000000"],
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_out_of_all_proportion(capfd, tmp_path, case):
    done = command(capfd, *OPTIONS[case])
    assert done.code == 2
    assert f"Invalid value for '{case.split()[1]}'" in done.err


@pytest.mark.parametrize("text", ["0", "1,0", "100001", "\u00b2", "1" * 5000, "", "1,,2"])
def test_numbers_of_steps_name_their_option(text):
    with pytest.raises(InputError) as caught:
        arguments.steps("--steps", text)
    assert str(caught.value).startswith("--steps ") and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("007", 7),
        ("\u00b2", None),
        ("\u0663", None),
        ("1" * 19, None),
        ("-1", None),
        ("", None),
        ("1_0", None),
    ],
)
def test_a_whole_number_is_ascii_digits(text, number):
    assert whole_number(text) == number


# --- YAML ---


def bomb(levels: int) -> str:
    """Ten values, and lists of ten aliases of the list before."""
    lines = [f"a0: &a0 [{', '.join('x' * 10)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


YAML = {
    "aliases of aliases": (bomb(30), "line 1: contains more than 200,000 values, counting those that aliases repeat"),
    "aliases in each other": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 600)),
        "line 1: contains more than 64 nested lists or mappings, counting those that aliases repeat",
    ),
    "merged aliases": (
        "a0: &a0 {k: 1}\n" + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 30)),
        "line 1: contains more than 200,000 values, counting those that aliases repeat",
    ),
    "itself": ("a: &a [*a]", "line 1: a value contains itself"),
    "many values": ("- 1\n" * 200_001, "line 200000: contains more than 200,000 values"),
    "deep": ("[" * 65, "line 1: contains more than 64 nested lists or mappings"),
    "very deep": ("[" * 100_000, "not YAML: line 1, column 1001: exceeded maximum nesting depth"),
    "a large number": ("seed: 1e999", "line 1: 1e999 is beyond the largest floating-point number"),
    "many digits": ("seed: " + "1" * 5000, "line 1: a number of 5000 digits; valid: at most 300"),
    "no int": ("a: !!int abc", "line 1: 'abc' is not a whole number"),
    "no bool": ("a: !!bool maybe", "line 1: 'maybe' is not a bool (true or false)"),
    "a list as an int": ("a: !!int [1]", "line 1: a list or mapping is not a whole number"),
    "a scalar as a mapping": ("!!map 3", "expected a mapping node, but found scalar"),
    "a date": (
        "a: !!timestamp soon",
        "line 1: the tag !!timestamp is not supported; valid: !!str, !!int, !!float, !!bool, !!null, !!seq, !!map",
    ),
    "code": (
        "a: !!python/object/apply:os.system [id]",
        "line 1: the tag !!python/object/apply:os.system is not supported; "
        "valid: !!str, !!int, !!float, !!bool, !!null, !!seq, !!map",
    ),
    "a control character": (
        'name: "a\\0b"',
        "name: 'a\\x00b' contains a control character, or bytes that are not UTF-8",
    ),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml_that_cannot_be_meant(capfd, tmp_path, case):
    text, said = YAML[case]
    (tmp_path / "s.yaml").write_text(text)
    began = time.process_time()
    refuse(capfd, tmp_path, ["plan", "s.yaml"], f"s.yaml: {said}")
    assert time.process_time() - began < 5


def test_what_yaml_may_say_is_taken():
    text = "{a: &x {b: 1}, c: {<<: *x, d: !!float 2}, e: [!!str 5, !!bool true, !!null null, *x]}"
    assert yamltext.parse(text, "s") == {
        "a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": ["5", True, None, {"b": 1}],
    }  # fmt: skip
    assert yamltext.parse(bomb(4), "s")["a3"][9][9][9] == list("x" * 10)


def test_a_file_without_end_is_not_read(capfd, tmp_path):
    refuse(capfd, tmp_path, ["plan", "/dev/zero"], "/dev/zero: contains more than 16 MiB; a spec is a short YAML file")


def test_a_path_of_very_many_parts_is_refused(capfd, tmp_path):
    change = f"stages.r.options{'.x' * 1500}=1"
    said = f"'{change[:90]}... ({len(change):,} characters)' is not a change of the spec: its path has 1,503 parts; "
    refuse(capfd, tmp_path, ["plan", "ok.yaml", change], said + "valid: at most 64")


def test_very_many_mistakes_are_counted(capfd, tmp_path):
    stages = ", ".join(f"s{i}: {{kind: x}}" for i in range(1000))
    (tmp_path / "s.yaml").write_text(f"name: a\nstages: {{{stages}}}\n")
    done = command(capfd, "plan", "s.yaml")
    lines = done.err.splitlines()
    assert (done.code, lines[0], lines[-1]) == (2, "error: s.yaml: 1,000 mistakes", "  and 980 more")
    assert len(lines) == 22


CHANGES = {
    "bytes": (
        "seed=\udcff",
        "'seed=\\udcff' is not a change of the spec: it contains a control character, or bytes that",
    ),
    "bytes as a key": ("stages.\udcff=1", "'stages.\\udcff=1' is not a change of the spec: it contains a control"),
    "an escape sequence": (
        "seed=\x1b[2J",
        "'seed=\\x1b[2J' is not a change of the spec: it contains a control character",
    ),
    "a tag": ("seed=!!int abc", "seed=!!int abc: line 1: 'abc' is not a whole number"),
    "a superscript": (
        "teacher.mean.\u00b2=1",
        "teacher.mean.\u00b2=1: teacher.mean has 2 items; '\u00b2' must be one of",
    ),
    "digits": ("teacher.mean." + "9" * 5000 + "=1", "teacher.mean.999"),
    "digits of a value": ("seed=" + "1" * 5000, "seed=111"),
    "a number": ("seed=" + "1" * 200, "ok.yaml: seed: 111"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_that_cannot_be_meant(capfd, tmp_path, case):
    change, said = CHANGES[case]
    done = command(capfd, "plan", "ok.yaml", change)
    assert done.code == 2
    assert done.err.startswith(f"error: {said}") and len(done.err) < 400 and done.err.count("\n") == 1


@pytest.mark.parametrize("name", ["\udcff", "\x1b[31m"])
def test_a_name_that_is_no_text(capfd, tmp_path, name):
    said = f"ok.yaml: name: {ascii(name)} contains a control character, or bytes that are not UTF-8"
    refuse(capfd, tmp_path, ["run", "ok.yaml", "--name", name], said)


@pytest.mark.parametrize("name", [b"\xff", b"\x1b[31m"])
def test_a_store_whose_name_is_no_text(capfd, tmp_path, monkeypatch, name):
    folder = os.fsdecode(name)
    (tmp_path / folder).mkdir()
    shown = ascii(str(tmp_path / folder))
    said = "contains a control character, or bytes that are not UTF-8"
    done = command(capfd, "run", "ok.yaml", "--store", folder)
    assert done.err == f"error: the store {shown} (from --store) {said}; choose another with --store\n"
    monkeypatch.chdir(tmp_path / folder)
    (tmp_path / folder / "pictures").mkdir()
    (tmp_path / folder / "s.yaml").write_text((tmp_path / "ok.yaml").read_text())
    done = command(
        capfd, "plan", "s.yaml", "--store", str(tmp_path / "runs"), "teacher={kind: diffusers, path: pictures}"
    )
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.endswith(f"{ascii(str(tmp_path / folder / 'pictures'))} {said}; rename that folder\n")
    assert not (tmp_path / "runs").exists()


# --- what the system refuses ---

LONG = "x" * 300
SHOWN = f"{'x' * 90}... (300 characters)"
NAMES = {
    "run": ["run", LONG], "plan": ["plan", LONG], "list": ["list", "--store", LONG], "show": ["show", LONG],
    "status": ["status", LONG], "logs": ["logs", LONG], "cancel": ["cancel", LONG], "report": ["report", LONG],
    "clean": ["clean", LONG], "export": ["export", LONG], "sample": ["sample", LONG, "--out", "a.png"],
    "eval": ["eval", LONG, "--out", "e"], "pairs": ["pairs", LONG, "--out", "p"], "pull": ["pull", LONG],
    "publish": ["publish", LONG, "n"], "init": ["init", "digits", "--out", LONG],
    "site": ["submit", "ok.yaml", "--dry-run", "--site", LONG], "schedule": ["schedule", LONG, "--steps", "2"],
}  # fmt: skip


OF_RUNS = ("show", "status", "logs", "cancel", "report", "clean")


@pytest.mark.parametrize("case", NAMES)
def test_a_name_of_300_letters(capfd, tmp_path, case):
    before = snapshot(tmp_path)
    done = command(capfd, *NAMES[case])
    assert (done.code, done.out) == (2, "")
    if case in OF_RUNS:
        assert done.err.startswith(f"error: there is no run '{SHOWN}' in runs; ")
    else:
        assert done.err.startswith("error: ") and done.err.endswith("File name too long; give a shorter name\n")
    assert len(done.err) < 250
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [["list", "--store", "~nosuchuser/runs"], ["config", "store", "~nosuchuser/runs"]]
    + [["submit", "ok.yaml", "--dry-run", "--site", "~nosuchuser/runs"]]
    + [["pairs", "{kind: diffusers, path: ~nosuchuser/runs}", "--out", "p"]],
    ids=["store", "config", "site", "teacher"],
)
def test_a_home_that_nobody_has(capfd, tmp_path, arguments):
    said = "~nosuchuser/runs: the home folder of ~nosuchuser is not known here; write the path in full"
    refuse(capfd, tmp_path, arguments, said)


@pytest.mark.process
def test_a_folder_that_is_gone(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    shell = f"cd {folder} && rmdir {folder} && exec {sys.executable} -m distill list"
    env = ENV | {"PYTHONPATH": str(Path(run_store.__file__).parents[2])}
    done = subprocess.run(["bash", "-c", shell], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the current folder no longer exists; cd to another one\n"


@pytest.mark.process
def test_without_a_home(tmp_path):
    """As in a container whose user has no entry."""
    code = "import pwd, os; os.environ.pop('HOME'); pwd.getpwuid = lambda uid: {}[uid]; "
    code += "from distill.cli.main import main; print(main(['list']))"
    env = {name: value for name, value in ENV.items() if name != "XDG_CONFIG_HOME"}
    env["PYTHONPATH"] = str(Path(run_store.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "no runs in runs; start one with: distill run digits\n0\n", done.stderr


# --- what is given half ---


@pytest.mark.process
def test_init_on_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of a file, in place of a disk that is full in the middle of it."""
    shell = f"ulimit -f 1; exec {sys.executable} -m distill init digits"
    env = ENV | {"PYTHONPATH": str(Path(run_store.__file__).parents[2])}
    script = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import os; "
    script += f"os.execvp('bash', ['bash', '-c', {shell!r}])"
    before = snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: cannot write digits.yaml: File too large; nothing was changed\n"
    assert snapshot(tmp_path) == before


def test_init_does_not_write_over_a_link(capfd, tmp_path):
    (tmp_path / "digits.yaml").symlink_to("nowhere")
    done = command(capfd, "init", "digits")
    assert (done.code, done.err) == (2, "error: digits.yaml exists already; name another file with --out\n")
    assert (tmp_path / "digits.yaml").is_symlink()


@pytest.mark.parametrize("name", ["registry", "inputs", "schedules"])
@pytest.mark.parametrize(
    "arguments",
    [["plan", "ok.yaml"], ["run", "ok.yaml"], ["submit", "ok.yaml", "--dry-run"], ["reflow", "ok.yaml", "--dry-run"]],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_the_store_uses_itself(capfd, tmp_path, arguments, name):
    said = (
        f"a run cannot be called '{name}': the store uses that folder for {run_store.RESERVED[name]}; choose another "
        "name (name: in the spec, or --name OTHER)"
    )
    refuse(capfd, tmp_path, [*arguments, f"name={name}"], said)


RECIPE = '''"""A recipe (X 2020, arXiv 2001.00001)."""
from recipes.reflow.reflow import Config as Ours, Recipe
import sys

{what}
'''


def test_a_recipe_that_ends_the_program(capfd, tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE.format(what="sys.exit(0)\nConfig = Ours"))
    (tmp_path / "s.yaml").write_text(SPEC.format(recipe="./mine.py"))
    ends = "recipe './mine.py' exits the program when it is imported: it calls sys.exit(0); remove this call"
    before = {path.name for path in tmp_path.iterdir()}
    done = command(capfd, "plan", "s.yaml")
    assert (done.code, done.err) == (2, f"error: spec 'a': stages.r.recipe: {ends}\n")
    late = "class Config(Ours):\n    @property\n    def needs(self):\n        sys.exit(0)"
    (tmp_path / "mine.py").write_text(RECIPE.format(what=late))
    done = command(capfd, "plan", "s.yaml")
    assert done.code == 2
    assert done.err == (
        f"error: {tmp_path}/mine.py, line 8, exits the program: sys.exit(0). A recipe must not do this; remove the "
        "line, or raise an exception that describes the problem\n"
    )
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == before


@pytest.mark.parametrize("mistake", ["open('missing.json')", "raise BrokenPipeError"])
def test_an_error_of_the_system_in_a_recipe_of_ones_own_keeps_its_traceback(capfd, tmp_path, mistake):
    late = f"class Config(Ours):\n    @property\n    def needs(self):\n        {mistake}"
    (tmp_path / "mine.py").write_text(RECIPE.format(what=late))
    (tmp_path / "s.yaml").write_text(SPEC.format(recipe="./mine.py"))
    with pytest.raises(OSError) as error:
        command(capfd, "plan", "s.yaml")
    last = error.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (f"{tmp_path}/mine.py", 8)


def test_a_run_does_without_the_stores_index_of_its_images(capfd, tmp_path):
    from PIL import Image

    from distill.cli import start
    from distill.core.stop import StopRequest
    from distill.execution import stages

    (tmp_path / "set").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "set" / f"{i}.png")
    spec = "name: a\ndata: {kind: images, path: set, size: 8}\nstages:\n"
    spec += "  r: {kind: train, recipe: pretrain/flow_matching, images: 1280, network: {kind: unet, channels: [8]}}\n"
    (tmp_path / "s.yaml").write_text(spec)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "indexes").write_text("")
    source = start.find("s.yaml", ["stages.r.images=8", "stages.r.batch_size=8"], None)
    run = start.begin(tmp_path / "runs", source)
    said = (
        f"warning: cannot create {tmp_path}/runs/indexes: File exists; nothing was changed; without an index of the "
        "data in the "
    )
    assert capfd.readouterr().err == said + "store, each new run reads all files again\n"
    stages.run(run, source.spec, ["r"], StopRequest())
    assert run.stage("r").done.exists()
    assert (tmp_path / "runs" / "indexes").read_text() == ""
    assert len(list((run.root / "indexes").iterdir())) == 1


def test_what_a_kill_left_of_a_run_is_cleared_at_the_next_start(tmp_path):
    here, me = tmp_path / "runs", Owner.this()
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = [replace(me, pid=gone.pid), replace(me, start="1"), replace(me, boot="another")]  # our number, of another
    old = [".b.new-7,1,boot,elsewhere", ".c.new-1-1700000000000000000-elsewhere"]  # the second of an older version
    left = [*(f".one.tmp-0123abcd-{each.label}" for each in dead), f".two.new-{dead[0].label}", *old]
    kept = [f".d.tmp-0123abcd-{me.label}", f".e.new-{me.label}", ".e.new-7,1,boot,elsewhere", ".f.new-x", ".trash"]
    for name in [*left, *kept]:
        (here / name / "code").mkdir(parents=True)
    for name in [*old, ".f.new-x"]:
        for folder in (here / name / "code", here / name):
            os.utime(folder, (0, 0))
    make_run(here)
    assert {path.name for path in here.iterdir()} == {"one", *kept}


@pytest.mark.process
def test_a_kill_while_a_run_is_made(tmp_path):
    code = "from pathlib import Path; from distill.runs import run_store; import time\n"
    code += "run_store.write_files = lambda folder, files: time.sleep(100)\n"
    code += "run_store.create_run(Path('runs'), 'one', {'a': 'b'})"
    env = ENV | {"PYTHONPATH": str(Path(run_store.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env)
    while not list(tmp_path.glob("runs/.one.tmp-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    make_run(tmp_path / "runs")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]


def test_commands_of_jobs_say_who_starts_them(capfd, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    said = "runs only inside a Slurm job; use `distill submit`"
    refuse(capfd, tmp_path, ["probe", "x"], f"`distill probe` {said}")
    refuse(capfd, tmp_path, ["job", "x", "--stage", "a", "--", "srun"], f"`distill job` {said}")


@pytest.mark.process
def test_a_process_among_several_keeps_its_traceback_and_leaves_word(tmp_path):
    """`distill logs` finds the first failure by it, and the job's own process reads how each ended."""
    (tmp_path / "ends").mkdir()
    job = {"DISTILL_ENDS": str(tmp_path / "ends"), "SLURM_PROCID": "0", "SLURM_JOB_ID": "3"}
    make_run(tmp_path / "runs")
    done = distill("stage", "runs/one", "teach", "--lifeline", "99", cwd=tmp_path, env=job)  # no such pipe
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].endswith("  rank 0 failed:")
    assert done.stderr.splitlines()[1].startswith("Traceback")
    found = read_json(tmp_path / "ends" / "rank-0")
    assert found["code"] == 1 and found["message"] == "OSError: [Errno 9] Bad file descriptor"
    done = distill("stage", "nope", "x", cwd=tmp_path, env=job)
    assert (done.returncode, done.stdout) == (2, "")
    assert read_json(tmp_path / "ends" / "rank-0")["message"] == done.stderr.strip()
