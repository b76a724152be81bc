"""Hub ids over real HTTP: a repository gives the same as its folder, and the cache gives the same without the hub. Each
test uses its own process, since the libraries read the environment when they are imported.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from commands import snapshot
from hub import CLASSES, MUTE, Hub, pictures, pipeline, python
from latent import write_conditions
from runs import folder_bytes
from safetensors.torch import load_file, save_file
from stock_pipelines import PIPELINES
from test_stock import exported
from test_teacher_flux import embeddings
from test_teacher_flux import pipeline as flux

from distill.exchange import own_code
from distill.exchange.student_card import StudentCard
from distill.spec.model import CheckpointTeacher, UNetSpec
from distill.students import packaged
from distill.students.exporting import export
from distill.students.init import StudentInit
from distill.students.native_folder import SECOND_TIME

pytestmark = pytest.mark.process

REVISIONS = ("main", "v2")
TINY = {"main": "org/tiny", "v2": "{kind: diffusers, path: org/tiny, revision: v2}"}


def commands(*given: list[str], hub: Hub, cwd: Path, offline: bool = False) -> tuple[list[int], str]:
    """`distill ...` for each of them in turn, in one process, which spares imports: exit codes and stderr."""
    program = "import json, sys; from distill.cli.main import main; print([main(a) for a in json.loads(sys.argv[1])])"
    done = python(program, json.dumps(given), hub=hub, cwd=cwd, offline=offline)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


# --- teachers ---


def pairs(teacher: str, out: str) -> list[str]:
    options = ["--count", "8", "--block", "4", "--shard", "4", "--steps", "2", "--device", "cpu"]
    return ["pairs", teacher, "--out", out, *options]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    """Two revisions of a pipeline, in folders of one name."""
    root = tmp_path_factory.mktemp("teachers")
    return {revision: pipeline(root / revision / "tiny", seed) for seed, revision in enumerate(REVISIONS)}


@dataclass(frozen=True)
class Solved:
    """Pairs of each revision in `hub-REVISION` and `folder-REVISION` of `cwd`; the hub they came from, gone since."""

    cwd: Path
    hub: Hub

    def manifest(self, name: str) -> dict[str, object]:
        return json.loads((self.cwd / name / "manifest.json").read_text())

    def shards(self, name: str) -> dict[str, bytes]:
        return {file: content for file, content in folder_bytes(self.cwd / name).items() if file != "manifest.json"}


@pytest.fixture(scope="module")
def solved(teachers, tmp_path_factory) -> Solved:
    cwd = tmp_path_factory.mktemp("solved") / "work"
    by_id = [pairs(TINY[revision], f"hub-{revision}") for revision in REVISIONS]
    by_folder = [pairs(str(teachers[revision]), f"folder-{revision}") for revision in REVISIONS]
    with Hub({"models/org/tiny": teachers}) as hub:
        codes, err = commands(*by_id, *by_folder, hub=hub, cwd=cwd)
    assert codes == [0, 0, 0, 0], err
    return Solved(cwd, hub)


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_hub_id_gives_the_pairs_of_its_folder(solved, revision):
    by_id, by_folder = f"hub-{revision}", f"folder-{revision}"
    assert len(solved.shards(by_id)) == 2
    assert solved.shards(by_id) == solved.shards(by_folder)
    told = {"teacher": "UNet2DModel from org/tiny"}
    assert solved.manifest(by_id) == solved.manifest(by_folder) | told != solved.manifest(by_folder)


def test_a_revision_has_weights_of_its_own(solved):
    main, v2 = (solved.shards(f"hub-{revision}") for revision in REVISIONS)
    assert main.keys() == v2.keys()
    assert all(main[name] != v2[name] for name in main)


def test_only_json_safetensors_and_the_card_are_asked_for_and_no_other_host(solved):
    asked = [request.split()[1] for request in solved.hub.requests]
    assert {Path(path).suffix for path in asked if "/resolve/" in path} == {".json", ".safetensors", ".md"}
    assert [path for path in asked if not path.startswith("/")] == []


@pytest.mark.long
def test_of_variants_one_is_fetched_and_of_a_latent_pipeline_no_weights(tmp_path):
    variants = pipeline(tmp_path / "variants", 0)
    half = variants / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(half.with_name("diffusion_pytorch_model.safetensors"), half)
    latent = pipeline(tmp_path / "latent", 0)
    index = json.loads((latent / "model_index.json").read_text())
    (latent / "model_index.json").write_text(json.dumps({**index, "vae": ["diffusers", "AutoencoderKL"]}))
    with Hub({"models/org/variants": {"main": variants}, "models/org/latent": {"main": latent}}) as hub:
        codes, err = commands(pairs("org/variants", "p"), pairs("org/latent", "q"), hub=hub, cwd=tmp_path / "work")
    assert codes == [0, 2], err
    assert (
        "teacher.path=org/latent is a pipeline with the components scheduler, unet, vae; valid for a UNet2DModel: "
        in err
    )
    asked = {request.split()[1] for request in hub.requests if "/resolve/" in request and "safetensors" in request}
    (one,) = asked
    assert one.startswith("/org/variants/resolve/") and one.endswith("/unet/diffusion_pytorch_model.safetensors")


LOADED = """
import sys, json, torch
from pathlib import Path
from distill import teachers
from distill.spec.model import CheckpointTeacher
from distill.teachers import by_id

for fields in json.loads(sys.argv[1]):
    teacher = teachers.load_teacher(CheckpointTeacher(**fields), torch.device("cpu"))
    pixels = teacher.codec.decode(torch.ones(1, *teacher.shape))
    print(teacher.digest, pixels.double().sum().item())
by_id.repository(CheckpointTeacher(**json.loads(sys.argv[1])[0])).download()(Path("copy"))
"""


@pytest.mark.long
def test_a_latent_pipeline_in_a_subfolder_is_read_in_one_variant_with_its_autoencoder(tmp_path):
    """From the hub and from the cache, it is the teacher of its folder; jobs get a copy of the files that are read."""
    inside, cwd = tmp_path / "flux" / "a" / "b", tmp_path / "work"
    copy = tmp_path / "copy"
    stock = flux(guidance_embeds=False)
    stock.save_pretrained(inside)
    stock.save_pretrained(inside, variant="fp16")
    (inside / "text_encoder").mkdir()
    (inside / "text_encoder" / "model.safetensors").write_bytes(b"large")
    half = load_file(inside / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    other = {name: 2 * each for name, each in half.items()}
    save_file(other, inside / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    conditions = write_conditions(tmp_path / "conditions.safetensors", embeddings(2))
    given = {"size": [16, 24], "conditions": conditions, "variant": "fp16"}
    asked = [
        {"path": "org/flux", "subfolder": "a/b", **given},
        {"path": "org/flux", "subfolder": "a/b/transformer", **given},
        {"path": str(inside), **given},
    ]
    with Hub({"models/org/flux": {"main": tmp_path / "flux"}}) as hub:
        done = python(LOADED, json.dumps(asked), hub=hub, cwd=cwd)
        assert done.returncode == 0, done.stderr
        shutil.move(cwd / "copy", copy)
        again = python(LOADED, json.dumps(asked[:1]), hub=hub, cwd=cwd, offline=True)
        missing = python(LOADED, json.dumps([{**asked[0], "subfolder": "a"}]), hub=hub, cwd=cwd)
    assert len(set(done.stdout.splitlines())) == 1
    assert again.stdout.splitlines() == done.stdout.splitlines()[:1], again.stderr
    assert (
        "teacher.path=org/flux with teacher.subfolder=a has neither model_index.json nor config.json" in missing.stderr
    )
    fetched = {
        request.split("/a/b/")[1] for request in hub.requests if request.startswith("GET") and "/a/b/" in request
    }
    weights = "diffusion_pytorch_model.fp16.safetensors"
    assert fetched == {
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json",
        f"transformer/{weights}", f"vae/{weights}",
    }  # fmt: skip
    assert {path.relative_to(copy / "a" / "b").as_posix() for path in copy.rglob("*") if path.is_file()} == fetched


@pytest.mark.long
def test_without_the_hub_the_cache_gives_the_same_pairs(solved):
    """By default, by name, and by the commit that the name stood for."""
    sha = solved.hub.commits["models/org/tiny"]["v2"].sha
    ids = {"again-main": TINY["main"], "again-v2": TINY["v2"], "again-sha": TINY["v2"].replace("v2", sha)}
    inspected = ["inspect", TINY["v2"]]
    solves = (pairs(v, k) for k, v in ids.items())
    codes, err = commands(*solves, inspected, hub=solved.hub, cwd=solved.cwd, offline=True)
    assert codes == [0, 0, 0, 0], err
    for again, before in (("again-main", "hub-main"), ("again-v2", "hub-v2"), ("again-sha", "hub-v2")):
        assert folder_bytes(solved.cwd / again) == folder_bytes(solved.cwd / before)


@pytest.mark.long
def test_where_the_hub_does_not_say_what_there_is_only_the_cache_is_read(tmp_path):
    """All files of these kinds would be all variants of the weights."""
    tiny, cwd = pipeline(tmp_path / "tiny", 0), tmp_path / "work"
    half = tiny / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(half.with_name("diffusion_pytorch_model.safetensors"), half)
    with Hub({"models/org/tiny": {"main": tiny}, "models/org/new": {"main": tiny}}) as hub:
        codes, err = commands(pairs("org/tiny", "p"), hub=hub, cwd=cwd)
        assert codes == [0], err
        hub.busy, before = True, len(hub.requests)
        codes, err = commands(pairs("org/tiny", "q"), pairs("org/new", "r"), hub=hub, cwd=cwd)
        assert codes == [0, 2], err
        assert "teacher.path=org/new is neither a folder here nor a hub id that can be fetched or is cached (" in err
        assert not [request for request in hub.requests[before:] if "/resolve/" in request]
    codes, err = commands(pairs("org/tiny", "s"), hub=hub, cwd=cwd, offline=True)
    assert codes == [0], err
    for again in ("q", "s"):
        assert folder_bytes(cwd / again) == folder_bytes(cwd / "p")


def data(path: str) -> list[str]:
    return ["plan", "digits", f"data={{kind: hf, path: {path}, size: 8, channels: 1}}"]


def test_what_the_hub_does_not_have_and_a_hub_that_hangs_up_are_one_message(teachers, tmp_path):
    v3 = "{kind: diffusers, path: org/tiny, revision: v3}"
    refused = [pairs(v3, "p"), pairs("org/nothing", "p"), pairs(MUTE, "p"), data("org/nothing"), data(MUTE)]
    with Hub({"models/org/tiny": teachers}) as hub:
        codes, err = commands(*refused, hub=hub, cwd=tmp_path / "work")
    assert codes == [2, 2, 2, 2, 2]
    neither = "is neither a folder here nor a hub id that can be fetched or is cached"
    said = [
        f"error: teacher.path=org/tiny at revision v3 {neither} (there is no such revision); check the name",
        f"error: teacher.path=org/nothing {neither} (there is no such repository, or it is private); check the name",
        f"error: teacher.path={MUTE} {neither} (Server disconnected without sending a response.); check the name",
        "error: data.path=org/nothing (split 'train') cannot be read: Dataset 'org/nothing' doesn't exist on the Hub",
        f"error: data.path={MUTE} (split 'train') cannot be read: Server disconnected without sending a response",
    ]
    assert len(err.splitlines()) == len(said), err
    for line, start in zip(err.splitlines(), said, strict=True):
        assert line.startswith(start)
    assert snapshot(tmp_path / "work") == {}, "something was written"


# --- students ---

PLAIN = """
import sys, torch
from diffusers import DiffusionPipeline
for name in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    print(pipeline(2, batch_size=3, generator=torch.Generator().manual_seed(0), output_type="pt").images.tolist())
"""


@pytest.mark.long
def test_a_flow_map_is_loaded_from_a_hub_by_plain_diffusers(tmp_path):
    """Of a network's code it fetches one file, so there must be no second one."""
    init = StudentInit(None, UNetSpec(kind="unet", channels=[8]), (1, 8, 8), None, seed=0)
    card = StudentCard(
        name="s", recipe="r", spec_digest="0" * 64, teacher_digest=None, kind="flow_map", sampler="jump",
        num_classes=None, null_class=None, shape=(1, 8, 8), weights="raw", images=1,
    )  # fmt: skip
    export(init.flow_map(), tmp_path / "s", card)
    with Hub({"models/org/map": {"main": tmp_path / "s"}}) as hub:
        done = python(PLAIN, "org/map", str(tmp_path / "s"), hub=hub, cwd=tmp_path / "work")
        assert done.returncode == 0, done.stderr
        asked = {Path(request.split()[1]).name for request in hub.requests}
        assert {"pipeline.py", "flow_map_unet.py", "diffusion_pytorch_model.safetensors"} < asked
    by_id, by_folder = done.stdout.splitlines()
    assert by_id == by_folder


WHOLE = """
import sys, torch
from diffusers import DiffusionPipeline
for name in sys.argv[1:]:
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    call = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "np"}
    print(pipeline([1, 2], generator=torch.Generator().manual_seed(0), **call).images.tolist())
"""


@pytest.mark.long
def test_the_complete_pipeline_of_a_flow_map_is_loaded_from_a_hub_by_plain_diffusers(tmp_path):
    """With the code of the pipeline, the scheduler and the second time."""
    subject = PIPELINES["dit"]
    exported(tmp_path, subject, "flow_map", "jump")
    teacher = CheckpointTeacher(path=str(tmp_path / "pipeline"), **subject.fields)
    packaged.export(tmp_path / "student", tmp_path / "whole", packaged.Package("fp32", teacher))
    with Hub({"models/org/map": {"main": tmp_path / "whole"}}) as hub:
        done = python(WHOLE, "org/map", str(tmp_path / "whole"), hub=hub, cwd=tmp_path / "work")
        assert done.returncode == 0, done.stderr
        asked = {request.split()[1] for request in hub.requests}
        assert all(any(path.endswith(f"/{name}") for path in asked) for name in (*own_code.FILES, SECOND_TIME)), asked
    by_id, by_folder = done.stdout.splitlines()
    assert by_id == by_folder


# --- data ---

DESCRIBE = """
import hashlib, sys
from distill import data
from distill.cli import arguments

for path in sys.argv[1:]:
    found = data.load_data(arguments.data(f"{{kind: hf, path: {path}, size: 8, label_column: label}}"), seed=0)
    images, labels, _ = found.items(0, range(len(found)))
    print(found.digest, hashlib.sha256(images.numpy().tobytes()).hexdigest(), labels.tolist(), found.num_classes)
"""


@pytest.mark.long
def test_pictures_by_hub_id_are_those_of_the_folder_and_of_the_cache(tmp_path):
    labels = [0, 2, 1, 0, 2]
    folder = pictures(tmp_path / "pictures", labels)
    pictures(tmp_path / "old", labels[:2])
    with Hub({"datasets/org/pictures": {"main": folder, "old": tmp_path / "old"}}) as hub:

        def described(*paths: str, offline: bool = False) -> list[str]:
            done = python(DESCRIBE, *paths, hub=hub, cwd=tmp_path / "work", offline=offline)
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        sha = hub.commits["datasets/org/pictures"]["main"].sha
        by_id, by_folder = described("org/pictures", str(folder))
        assert by_id == by_folder
        assert by_id.endswith(f" {labels} {len(CLASSES)}")
        assert described("org/pictures", offline=True) == [by_id]
        by_sha, old = described(f"org/pictures, revision: {sha}", "org/pictures, revision: old")
        assert by_sha == by_id
        assert old.endswith(f" {labels[:2]} {len(CLASSES)}")
        refused = python(DESCRIBE, f"org/pictures, revision: {sha}", hub=hub, cwd=tmp_path / "work", offline=True)
        assert f"the hub cannot be reached, and the cache contains another revision than {sha}" in refused.stderr
    assert [request for request in hub.requests if request.startswith("GET ") and request.endswith(".parquet")]
    others = [request for request in hub.requests if not request.split()[1].startswith("/")]
    assert [request for request in others if f".{urlsplit(hub.url).netloc}/" not in request] == [], "of another host"
