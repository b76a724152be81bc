"""Commands that show or prepare something: their output, the files that they write, and what they refuse."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from commands import command, snapshot
from runs import make_run

import distill as package
from distill.cli import arguments, common, start, work
from distill.cli.main import app
from distill.core.atomic import write_json
from distill.core.errors import InputError
from distill.execution import prefetch
from distill.execution.prefetch import Input
from distill.launch import environment
from distill.reports import run_status
from distill.runs import claims, todo
from distill.runs.run_store import append_event, event_files
from distill.spec import presets, specfile

COMMANDS = ["quickstart", "run", "reflow", "plan", "init", "recipes", "list", "show", "report", "doctor", "clean"]
COMMANDS += ["sample", "eval", "pairs", "export", "publish", "students", "pull", "verify", "config", "convert"]
COMMANDS += ["inspect", "teachers", "encode"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every command starts in an empty folder, without settings of the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path.parent / "no-config"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


# --- the frame ---


def test_help_names_every_command_but_the_hidden_one(capfd):
    done = command(capfd, "--help")
    assert done.code == 0
    for name in COMMANDS:
        assert f" {name} " in done.out, name
        assert command(capfd, name, "--help").code == 0
    assert " stage " not in done.out


def test_help_is_shown_as_it_was_written(capfd, monkeypatch):
    """No [default] of an option is taken for markup, and no line of a docstring ends where it does in the source."""
    monkeypatch.setenv("COLUMNS", "1000")  # so that nothing is wrapped
    defaults = 0
    for name, each in typer.main.get_command(app).commands.items():
        out = command(capfd, name, "--help").out
        options = [found.help for found in each.params if found.help]
        for paragraph in [*inspect.cleandoc(each.help).split("\n\n"), *options]:
            assert " ".join(paragraph.split()).replace("`", "") in out, name
        defaults += len(re.findall(r"\[\w+\]", " ".join(options)))
    assert defaults >= 10


def test_version(capfd):
    assert command(capfd, "--version").out == f"distill {package.__version__}\n"


def test_usage_errors_end_with_2(capfd):
    assert command(capfd, "lisst").code == 2
    done = command(capfd, "run")
    assert done.code == 2
    assert "Missing argument 'SPEC'" in done.err
    assert command(capfd, "sample", "x", "--steps", "0", "--out", "x.png").code == 2


def test_the_part_of_a_job_is_counted_from_0(capfd):
    for part in ("4/4", "-1/4", "1", "x/y"):
        said = f"error: --part {part}: must be I/N with I from 0 to N - 1, like 0/4\n"
        done = command(capfd, "stage", "run", "pairs", f"--part={part}")
        assert (done.code, done.err) == (2, said)


def test_unexpected_errors_keep_their_traceback(capfd, monkeypatch):
    def broken(option):
        raise ZeroDivisionError

    monkeypatch.setattr("distill.cli.runs.store_path", broken)
    with pytest.raises(ZeroDivisionError):
        command(capfd, "list")


# --- the store ---


def test_the_store_is_an_option_then_the_environment_then_the_settings_then_here(tmp_path, monkeypatch):
    assert str(common.store_path(None)) == "runs"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "config.yaml").write_text("store: /a/b\n")
    assert str(common.store_path(None)) == "/a/b"
    monkeypatch.setenv("DISTILL_STORE", "/c")
    assert str(common.store_path(None)) == "/c"
    assert common.store_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stoer: /a\n", "unknown setting 'stoer'; did you mean 'store'? valid: site, store"),
        ("store: a\n", "store: 'a' given; must be an absolute path or a URL"),
        ("store: 5\n", "store: 5 given; must be an absolute path or a URL"),
        (f"store: {'a' * 200}\n", f"store: '{'a' * 89}... (202 characters) given; must be an absolute path or a URL"),
        (f"site: {[1] * 99}\n", f"site: {str([1] * 99)[:90]}... (297 characters) given; must be an absolute path"),
        (f"{'a' * 200}: 1\n", f"unknown setting '{'a' * 90}... (200 characters)'; valid: site, store"),
        ("[1]\n", "must be a mapping of settings; valid: site, store"),
    ],
)
def test_wrong_settings(tmp_path, monkeypatch, text, said):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "distill").mkdir()
    path = tmp_path / "distill" / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        common.store_path(None)
    assert str(caught.value) == f"{path}: {said}"


# --- init and recipes ---


def test_init_writes_a_spec_that_is_the_preset(capfd, tmp_path):
    for name in presets.names():
        done = command(capfd, "init", name)
        assert done.code == 0
        assert done.out == f"wrote {name}.yaml; edit it, then check it with: distill plan {name}.yaml\n"
        written = specfile.load(tmp_path / f"{name}.yaml")
        assert written.spec.digest() == specfile.load(presets.find(name)).spec.digest()
        said, text = presets.head(name), (tmp_path / f"{name}.yaml").read_text()
        assert text.startswith(f"# {said[0].replace(name, f'{name}.yaml', 1)}\n# {said[1]}\n")
        words = " ".join(line.strip().removeprefix("#").strip() for line in text.splitlines())
        assert all(note in words for note in presets.notes(name).values()), name
    done = command(capfd, "init", "digits")
    assert (done.code, done.err) == (2, "error: digits.yaml exists already; name another file with --out\n")
    assert command(capfd, "init", "digits", "--out", "other.yaml").code == 0


def test_init_lists_the_presets(capfd, tmp_path):
    done = command(capfd, "init")
    assert done.code == 0
    assert all(name in done.out for name in presets.names())
    assert snapshot(tmp_path) == {}


def test_recipes(capfd):
    done = command(capfd, "recipes", "--json")
    found = {each["name"]: each["needs"] for each in json.loads(done.out)}
    assert found == {
        "consistency/consistency": ["data", "teacher"],
        "consistency/scm": ["data", "pairs", "teacher", "jvp"],
        "consistency/tcm": ["data", "teacher", "weights"],
        "pretrain/flow_matching": ["data"],
        "reflow/boss": ["pairs", "states", "teacher"],
        "reflow/caf": ["pairs", "teacher"],
        "reflow/consistency_fm": ["data", "teacher"],
        "reflow/one_step": ["pairs", "teacher"],
        "reflow/perflow": ["data", "teacher"],
        "reflow/proreflow": ["data", "teacher"],
        "reflow/rectified_diffusion": ["data", "pairs", "teacher"],  # pairs in one form, data in the other
        "reflow/reflow": ["data", "pairs", "teacher"],
        "reflow/rf_plus_plus": ["pairs", "teacher"],
        "reflow/seqrf": ["pairs", "states", "teacher"],
        "reflow/simple_reflow": ["data", "pairs", "teacher"],
        "reflow/slimflow": ["pairs", "teacher", "weights"],
        "score/dmd2": ["data", "teacher"],
        "shortcut/alphaflow": ["data", "pairs", "teacher", "jvp"],
        "shortcut/cmt": ["pairs", "states", "teacher"],
        "shortcut/flow_map": ["data", "teacher", "jvp"],
        "shortcut/meanflow": ["data", "pairs", "teacher", "jvp"],
        "shortcut/pdd": ["data", "teacher"],
        "shortcut/pi_flow": ["data", "teacher"],
        "shortcut/progressive": ["data", "teacher"],
        "shortcut/shortcut": ["data", "teacher"],
        "shortcut/soflow": ["data", "pairs", "teacher"],
    }
    assert "arXiv 2209.03003, Alg. 1" in command(capfd, "recipes").out
    one = json.loads(command(capfd, "recipes", "reflow/reflow", "--json").out)
    assert one["sampler"] == "euler"
    assert {option["name"]: option["choices"] for option in one["options"]}["distance"] == ["l2", "pseudo_huber"]
    done = command(capfd, "recipes", "reflow")
    assert done.code == 2
    assert done.err.startswith("error: there is no recipe 'reflow'; did you mean 'reflow/reflow'? valid: ")


# --- list, show, clean ---


def test_list_and_show(capfd, tmp_path):
    assert command(capfd, "list").out == "no runs in runs; start one with: distill run digits\n"
    run = make_run(tmp_path / "runs")
    run.stage("teach").root.mkdir(parents=True)
    write_json(run.stage("teach").done, {})
    run.stage("pairs").root.mkdir()
    append_event(run, "started", pid=1)
    logs = {"loss": 0.25}
    append_event(run, "progress", label="pairs", unit="pairs", done=1250, total=5000, per_second=1, logs=logs)
    append_event(run, "stopped", message="stopped by SIGTERM")

    (listed,) = json.loads(command(capfd, "list", "--json").out)
    assert (listed["name"], listed["state"], len(listed["stages"])) == ("one", "stopped", 5)
    text = " ".join(command(capfd, "list").out.split())
    assert "one stopped 1/5 pairs 25% 0 s ago" in text

    shown = json.loads(command(capfd, "show", "one", "--json").out)
    assert shown["stages"][1] == {
        "name": "pairs", "kind": "pairs", "state": "begun", "done": 1250, "total": 5000, "unit": "pairs",
        "per_second": 1.0, "saved_step": None, "saved": None, "logs": logs,
    }  # fmt: skip
    text = " ".join(command(capfd, "show", "runs/one").out.split())
    assert text.startswith("one stopped: stopped by SIGTERM 0 s ago seed 0, data digits")
    teach = todo.load_spec(run).stages["teach"]
    assert f"teach: pretrain/flow_matching, {teach.images:,} images, batch {teach.batch_size}" in text
    assert "pairs pairs begun 25% 1,250/5,000 pairs loss 0.25" in text
    assert text.endswith("resume with: distill run runs/one --resume")
    assert command(capfd, "status", "one").out.endswith("\nresume with: distill run runs/one --resume\n")
    assert command(capfd, "show", "two").err == "error: there is no run 'two' in runs; valid: one\n"


def test_a_run_that_was_killed_far_from_its_start_is_not_new(tmp_path):
    run = make_run(tmp_path / "runs")
    assert run_status.read(run).state == "new"
    append_event(run, "started", pid=1)
    for done in range(0, 10**6, 1000):
        append_event(run, "progress", label="teach", unit="images", done=done, total=10**6, per_second=1, logs={})
    assert sum(path.stat().st_size for path in event_files(run)) > run_status.TAIL
    found = run_status.read(run)
    assert (found.state, found.message) == ("stopped", "its process was killed")


def test_a_line_break_among_the_arguments_leaves_the_spec_whole(tmp_path, monkeypatch):
    """The command stands in a comment of the run's spec; \\x1b and \\u2028 would harm a YAML file as well."""
    change = "stages.reflow.options={distance:\n l2}"
    monkeypatch.setattr(sys, "argv", ["distill", "run", "digits", change, "--name", "a\u2028\x1bb"])
    source = specfile.load(presets.find("digits"), [change], name="one")
    run = start.begin(tmp_path / "runs", source)
    assert todo.load_spec(run).digest() == source.spec.digest()
    first = run.spec.read_text().splitlines()[0]
    assert first == "# distill run digits 'stages.reflow.options={distance:  l2}' --name 'a  b'"


def test_clean_says_what_it_would_free_and_deletes_when_told(capfd, tmp_path):
    run = make_run(tmp_path / "runs")
    for stage in ("teach", "reflow"):
        run.stage(stage).checkpoints.mkdir(parents=True)
        (run.stage(stage).checkpoints / "file").write_bytes(b"x" * 1500)
    write_json(run.stage("teach").done, {})
    run.stage("pairs").pairs.mkdir(parents=True)
    run.student("teach").mkdir(parents=True)
    before = snapshot(tmp_path)

    done = command(capfd, "clean", "one", "--yes")
    assert (done.code, done.err) == (2, "error: say what to delete: --checkpoints, --pairs, or --all\n")
    kept = "    1.5 kB  runs/one/stages/teach/checkpoints\n"
    done = command(capfd, "clean", "one", "--checkpoints")
    assert done.out == f"{kept}1.5 kB would be freed; nothing was deleted: add --yes\n"
    done = command(capfd, "clean", "one")
    add = "nothing was deleted: add --checkpoints, --pairs or --all, and --yes\n"
    assert done.out == f"       0 B  runs/one/stages/pairs/pairs\n{kept}1.5 kB would be freed; {add}"
    assert snapshot(tmp_path) == before

    assert command(capfd, "clean", "one", "--checkpoints", "--pairs", "--yes").out.endswith(
        "deleted 2 folders, 1.5 kB\n"
    )
    assert not run.stage("teach").checkpoints.exists()
    assert not run.stage("pairs").pairs.exists()
    assert run.stage("reflow").checkpoints.exists(), "of a stage that is not done: it goes on from there"
    assert run.student("teach").exists()
    assert command(capfd, "clean", "one", "--checkpoints", "-y").out == "nothing to delete in runs/one\n"
    assert command(capfd, "clean", "one", "--all", "-y").code == 0
    assert list((tmp_path / "runs").iterdir()) == []


def test_pairs_that_a_stage_still_needs_are_to_do_again_once_deleted(capfd, tmp_path):
    run = make_run(tmp_path / "runs")
    for stage in ("teach", "pairs"):
        run.stage(stage).pairs.mkdir(parents=True)
        write_json(run.stage(stage).done, {})
    said = command(capfd, "clean", "one", "--pairs").out
    assert "stage 'pairs' would have to run again, because an unfinished stage needs its pairs\n" in said
    assert run.stage("pairs").done.exists()
    assert command(capfd, "clean", "one", "--pairs", "--yes").out.endswith(
        "stage 'pairs' has to run again, because an unfinished stage needs its pairs\ndeleted 2 folders, 0 B\n"
    )
    assert not run.stage("pairs").done.exists()
    for stage in ("pairs", "reflow", "one_step"):
        run.stage(stage).pairs.mkdir(parents=True)
        write_json(run.stage(stage).done, {})
    assert command(capfd, "clean", "one", "--pairs", "--yes").out.endswith("deleted 3 folders, 0 B\n")
    assert run.stage("pairs").done.exists(), "nobody needs them any more"


def test_clean_takes_what_killed_processes_left(capfd, tmp_path):
    run = make_run(tmp_path / "runs")
    for name in (".dead-host-1-2", ".running-host-3-4"):
        (run.root / name).mkdir()
    assert command(capfd, "clean", "one", "--pairs", "--yes").out.endswith("deleted 2 folders, 0 B\n")
    assert {path.name for path in run.root.iterdir()} == {"spec.yaml", "env.json", "events"}


def test_clean_takes_inputs_that_no_run_names(capfd, tmp_path):
    folders = [tmp_path / "runs" / "inputs" / name for name in ("a" * 64, "unused", "fresh")]
    for folder in folders:
        (folder / "content").mkdir(parents=True)
        (folder / "content" / "file").write_text("1234")
    for folder in folders[:2]:
        os.utime(folder, (0, 0))
    run = make_run(tmp_path / "runs")
    record = Input("teacher", "org/tiny", None, "c" * 40, "a" * 64, f"hub/models--org--tiny/snapshots/{'c' * 40}")
    prefetch.keep(run, [record])
    said = command(capfd, "clean", "--inputs").out
    assert said.endswith("4 B  runs/inputs/unused\n4 B would be freed; nothing was deleted: add --yes\n")
    assert folders[1].exists()
    assert command(capfd, "clean", "--inputs", "--yes").out.endswith("deleted 1 folder, 4 B\n")
    assert [folder.exists() for folder in folders] == [True, False, True]
    for words, message in (
        (["one", "--inputs"], "--inputs applies to the whole store; leave RUN and the other options out"),
        ([], "name a run, or give --inputs or --caches; `distill list` lists the runs"),
    ):
        done = command(capfd, "clean", *words)
        assert (done.code, done.err) == (2, f"error: {message}\n")


def test_doctor(capfd, tmp_path):
    done = command(capfd, "doctor", "--json")
    found = {each["what"]: each for each in json.loads(done.out)}
    assert done.code == 0
    assert found["torch"]["state"] == "ok"
    assert found["store"]["found"] == f"{tmp_path}/runs (not created yet)"
    assert snapshot(tmp_path) == {}, "it looks, and makes nothing"


def test_doctor_says_of_a_store_that_cannot_be_written_that_it_is_broken(capfd, tmp_path):
    (tmp_path / "file").touch()
    done = command(capfd, "doctor", "--json", "--store", "file/runs")
    found = {each["what"]: each for each in json.loads(done.out)}["store"]
    assert (done.code, found["state"]) == (1, "broken")
    assert found["found"] == f"{tmp_path}/file: Not a directory"


@pytest.mark.process
def test_doctor_finds_a_torchvision_of_another_torch(tmp_path):
    """As PyPI's torchvision beside torch's CPU wheel: its metadata are in order, and no run starts."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms is unknown')")
    env = os.environ | {"PYTHONPATH": str(Path(package.__file__).parent.parent)}
    arguments = [sys.executable, "-m", "distill", "doctor", "--json"]
    done = subprocess.run(arguments, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = {each["what"]: each for each in json.loads(done.stdout)}["torch, torchvision"]
    assert found["state"] == "broken", "it is there, so installing it would change nothing"
    assert found["found"].endswith(": operator torchvision::nms is unknown")
    assert found["fix"] == "install both from the same index, with one pip install"


# --- logs ---


def test_where_a_run_without_logs_prints(capfd, tmp_path):
    make_run(tmp_path / "runs", "one")
    done = command(capfd, "logs", "one")
    said = "on one machine, rank 0 prints to the terminal, and only the other ranks write logs"
    assert (done.code, done.err) == (2, f"error: run 'one' has no logs: {said}\n")


# --- quickstart ---


def test_quickstart_goes_on_with_what_was_stopped_and_repeats_nothing(tmp_path):
    store = tmp_path / "runs"

    def choice():
        paths, unfinished = work.choose_quickstart(store)
        return paths.name, unfinished is not None

    assert choice() == ("quickstart", False)
    run = make_run(store, "quickstart")
    assert choice() == ("quickstart", True)
    with claims.claim(run):
        assert choice() == ("quickstart-2", False)
    for stage in todo.load_spec(run).stages:
        run.stage(stage).root.mkdir(parents=True)
        write_json(run.stage(stage).done, {})
    assert choice() == ("quickstart-2", False)
    make_run(store, "quickstart-2", preset="mixture-2d")  # somebody's own run of that name
    assert choice() == ("quickstart-3", False)


def test_a_damaged_quickstart_is_named_and_passed_over(tmp_path, capfd):
    store = tmp_path / "runs"
    make_run(store, "quickstart").spec.write_text("name: [")
    os.mkfifo(make_run(store, "quickstart-2").root / "fifo")
    (store / "quickstart-2" / "spec.yaml").unlink()
    (store / "quickstart-2" / "fifo").rename(store / "quickstart-2" / "spec.yaml")
    paths, unfinished = work.choose_quickstart(store)
    assert (paths.name, unfinished) == ("quickstart-3", None)
    first, second = capfd.readouterr().err.splitlines()
    said = "is damaged and skipped: "
    assert first.startswith(
        f"warning: run 'quickstart' {said}{store}/quickstart/spec.yaml: not YAML: line 2, column 1: "
    )
    fifo = "cannot be read: it is a FIFO, not a file"
    assert second == f"warning: run 'quickstart-2' {said}{store}/quickstart-2/spec.yaml {fifo}"


def test_a_url_as_store_is_named_as_it_was_given(capfd):
    done = command(capfd, "list", "--store", "https://a.b/c")
    assert done.code == 2
    assert done.err.startswith("error: the store https://a.b/c (from --store) is a URL, which works only for `distill")


def test_a_teacher_in_yaml_is_found_where_that_of_a_spec_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "T").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    assert arguments.teacher("{path: ~/T}", tmp_path).path == str(tmp_path / "home" / "T")
    assert arguments.teacher("{kind: diffusers, path: here}", tmp_path).path == str(tmp_path / "here")
    assert arguments.data("{kind: images, path: ~/T, size: 8}").path == str(tmp_path / "home" / "T")


# --- the environment that a run records ---


def test_the_environment_is_recorded(tmp_path):
    found = environment.record()
    assert found["distill"] == package.__version__
    assert found["packages"]["pydantic"]
    assert found["threads"] >= 1
    assert environment.git_state(tmp_path) is None


# --- how a command starts ---

START = """
import sys
from distill.cli.main import main
main(sys.argv[1:])
print(*sorted({name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)), file=sys.stderr)
"""
LIGHT = {"distill", "typer", "shellingham", "annotated_doc", "pydantic", "pydantic_core", "annotated_types"}
LIGHT |= {"typing_extensions", "typing_inspection", "yaml", "cython_runtime", "jinja2", "markupsafe"}
SHOWN = {"rich", "pygments", "markdown_it", "mdurl", "attr"}  # for help and tables


@pytest.mark.process
@pytest.mark.parametrize(("arguments", "allowed"), [(["list"], LIGHT), (["--help"], LIGHT | SHOWN)])
def test_a_command_imports_few_packages_at_its_start(tmp_path, arguments, allowed):
    """What takes long to start is imports; numbers of seconds are those of a machine and its load."""
    command = [sys.executable, "-c", START, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    found = {name for name in done.stderr.splitlines()[-1].split() if not name.startswith("_")}
    assert found - allowed == set()
