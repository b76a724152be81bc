"""Pulling over ssh from a local sshd, from an object store (moto), and from a local replacement of the hub."""

import getpass
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import daemons
import pytest
from commands import command
from hub import Hub
from runs import ENV, folder_bytes
from students import WEIGHTS, make, put

from distill.core.errors import InputError, RunError
from distill.exchange import published, pulling, transfer
from distill.exchange.transports import Missing, at

pytestmark = pytest.mark.process
MB = 1_000_000
PATH = daemons.path("ssh")
SSHD, SSH, SSH_KEYGEN = (shutil.which(name, path=PATH) for name in daemons.PROGRAMS["ssh"])


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSES", (0.0,))
    monkeypatch.setattr(pulling, "PAUSES", (0.0,))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nobody listens at port {port}")


# --- ssh ---


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    """A server of this user's own, and the folder of `ssh` as its clients find it: with a config that knows it as
    `cluster`, and as `behind` through a jump host.
    """
    if missing := daemons.missing("ssh", PATH):
        pytest.skip(f"run `make system`: there is no {', '.join(missing)}")
    if pwd.getpwuid(os.geteuid()).pw_shell.endswith(("nologin", "false")):
        pytest.skip("the shell of this user lets nobody in over ssh")
    home = tmp_path_factory.mktemp("ssh")
    for key in ("host", "user"):
        subprocess.run([SSH_KEYGEN, "-q", "-t", "ed25519", "-N", "", "-f", home / key], check=True)
    shutil.copy(home / "user.pub", home / "authorized")
    port = free_port()
    (home / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nAuthorizedKeysFile {home}/authorized\n"
        f"PidFile {home}/pid\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nMaxStartups 100\n"
    )
    host, user = (home / "host.pub").read_text().split()[:2], getpass.getuser()
    (home / "known").write_text(f"[127.0.0.1]:{port} {' '.join(host)}\n")
    common = f"  User {user}\n  IdentityFile {home}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {home}/known\n"
    there = f"  HostName 127.0.0.1\n  Port {port}\n{common}"
    (home / "config").write_text(
        f"Host cluster\n{there}\nHost behind\n{there}  ProxyCommand ssh -W %h:%p cluster\n\nHost *\n{common}"
    )
    ssh = home / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {SSH} -F {shlex.quote(str(home / "config"))} "$@"\n')
    ssh.chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", home / "sshd_config"], stderr=log)
    try:
        wait_for_port(port, process)
        yield ssh.parent
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def ssh(sshd, monkeypatch):
    monkeypatch.setenv("PATH", f"{sshd}:{os.environ['PATH']}")


def test_ssh_with_the_users_own_config(tmp_path, ssh):
    student = make(tmp_path / "it's there $HOME" / "student", size=MB)
    for host in ("cluster", "behind"):
        pulling.pull(at(f"ssh://{host}{student}"), tmp_path / host)
        assert folder_bytes(tmp_path / host) == folder_bytes(student)


def test_ssh_goes_on_from_where_it_broke(tmp_path, sshd, monkeypatch):
    """An ssh that is cut off twice, after 300,000 bytes."""
    student = make(tmp_path / "student", size=MB)
    cut, log = tmp_path / "bin" / "ssh", tmp_path / "asked"
    cut.parent.mkdir()
    cut.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\n'
        f'case "$*" in *safetensors*) if [ "$(grep -c safetensors {log})" -le 2 ]; then\n'
        f'  {sshd}/ssh "$@" | head -c 300000; exit 255; fi ;; esac\nexec {sshd}/ssh "$@"\n'
    )
    cut.chmod(0o755)
    monkeypatch.setenv("PATH", f"{cut.parent}:{os.environ['PATH']}")
    pulling.pull(at(f"ssh://cluster{student}"), tmp_path / "s")
    assert folder_bytes(tmp_path / "s") == folder_bytes(student)
    asked = re.findall(r"tail -c \+(\d+) \S*safetensors", log.read_text())
    assert asked == ["1", "300001", "600001"]


def test_what_ssh_cannot_have_is_one_message(tmp_path, ssh):
    said = "there is no such file"
    with pytest.raises(Missing, match=said):
        pulling.read(at(f"ssh://cluster{tmp_path}"), "none.json", 10)
    with pytest.raises(InputError, match=f"ssh://cluster{tmp_path}/none is not a student folder: .*{said}"):
        pulling.pull(at(f"ssh://cluster{tmp_path}/none"), tmp_path / "s")
    with pytest.raises(InputError, match="Permission denied"):
        pulling.pull(at(f"ssh://nobody-here@cluster{tmp_path}/none"), tmp_path / "s")
    port = free_port()
    with pytest.raises(RunError, match=f"port {port}: Connection refused; try again later"):
        pulling.pull(at(f"ssh://127.0.0.1:{port}{tmp_path}/none"), tmp_path / "s")
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_store_behind_ssh(capfd, tmp_path, ssh, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = make(tmp_path / "student")
    put(student, tmp_path / "store", "digits")
    url = f"ssh://cluster{tmp_path}/store"
    assert "digits:v1" in command(capfd, "students", "--store", url).out
    done = command(capfd, "pull", "digits", "--store", url)
    assert done.code == 0, done.err
    assert folder_bytes(tmp_path / "digits") == folder_bytes(tmp_path / "store" / "registry" / "digits" / "v1")


# --- s3 ---


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """moto's server, on loopback, as the user's own AWS environment."""
    import fsspec

    port = free_port()
    program = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    with (tmp_path / "moto.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=log, stderr=log)
    try:
        wait_for_port(port, process)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_MAX_ATTEMPTS": "1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield fsspec.filesystem("s3")
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_s3(capfd, tmp_path, s3, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = make(tmp_path / "student", size=7 * MB)
    put(student, tmp_path / "store", "digits")
    s3.mkdir("bucket")
    s3.put("store", "bucket/store", recursive=True)
    done = command(capfd, "pull", "digits:v1", "--store", "s3://bucket/store")
    assert done.code == 0, done.err
    assert folder_bytes(tmp_path / "digits-v1") == folder_bytes(tmp_path / "store/registry/digits/v1")
    there = at("s3://bucket/store/registry/digits/v1")
    with there.open(WEIGHTS, 6_999_990) as stream:
        assert stream.read(100) == (student / WEIGHTS).read_bytes()[-10:]
    done = command(capfd, "pull", "s3://bucket/none")
    assert done.code == 2
    assert "s3://bucket/none is not a student folder: it has no distill.json" in done.err
    s3.pipe(f"bucket/store/registry/digits/v1/{WEIGHTS}", b"x" * 7 * MB)
    done = command(capfd, "pull", "digits:v1", "other", "--store", "s3://bucket/store")
    assert done.code == 1
    assert ": damaged: sha256 " in done.err
    assert published.listed(at("s3://bucket/store")).students[0].label == "digits:v1"


# --- the hub ---


def test_the_hub(tmp_path):
    """Real requests of huggingface_hub and ours, to a stand-in; its library reads the environment when imported."""
    student = make(tmp_path / "student", size=MB)
    other = make(tmp_path / "other", seed=1)
    for folder in (student, other):
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    with Hub({"models/org/digits": {"main": student, "v2": other}}) as hub:
        env = {name: value for name, value in ENV.items() if not name.startswith("HF_")}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}

        def run(*arguments, **more):
            line = [sys.executable, "-m", "distill", "pull", *arguments]
            return subprocess.run(line, cwd=tmp_path, env=env | more, capture_output=True, text=True, check=False)

        done = run("hf://org/digits")
        assert done.returncode == 0, done.stderr
        assert run("hf://org/digits@v2", "second").returncode == 0
        sha = hub.commits["models/org/digits"]["main"].sha
        assert f"GET /org/digits/resolve/{sha}/{WEIGHTS}" in hub.requests, "of one commit, whatever is pushed meanwhile"
        for place, said in [("hf://org/none", "cannot be found"), ("hf://org/digits@v3", "cannot be found")]:
            done = run(place)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert said in done.stderr
        done = run("hf://org/digits", "third", HF_HUB_OFFLINE="1")
        assert done.returncode == 2
        assert "OfflineModeIsEnabled" in done.stderr
    for folder, name in ((student, "digits"), (other, "second")):
        (folder / ".gitattributes").unlink()
        assert folder_bytes(tmp_path / name) == folder_bytes(folder)
