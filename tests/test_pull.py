"""Pulling of students over real HTTP with all kinds of failures: resumed, refused by name, and never partly written."""

import hashlib
import json
import platform
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from commands import command, snapshot
from flaky import Fault, Flaky
from runs import folder_bytes
from students import WEIGHTS, copy, edit_card, make, put

from distill.core.errors import InputError, RunError
from distill.exchange import manifest, pulling, student_card, transfer, transports
from distill.exchange.transports import RemoteFolder, at
from distill.spec.kinds import STUDENTS
from distill.students import shipped

MB = 1_000_000
DISTILL = "distill.json"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Nothing waits before it asks again."""
    monkeypatch.setattr(transfer, "PAUSES", (0.0,))
    monkeypatch.setattr(pulling, "PAUSES", (0.0,))


@pytest.fixture
def student(tmp_path):
    return make(tmp_path / "there" / "student", size=MB)


def get(place, dest, **options):
    return pulling.pull(at(place), dest, **options)


def same(left, right):
    assert folder_bytes(left) == folder_bytes(right)


def refused(place, dest, error=InputError, **options):
    """What is said; and nothing is at `dest`."""
    with pytest.raises(error) as caught:
        get(place, dest, **options)
    assert not dest.exists()
    return str(caught.value)


# --- what goes well ---


def test_from_a_folder_a_file_url_and_http(tmp_path, student):
    with Flaky(tmp_path / "there") as server:
        for number, place in enumerate(
            [student, f"file://{student}", f"{server.url}/student", f"{server.url}/student/"]
        ):
            pulled = get(place, tmp_path / f"{number}")
            same(tmp_path / f"{number}", student)
            assert pulled.card == student_card.verify(student)
            assert pulled.digest == hashlib.sha256((student / DISTILL).read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "there"], "nothing is left beside"


def test_what_is_here_and_whole_is_not_fetched_again(tmp_path, student):
    with Flaky(tmp_path / "there") as server:
        assert get(f"{server.url}/student", tmp_path / "s").fetched > MB
        server.requests.clear()
        before = snapshot(tmp_path / "s")
        assert get(f"{server.url}/student", tmp_path / "s").fetched == 0
        assert server.requests == [(f"/student/{DISTILL}", 0)]
    assert snapshot(tmp_path / "s") == before


def test_a_place_that_is_taken_is_left_alone(tmp_path, student):
    other, notes, damaged = make(tmp_path / "other", seed=1), tmp_path / "notes", copy(student, tmp_path / "damaged")
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    (damaged / WEIGHTS).write_bytes(b"x")
    before = snapshot(tmp_path)
    for dest, said in [
        (other, f"{other} contains another student; name another folder, or remove it"),
        (notes, f"{notes} exists and is not a student; name another folder"),
        (damaged, f"{damaged}: {WEIGHTS} is damaged: 1 bytes"),
    ]:
        with pytest.raises(InputError, match=re.escape(said)):
            get(student, dest)
    assert snapshot(tmp_path) == before


# --- what breaks on the way ---


def test_dropped_connections_are_gone_on_from_where_they_broke(tmp_path, student):
    with Flaky(tmp_path / "there", Fault(WEIGHTS, times=9, after=100_000), Fault(DISTILL, times=2, after=5)) as server:
        get(f"{server.url}/student", tmp_path / "s")
        same(tmp_path / "s", student)
        starts = [start for path, start in server.requests if path.endswith(WEIGHTS)]
    assert starts == [100_000 * n for n in range(10)], "every byte of it was sent once"


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"after": 0}, {"after": 20, "promise": 50}])
def test_an_answer_that_fails_now_and_then_is_asked_for_again(tmp_path, student, fault):
    with Flaky(tmp_path / "there", Fault(".json", times=4, **fault)) as server:
        get(f"{server.url}/student", tmp_path / "s")
    same(tmp_path / "s", student)


def test_a_server_without_ranges_sends_again_what_is_passed_over(tmp_path, student):
    with Flaky(tmp_path / "there", Fault(WEIGHTS, times=2, after=400_000), ranges=False) as server:
        get(f"{server.url}/student", tmp_path / "s")
    same(tmp_path / "s", student)


def test_a_changed_byte_is_fetched_again_and_a_lasting_one_is_an_error(tmp_path, student):
    def flip(content):
        return content[:500_000] + bytes([content[500_000] ^ 1]) + content[500_001:]

    with Flaky(tmp_path / "there", Fault(WEIGHTS, times=1, change=flip)) as server:
        get(f"{server.url}/student", tmp_path / "s")
        same(tmp_path / "s", student)
        server.faults = [Fault(WEIGHTS, change=flip)]
        said = refused(f"{server.url}/student", tmp_path / "t", RunError)
        assert re.fullmatch(
            rf"{server.url}/student: {WEIGHTS}: damaged: sha256 \w{{12}}, expected \w{{12}}; "
            "the received data was discarded", said
        )  # fmt: skip
        server.faults = []
        get(f"{server.url}/student", tmp_path / "t")
    same(tmp_path / "t", student)


def test_lies_about_sizes(tmp_path, student):
    place = "{}/student"
    with Flaky(tmp_path / "there") as server:
        place = place.format(server.url)
        server.faults = [Fault(WEIGHTS, change=lambda content: content[:700_000])]  # the file itself is cut
        assert (
            "ends before byte 700,000; the part received so far is kept; run the same command again to continue"
            in refused(place, tmp_path / "s", RunError)
        )
        server.faults = [Fault(WEIGHTS, change=lambda content: content + b"more")]
        assert "longer than the 1,000,000 bytes that distill.json lists" in refused(place, tmp_path / "t", RunError)
        server.faults = [Fault(WEIGHTS, promise=10)]  # more is promised than comes: what distill.json lists is there
        get(place, tmp_path / "u")
        server.faults = [Fault(WEIGHTS, promise=-10, times=1)]  # less is promised: the rest is asked for
        get(place, tmp_path / "v")
        same(tmp_path / "v", student)
        server.faults = []
        server.sent = 0
        get(place, tmp_path / "s")
        assert server.sent < 400_000, "what came before the lie was kept"
        same(tmp_path / "s", student)


def test_a_missing_file_and_a_missing_student(tmp_path, student):
    with Flaky(tmp_path / "there", Fault("config.json", status=404)) as server:
        said = refused(f"{server.url}/student", tmp_path / "s")
        assert said == (
            f"{server.url}/student/unet/config.json: 404 Not Found, but distill.json lists it; the published "
            f"student is incomplete"
        )
        said = refused(f"{server.url}/none", tmp_path / "s")
        assert said.startswith(f"{server.url}/none is not a student folder: it has no distill.json (")
        server.faults = [Fault("", status=403)]
        assert refused(f"{server.url}/student", tmp_path / "s") == f"{server.url}/student/{DISTILL}: 403 Forbidden"
    said = refused(f"{server.url}/student", tmp_path / "s", RunError)
    assert said.endswith("Connection refused; try again later")


@pytest.mark.process
def test_killed_outright_a_pull_goes_on_from_its_bytes(tmp_path):
    student, silence = make(tmp_path / "there" / "student", size=8 * MB), threading.Event()
    with Flaky(tmp_path / "there", Fault(WEIGHTS, times=1, after=6 * MB, hold=silence)) as server:
        command = [sys.executable, "-m", "distill", "pull", f"{server.url}/student", "s"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            while not (parts := list(tmp_path.glob(f".s.part-*/{WEIGHTS}.part"))) or parts[0].stat().st_size < 5 * MB:
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
            silence.set()
        assert not (tmp_path / "s").exists()
        kept = parts[0].stat().st_size
        server.requests.clear()
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert (f"/student/{WEIGHTS}", kept) in server.requests
    same(tmp_path / "s", student)
    assert not list(tmp_path.glob(".s.*"))


@pytest.mark.process
def test_many_pulls_of_one_student_to_one_place(tmp_path):
    """Processes at once, and one that was killed before: all end well, and one student is there."""
    student = make(tmp_path / "there" / "student", size=4 * MB)
    command = [sys.executable, "-m", "distill", "pull", str(student), "s"]
    left = (
        tmp_path
        / f".s.part-{manifest.digest((student / DISTILL).read_bytes())[:16]}.999999999,1,boot,{platform.node()}"
    )
    (left / "unet").mkdir(parents=True)
    (left / f"{WEIGHTS}.part").write_bytes((student / WEIGHTS).read_bytes()[:MB])
    pulls = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=120)[1] for process in pulls]
    assert [process.returncode for process in pulls] == [0] * 4, said
    same(tmp_path / "s", student)
    assert not list(tmp_path.glob(".s.*"))


# --- what is not trusted ---

NAMES = {
    "/etc/passwd": "an absolute path",
    "C:\\x.json": "an absolute path",
    "../outside.json": "a path that leads out of the folder",
    "unet/../../outside.json": "a path that leads out of the folder",
    ".hidden.json": "not a valid name (letters, digits, '.', '_' and '-'; not hidden)",
    "unet//x.json": "not a valid name (letters, digits, '.', '_' and '-'; not hidden)",
    "a b.json": "not a valid name (letters, digits, '.', '_' and '-'; not hidden)",
    "unet\\x.json": "not a valid name (letters, digits, '.', '_' and '-'; not hidden)",
    "x\n.json": "not a valid name (letters, digits, '.', '_' and '-'; not hidden)",
    "distill.json": "which is the list of files itself",
    "unet/model.bin": "a pickle or compiled file, which can run any code when it is loaded",
    "model.PT": "a pickle or compiled file, which can run any code when it is loaded",
    "run.sh": "a file type that students do not have (valid: .safetensors, .json, .py, .md, .png, .txt)",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_refused_before_anything_is_fetched(tmp_path, student, name):
    edit_card(student, lambda content: content["files"].update({name: {"sha256": "0" * 64, "size": 3}}))
    (tmp_path / "there" / "outside.json").write_text("{}")
    with Flaky(tmp_path / "there") as server:
        said = refused(f"{server.url}/student", tmp_path / "s")
        assert said == f"{server.url}/student/{DISTILL} is invalid: it lists {name!r}, {NAMES[name]}; nothing was saved"
        assert len(server.requests) == 1


def readme(content):
    return content["files"]["README.md"]


def list_as(*names):
    """An edit of distill.json that lists a file under these names too."""
    return lambda content: content["files"].update({name: readme(content) for name in names})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (list_as("A.md", "a.md"),
         "is invalid: it lists both 'A.md' and 'a.md', the same file on some disks"),
        (list_as("unet"), "lists 'unet', a file type that students do not"),
        (list_as("x.md", "x.md/y.md"),
         "is invalid: it lists 'x.md' as a file and as a folder"),
        (lambda c: readme(c).update(size=-1), "files.README.md.size: -1 given; input should be greater than or equal"),
        (lambda c: readme(c).update(sha256="../x"), 'files.README.md.sha256: "../x" given; string should match'),
        (lambda c: c.update(command="rm"), 'command: "rm" given; extra inputs are not permitted'),
        (list_as(*(f"{n}.md" for n in range(1001))), " given; dictionary should have at most 1000 items"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_are_refused(tmp_path, student, edit, said):
    edit_card(student, edit)
    with Flaky(tmp_path / "there") as server:
        assert said in refused(f"{server.url}/student", tmp_path / "s")


def test_a_list_without_end_is_refused(tmp_path, student):
    with Flaky(tmp_path / "there", Fault(DISTILL, change=lambda content: content + b" " * (5 << 20))) as server:
        assert "distill.json is larger than the limit of 1,048,576 bytes" in refused(
            f"{server.url}/student", tmp_path / "s"
        )


def test_links_and_extra_files_are_refused_by_name(tmp_path, student):
    (student / "notes.md").write_text("x")
    assert refused(student, tmp_path / "s") == (
        f"{student}: files that distill.json does not list: notes.md; remove them"
    )
    (student / "notes.md").unlink()
    (student / "README.md").rename(tmp_path / "README.md")
    (student / "README.md").symlink_to(tmp_path / "README.md")
    said = f"{student}: README.md is a link; a student must not contain links. Copy the files themselves"
    assert refused(student, tmp_path / "s") == said
    with pytest.raises(InputError, match=re.escape(said)):
        pulling.verify(student)
    with (
        pytest.raises(transports.Refused, match="is a link; links are not followed"),
        RemoteFolder(student).open("README.md", 0),
    ):
        pass


def test_unknown_code_is_refused_by_name_and_shown_before_it_is_taken(tmp_path):
    student = make(tmp_path / "student", files={"unet/own.py": b"print('own')\n", "pipeline.py": b"import os\n"})
    said = refused(student, tmp_path / "s")
    assert said.startswith(
        f"{student} contains code that distill has never shipped: pipeline.py, unet/own.py; it would run when the "
        "student is loaded."
    )
    shown = {}
    get(student, tmp_path / "s", show=lambda name, text: shown.update({name: (text, (tmp_path / "s").exists())}))
    assert shown == {"pipeline.py": ("import os\n", False), "unet/own.py": ("print('own')\n", False)}
    same(tmp_path / "s", student)
    with pytest.raises(InputError, match="contains code that distill has never shipped"):
        pulling.verify(tmp_path / "s")


INDEX = {"_class_name": ["pipeline", "DistilledPipeline"], "unet": ["diffusers", "UNet2DModel"]}
CONTENTS = {
    "a pickle by another name": ("unet/more.safetensors", b"\x80\x04\x95" + b"x" * 50, "is not a safetensors file"),
    "no JSON": ("unet/config.json", b"{", "unet/config.json is not valid JSON"),
    "code elsewhere": (
        "unet/config.json", b'{"auto_map": {"AutoModel": "x/y--m.C"}}',
        "unet/config.json refers to code or weights elsewhere (auto_map)"),
    "a module of the system": (
        "model_index.json", json.dumps(INDEX | {"unet": ["os", "system"]}).encode(),
        'model_index.json: unet is ["os", "system"]; valid: [null, null], a model or scheduler class of diffusers, or'),
    "another pipeline": (
        "model_index.json", json.dumps(INDEX | {"_class_name": ["evil", "Pipeline"]}).encode(),
        'model_index.json: _class_name is ["evil", "Pipeline"]; valid: a class of a .py file that distill.json lists'),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_lie_are_refused(tmp_path, case):
    name, content, said = CONTENTS[case]
    student = make(tmp_path / "student", files={name: content})
    assert said in refused(student, tmp_path / "s")


def test_every_shipped_file_is_known():
    """A shipped file that changes needs its digest in distill/students/shipped.json, or nobody can pull what it makes.

    Never take one out: students that were made with it are still there.
    """
    texts = [(f"{module}.py", shipped.network(module)) for module in shipped.NETWORKS.values()]
    for kind, record in STUDENTS.items():
        texts += [("pipeline.py", shipped.pipeline(kind, sampler)) for sampler in record.samplers]
    texts += [("linear_path_scheduler.py", shipped.scheduler()), ("flow_map_pipeline.py", shipped.flow_map_pipeline())]
    texts += [("second_time.py", shipped.second_time())]
    for name, text in texts:
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert digest in manifest.shipped()[name], f'add "{digest}" to {name} in distill/students/shipped.json'


def test_code_that_older_versions_shipped_stays_known():
    of_0_2 = {
        "17aa305d94a8413aaf63b4b195afb917fc52f394ff4910ad723baa5d7090da74",
        "94120b175d644dc7714891fc421d9663640e7065c697c30ccd24d731bbd1032b",
        "7570e6ebb844f9a7a0017c2fa67bb8d1c7115ad5f11e7ad87cc0009cb19e74eb",
        "04a82c07d692f9f8426566f19029f07edade45ac1149b0057132a6b5eec649f8",
        "8f6c558888d7110daf92b01f495906cc52e791c5d9c6ec73cc23fc568ce90315",
    }
    assert of_0_2 < set(manifest.shipped()["pipeline.py"])


# --- places ---


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftpx://host/s", "unknown scheme 'ftpx'; valid: file, http, https, s3, hf, ssh"),
        ("http://[::1/s", "Invalid IPv6 URL"),
        ("http:///s", "the host is missing; write http://HOST/PATH"),
        ("https://host/s?token=1", "without '?', '#' and '::'"),
        ("s3://bucket/s::file://x", "without '?', '#' and '::'"),
        ("file://host/s", "a file URL needs three slashes"),
        (
            "s3://me:secret@bucket/s",
            "s3://bucket/s: s3 URLs must not contain a user or a password; write s3://BUCKET/PATH, ",
        ),
        (
            "hf://me:secret@org/s",
            "hf://org/s: hf URLs must not contain a user or a password; write hf://ORG/NAME or hf:/",
        ),
        (
            "simplecache::http://host/s",
            "without '?', '#' and '::'; valid schemes: file, http",
        ),
        ("hf://org", "hf://ORG/NAME or hf://ORG/NAME@REVISION is expected"),
        ("ssh://-oProxyCommand=x/s", "must be ssh://[USER@]HOST[:PORT]/PATH"),
        ("ssh://host:x/s", "the port is not a number. If the password contains '/', write it as %2F"),
        ("ssh://host", "must be ssh://[USER@]HOST[:PORT]/PATH"),
    ],
)
def test_urls_that_cannot_be(url, said):
    with pytest.raises(InputError, match=re.escape(said)):
        at(url)


def test_passwords_of_urls_are_not_shown(tmp_path, student):
    with Flaky(tmp_path / "there") as server:
        place = server.url.replace("//", "//me:secret@")
        assert "secret" not in refused(f"{place}/none", tmp_path / "s")
        assert "secret" not in repr(at(place))


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path, student, monkeypatch):
    monkeypatch.setattr("distill.core.space.free", lambda folder: 1000)
    said = refused(student, tmp_path / "s", RunError)
    assert said.startswith(
        f"not enough disk space for the files of {student}: 1.0 MB needed, but only 1.0 kB free in {tmp_path}; free "
        "some"
    )


def test_a_disk_that_is_full_keeps_what_came(tmp_path, student, monkeypatch):
    """A limit on the size of files stands in for the disk: the write itself fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        said = refused(student, tmp_path / "s", RunError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert re.fullmatch(rf"cannot write \S+/{WEIGHTS}: File too large; the part received so far is kept", said)
    get(student, tmp_path / "s")
    same(tmp_path / "s", student)


# --- the commands ---


def test_commands_say_what_they_did(capfd, tmp_path, student, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digest = manifest.digest((student / DISTILL).read_bytes())[:12]
    use = 'use it: DiffusionPipeline.from_pretrained("s", trust_remote_code=True)\n'
    done = command(capfd, "pull", str(student), "s")
    assert done.out == f"pulled s: 1.0 MB in 6 files, sha256 {digest}\n{use}"
    assert command(capfd, "pull", str(student), "s").out == f"s exists already and is complete: sha256 {digest}\n{use}"
    assert command(capfd, "verify", "s").out == "s is complete: 'reflow', 6 files\n"
    (tmp_path / "s" / WEIGHTS).write_bytes(b"x")
    done = command(capfd, "verify", "s")
    assert done.code == 2
    assert done.err.startswith(f"error: s: {WEIGHTS} is damaged: 1 bytes, expected 1000000 bytes with sha256 ")
    done = command(capfd, "verify", "x" * 300)
    assert (done.code, done.err) == (
        2, f"error: {'x' * 90}... (313 characters): File name too long; give a shorter name\n"
    )  # fmt: skip
    assert command(capfd, "verify", "none").err.startswith(
        "error: none is not a student folder: it has no distill.json ("
    )


def test_code_on_trust_is_printed_without_what_moves_the_cursor(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "student", files={"pipeline.py": b"import os\n# \x1b[2J clear\n"})
    done = command(capfd, "pull", "student", "s")
    assert (done.code, (tmp_path / "s").exists()) == (2, False)
    assert "--trust-code shows the code and accepts it" in done.err
    done = command(capfd, "pull", "student", "s", "--trust-code")
    assert done.out.startswith("--- pipeline.py\nimport os\n#  [2J clear\n---\npulled s: ")
    assert command(capfd, "verify", "s").code == 2
    assert command(capfd, "verify", "s", "--trust-code").code == 0


def test_what_cannot_be_pulled_is_said_with_what_can(capfd, tmp_path, student, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    assert command(capfd, "students").out == "no students in runs; publish one: distill publish RUN NAME\n"
    put(student, tmp_path / "runs", "digits")
    for given, said in [
        ("digits:v2", "'digits' has no version 'v2'; valid: v1"),
        ("digit:v1", "runs has no published student 'digit'; did you mean 'digits'? valid: digits"),
        ("other", "there is no published student, run or folder 'other'; give NAME[:VERSION] (distill students lists "
         "them), RUN or RUN/STAGE of runs, a student's folder, or a URL"),
        ("a:b:c", "'a:b:c': NAME or NAME:VERSION is expected; a version consists of 1 to 64 letters, digits, "
         "'.', '_' or '-' and begins with a letter or digit"),
    ]:  # fmt: skip
        done = command(capfd, "pull", given)
        assert (done.code, done.err) == (2, f"error: {said}\n")
