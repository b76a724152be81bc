"""Site files of clusters, and the scripts that are made with them, without Slurm."""

import subprocess
import sys

import pytest
import yaml
from commands import command

from distill.core.errors import InputError
from distill.launch import script, sites
from distill.launch.script import JobPlan, Where
from distill.runs.run_store import RunPaths
from distill.spec import specfile
from distill.spec.model import SlurmSpec

SPEC = {
    "name": "one",
    "data": {"kind": "digits"},
    "stages": {"teach": {"kind": "train", "recipe": "pretrain/flow_matching", "images": 8}},
}


def load(tmp_path, text):
    (tmp_path / "site.yaml").write_text(text)
    return sites.load(tmp_path / "site.yaml")


def render(tmp_path, where, plan=None, **launch):
    spec = specfile.validate({**SPEC, "launch": launch}, "spec")
    return script.job(RunPaths(tmp_path / "one"), spec.launch, plan or JobPlan("teach", ["teach"], None, []), where)


def test_the_example_names_every_key_and_changes_nothing():
    found = sites.load(sites.EXAMPLE)
    assert found.site == sites.Site()
    content = yaml.safe_load(sites.EXAMPLE.read_text())
    assert set(content) == set(sites.Site.model_fields)
    assert set(content["caches"]) == set(sites.CacheSite.model_fields)
    assert set(content["container"]) == set(sites.ContainerSite.model_fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caches: {HFHOME: /x}", "caches.HFHOME: unknown key; did you mean 'HF_HOME'? valid: HF_HOME, TMPDIR, "),
        ("container: {runtime: docker}", "container.runtime: 'docker' given; must be 'none', 'pyxis' or 'apptainer'"),
        ("environment: {A: 1}", "environment.A: 1 given; must be text"),
        ("modules: cuda", "modules: 'cuda' given; must be "),
        ("account: [a", "site.yaml: not YAML: line 2"),
        ('account: "a\\ntouch X"', "account: 'a\\ntouch X' given; must be one line of text without control characters"),
        ('options: ["--a\\tb"]', "options.0: '--a\\tb' given; must be one line of text without control characters"),
        ("setup: ['a\n\n  b']", "setup.0: 'a\\nb' given; must be one line of text without control characters"),
        ('environment: {A: "\\e[2J"}', "environment.A: '\\x1b[2J' given; must be one line of text without"),
        ("environment: {A B: x}", "environment.A B: 'A B' is not a valid variable name; valid: letters, digits and _"),
        ('environment: {"A=1\\ntouch X; B": x}', "is not a valid variable name"),
        ('caches: {TMPDIR: "/a\\u2028b"}', "caches.TMPDIR: '/a\\u2028b' given; must be one line of text without"),
    ],
)
def test_what_a_site_cannot_say(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "site.yaml"))
    assert message in str(caught.value)


def test_an_empty_site_is_one(tmp_path):
    assert load(tmp_path, "").site == sites.Site()
    assert load(tmp_path, "# nothing\n").site == sites.Site()


def test_the_specs_own_wish_goes_before_the_sites(tmp_path):
    where = Where(load(tmp_path, "partition: p\naccount: a\nqos: q\noptions: [--exclusive]"), tmp_path / "code", {})
    lines = render(tmp_path, where).splitlines()
    assert {"#SBATCH --partition=p", "#SBATCH --account=a", "#SBATCH --qos=q", "#SBATCH --exclusive"} <= set(lines)
    mine = {"slurm": {"partition": "mine", "account": "me", "qos": "fast", "options": ["--constraint=h100"]}}
    lines = render(tmp_path, where, **mine).splitlines()
    assert {"#SBATCH --partition=mine", "#SBATCH --account=me", "#SBATCH --qos=fast"} <= set(lines)
    assert lines.index("#SBATCH --exclusive") < lines.index("#SBATCH --constraint=h100"), "the later counts for sbatch"


def test_modules_need_a_login_shell(tmp_path):
    with_modules = Where(load(tmp_path, "modules: [cuda/12.6, 'a b']"), tmp_path / "code", {})
    text = render(tmp_path, with_modules)
    assert text.startswith("#!/bin/bash -l\n")
    assert "module load cuda/12.6\nmodule load 'a b'\n" in text
    assert render(tmp_path, Where(load(tmp_path, ""), tmp_path, {})).startswith("#!/bin/bash\n")


def test_each_runtime_in_its_own_words(tmp_path):
    run = {"slurm": {"container": "my image.sif"}}
    apptainer = "container: {runtime: apptainer, options: [--nv], mounts: [/data]}"
    text = render(tmp_path, Where(load(tmp_path, apptainer), tmp_path / "code", {}), **run)
    assert (
        f"    apptainer exec --bind={tmp_path} --bind=/data --nv 'my image.sif' \\\n    python3 -P -m distill" in text
    )
    pyxis = "container: {runtime: pyxis, mounts: [/data], python: /site/bin/python}"
    text = render(tmp_path, Where(load(tmp_path, pyxis), tmp_path / "code", {}), **run)
    mounts = f"--container-mounts={tmp_path}:{tmp_path},/data:/data"
    words = f"'--container-image=my image.sif' {mounts} --no-container-entrypoint"
    assert f"    {words} \\\n    /site/bin/python -P -m distill stage\n" in text


@pytest.mark.parametrize(
    "launch",
    [
        {},
        {"nodes": 2, "procs": 4, "slurm": {"gpus_per_node": 4, "time": "1-0", "memory": "4G"}},
        {"slurm": {"container": "i"}},
    ],
    ids=["plain", "GPUs", "container"],
)
def test_a_script_is_bash_that_reads_well(tmp_path, launch):
    text = "environment: {A: '$HOME \"x\"', B: '`c`'}\nsetup: [ulimit -n 65536]\ncontainer: {runtime: pyxis}"
    for plan in (None, JobPlan("solve.parts", ["teach"], [0, 2], [])):
        found = render(tmp_path, Where(load(tmp_path, text), tmp_path / "code", {"HF_HOME": "/a b"}), plan, **launch)
        checked = subprocess.run(["bash", "-n"], input=found, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr
        options = [line for line in found.splitlines() if line.startswith("#SBATCH ")]
        assert all(line.startswith("#SBATCH --") for line in options), "long names only"
        assert "\n\n\n" not in found
        short = found.replace(str(tmp_path), "").replace(sys.prefix, "/venv")
        assert max(map(len, short.splitlines())) < 140
    assert "#SBATCH --array=0,2\n" in found


def test_the_scripts_of_jobs_ask_for_what_the_spec_says(tmp_path):
    where = Where(load(tmp_path, ""), tmp_path / "one" / "code", {})
    launch = {"nodes": 2, "procs": 4, "slurm": {"gpus_per_node": 4, "time": "1-0", "memory": "4G", "cpus_per_task": 3}}
    lines = set(render(tmp_path, where, **launch).splitlines())
    assert {
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --mem=4G",
        "#SBATCH --time=1-0",
        "#SBATCH --signal=B:USR1@180",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
    } <= lines


# --- what is given stays data: the shell runs none of it ---

COMMANDS = ["; touch X #", "$(touch X)", "`touch X`", "' ; touch X '", '" ; touch X "', "\\'; touch X"]
COMMANDS += ["${A:-$(touch X)}"]
STUB = """#!/bin/bash
printf '%s\\n' "$@" "$PYTHONPATH" "$A" "$HF_HOME" "$TMPDIR" "$HF_HUB_CACHE" >> "$SAID"
"""


@pytest.mark.parametrize("text", COMMANDS)
@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_script_does_with_a_value_what_it_means(tmp_path, text, runtime):
    """The script itself is executed, with a stub in place of the interpreter, which writes down what it is given."""
    hostile = tmp_path / f"a {text.replace(':', '')}"  # a colon would part folders of a container
    hostile.mkdir()
    stub = hostile / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    content = {
        "modules": [text],
        "environment": {"A": f"$HOME {text}"},
        "caches": {"HF_HOME": f"${{HOME}}/{text}", "TMPDIR": f"${{NONE:-/no ne}}/{text}"},
        "partition": text,
        "account": text,
        "qos": text,
        "options": [f"--comment={text}"],
        "python": str(stub),
        "container": {"runtime": runtime, "mounts": [text], "options": [text], "python": text},
    }
    where = Where(load(tmp_path, yaml.safe_dump(content)), hostile / "code", {"HF_HUB_CACHE": f"/{text}"})
    launch = {"slurm": {"container": text, "memory": text, "options": [text]}}
    spec = specfile.validate({**SPEC, "launch": launch}, "spec")
    run = RunPaths(hostile / "one")
    found = script.job(run, spec.launch, JobPlan("teach", ["teach"], None, []), where)
    path = tmp_path / "job.sbatch"
    path.write_text(found.replace("#!/bin/bash -l", "#!/bin/bash"))
    module = f"module() {{ printf '%s\\n' \"$@\" >> {tmp_path / 'modules'}; }}; export -f module; bash {path}"
    env = {"PATH": "/usr/bin:/bin", "HOME": "/home/me", "SAID": str(tmp_path / "said")}
    subprocess.run(["bash", "-c", module], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert not list(tmp_path.rglob("X"))
    said = (tmp_path / "said").read_text().splitlines()
    assert (tmp_path / "modules").read_text().splitlines() == ["load", text]
    assert said[:5] == ["-P", "-m", "distill", "job", str(run.root)]
    assert said[-10:-5] == [text, "-P", "-m", "distill", "stage"], "the interpreter in the container"
    image = (
        [f"--container-image={text}"] if runtime == "pyxis" else [f"--bind={text}", text, text, text]
    )  # option, image, interpreter
    assert [word for word in said if word in image] == image
    assert said[-5:] == [
        str(hostile / "code"), f"/home/me {text}", f"/home/me/{text}", f"/no ne/{text}", f"/{text}",
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["store", "site", "code"])
def test_a_folder_with_a_line_break_in_its_name_is_refused(tmp_path, where):
    """A name of the file system was never validated: the last check is the writer's own."""
    folders = {each: tmp_path / each for each in ("store", "site", "code")}
    folders[where] = tmp_path / "a\ntouch X"
    for folder in folders.values():
        folder.mkdir()
    place = Where(load(folders["site"], ""), folders["code"], {})
    spec = specfile.validate(SPEC, "spec")
    with pytest.raises(
        InputError, match=r"a\\ntouch X.* cannot be written into a job script: it contains a line break"
    ):
        script.job(RunPaths(folders["store"] / "one"), spec.launch, JobPlan("teach", ["teach"], None, []), place)


def test_a_store_that_a_runtime_would_take_for_several_folders_is_refused(tmp_path):
    place = Where(load(tmp_path, "container: {runtime: pyxis}"), tmp_path / "code", {})
    spec = specfile.validate({**SPEC, "launch": {"slurm": {"container": "i"}}}, "spec")
    with pytest.raises(InputError, match="cannot be mounted in a container: it contains a comma or a colon"):
        script.job(RunPaths(tmp_path / "a:b" / "one"), spec.launch, JobPlan("teach", ["teach"], None, []), place)


SLURM = ["partition", "account", "qos", "memory", "time", "container"]


@pytest.mark.parametrize("field", [*SLURM, "options"])
def test_a_line_break_in_a_spec_is_refused(field):
    value = "a\ntouch X"
    given = [value] if field == "options" else value
    with pytest.raises(InputError) as caught:
        specfile.validate({**SPEC, "launch": {"slurm": {field: given}}}, "spec")
    at = "options.0" if field == "options" else field
    assert str(caught.value) == (
        f"spec: launch.slurm.{at}: 'a\\ntouch X' given; must be one line of text without control characters"
    )


@pytest.mark.parametrize("option", ["--partition", "--account", "--qos", "--time", "--container"])
def test_an_option_is_text_as_it_stands(capfd, tmp_path, monkeypatch, option):
    """It becomes a change of the spec, which is YAML; the option itself is none."""
    monkeypatch.chdir(tmp_path)
    done = command(capfd, "submit", "digits", "--dry-run", f"{option}=a\ntouch X")
    assert done.code == 2
    assert f"launch.slurm.{option[2:]}: 'a\\ntouch X' given; must be one line of text" in done.err
    if option in ("--account", "--qos"):
        done = command(capfd, "submit", "digits", "--dry-run", f"{option}=0123")
        assert f"#SBATCH {option}=0123\n" in done.out


def test_ports_differ_between_jobs_attempts_and_launches():
    ports = [
        script.port("one", job, restart, launch)
        for job in range(100, 108)
        for restart in range(4)
        for launch in range(8)
    ]
    assert len(set(ports)) == len(ports)
    assert set(ports) <= set(script.PORTS)


def test_the_doctors_script_names_the_sites_caches(tmp_path):
    where = Where(load(tmp_path, "caches: {TMPDIR: '/scratch/$USER/a b'}"), tmp_path / "code", {})
    text = script.doctor(tmp_path / "store" / ".doctor", SlurmSpec(gpus_per_node=2), 3, where)
    assert "probe " in text and text.rstrip().endswith('/.doctor TMPDIR="/scratch/$USER/a b"')
    assert {"#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=2", "#SBATCH --time=1"} <= set(text.splitlines())
