"""A cluster's file, and the scripts that it shapes, without Slurm."""

import subprocess

import pytest
import yaml

from distill import specfile
from distill.guard import InputError
from distill.launch import script, site
from distill.launch.script import Plan, Where
from distill.spec import SlurmSpec
from distill.store import RunPaths

SPEC = {
    "name": "one",
    "data": {"kind": "digits"},
    "stages": {"teach": {"kind": "train", "recipe": "pretrain/flow_matching", "images": 8}},
}


def load(tmp_path, text):
    (tmp_path / "site.yaml").write_text(text)
    return site.load(tmp_path / "site.yaml")


def render(tmp_path, where, plan=None, **launch):
    spec = specfile.validate({**SPEC, "launch": launch}, "spec")
    return script.job(RunPaths(tmp_path / "one"), spec, plan or Plan("teach", ["teach"], None, []), where)


def test_the_example_names_every_key_and_changes_nothing():
    found = site.load(site.EXAMPLE)
    assert found.site == site.Site()
    content = yaml.safe_load(site.EXAMPLE.read_text())
    assert set(content) == set(site.Site.model_fields)
    assert set(content["caches"]) == set(site.CacheSite.model_fields)
    assert set(content["container"]) == set(site.ContainerSite.model_fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caches: {HFHOME: /x}", "caches.HFHOME: unknown key; did you mean 'HF_HOME'? valid: HF_HOME, TMPDIR, "),
        ("container: {runtime: docker}", "container.runtime: 'docker' given; must be 'none', 'pyxis' or 'apptainer'"),
        ("environment: {A: 1}", "environment.A: 1 given; must be text"),
        ("modules: cuda", "modules: 'cuda' given; must be "),
        ("account: [a", "site.yaml: not YAML: line 2"),
    ],
)
def test_what_a_site_cannot_say(tmp_path, text, message):
    with pytest.raises(InputError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "site.yaml"))
    assert message in str(caught.value)


def test_an_empty_site_is_one(tmp_path):
    assert load(tmp_path, "").site == site.Site()
    assert load(tmp_path, "# nothing\n").site == site.Site()


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
    for plan in (None, Plan("solve.parts", ["teach"], [0, 2], [])):
        found = render(tmp_path, Where(load(tmp_path, text), tmp_path / "code", {"HF_HOME": "/a b"}), plan, **launch)
        checked = subprocess.run(["bash", "-n"], input=found, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr
        options = [line for line in found.splitlines() if line.startswith("#SBATCH ")]
        assert all(line.startswith("#SBATCH --") for line in options), "long names only"
        assert "\n\n\n" not in found
        assert max(map(len, found.replace(str(tmp_path), "").splitlines())) < 140
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
