"""`distill convert`: pickled checkpoints become folders with safetensors, and nothing in them is run."""

import argparse
import io
import json
import os
import pickle

import pytest
import torch
from checkpoints import load, noise, unet, write
from commands import command, snapshot
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from torch import nn

from distill.convert import conversion, unpickle
from distill.core.errors import InputError

FILE = "diffusion_pytorch_model.safetensors"


class Evil:
    """Runs a program when it is unpickled in the ordinary way."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class Callback:
    """Of a package that is not installed where the file is converted."""

    def __init__(self):
        self.best = 0.5


class Settings(dict):
    """A class that is a dictionary."""


def saved(path, content, *, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def refused(path, *parts):
    with pytest.raises(InputError) as error:
        unpickle.read(path)
    for part in (str(path), *parts):
        assert part in str(error.value), str(error.value)


def asked(out, *files, weights=None, ema=False):
    """What the process that unpickles does, in this process: (its exit code, the facts that it writes)."""
    out.mkdir(exist_ok=True)
    request = {"files": [str(file) for file in files], "out": str(out), "weights": weights, "ema": ema}
    code = unpickle.main(json.dumps(request))
    return code, json.loads((out / unpickle.FACTS).read_text())


# --- what is read from a pickle ---


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_state_dicts_are_found_beside_objects_of_other_packages(tmp_path, zipped):
    weights = {"a.weight": torch.randn(2, 3), "b": torch.arange(3)}
    others = {"callback": Callback(), "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {"b": weights["b"]}}}
    file = saved(tmp_path / "x.ckpt", {"model": weights, "ema": {"net": weights}, **others}, zipped=zipped)
    content = unpickle.read(file)
    found = unpickle.state_dicts(content)
    assert list(found) == ["model", "ema.net"]
    assert torch.equal(found["model"].tensors["a.weight"], weights["a.weight"])
    assert type(content["callback"]).__mro__[:2] == (type(content["callback"]), unpickle.StandIn)
    assert content["callback"].state == {"best": 0.5}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickled_module_is_read_as_its_state_dict(tmp_path, protocol):
    module = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Sequential(nn.BatchNorm2d(3))})
    module.register_buffer("temporary", torch.zeros(2), persistent=False)
    module.scale, module.settings = torch.ones(1).numpy().astype("f8")[0], Settings(a=1)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": module, "step": 3}, protocol=protocol))
    content = unpickle.read(tmp_path / "x.pkl")
    (found,) = unpickle.state_dicts(content).values()
    expected = module.state_dict()
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], each) for name, each in expected.items())
    facts = found.owner.facts()
    assert (facts["class_name"], facts["values"]["scale"], content["step"]) == ("ModuleDict", 1.0, 3)
    assert facts["modules"]["a"]["values"]["out_features"] == 3


def test_a_module_saved_by_torch_is_read_as_its_state_dict(tmp_path):
    module = nn.Sequential(nn.Linear(2, 3))
    (found,) = unpickle.state_dicts(unpickle.read(saved(tmp_path / "x.pt", module))).values()
    assert all(torch.equal(found.tensors[name], each) for name, each in module.state_dict().items())


# --- what is refused ---


def harmful(kind, path, mark):
    content = {"model": {"w": torch.ones(2)}, "x": Evil(mark)}
    if kind == "in a tensor":
        inside = io.BytesIO()
        torch.save(Evil(mark), inside, _use_new_zipfile_serialization=False)

        class Inner:
            def __reduce__(self):
                return torch.storage._load_from_bytes, (inside.getvalue(),)

        content["x"] = Inner()
    if kind in ("zip", "before torch 1.6"):
        return saved(path, content, zipped=kind == "zip")
    path.write_bytes(pickle.dumps(content, protocol=2 if kind == "protocol 2" else None))
    return path


@pytest.mark.parametrize("kind", ["zip", "before torch 1.6", "plain", "protocol 2", "in a tensor"])
def test_a_function_of_python_is_named_and_not_called(tmp_path, kind):
    refused(harmful(kind, tmp_path / "x", tmp_path / "mark"), "posix.system", "Do not use this file")
    assert not (tmp_path / "mark").exists()


def test_what_a_pickle_does_to_an_allowed_function_has_no_effect(tmp_path):
    """A pickle can set attributes of what it refers to: here those of the function that rebuilds tensors."""
    build = b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\nN}(X\x0c\x00\x00\x00__defaults__(K\x01tu\x86b."
    (tmp_path / "x.pkl").write_bytes(build)
    refused(tmp_path / "x.pkl", "a function has no state")
    assert torch._utils._rebuild_tensor_v2.__defaults__ != (1,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, zipped):
    whole = saved(tmp_path / "x.ckpt", {"model": {"w": torch.randn(50)}}, zipped=zipped).read_bytes()
    for end in [8, 30, *range(100, len(whole) - 1, len(whole) // 10), len(whole) - 5]:
        (tmp_path / "x.ckpt").write_bytes(whole[:end])
        refused(tmp_path / "x.ckpt", "is truncated or damaged, or not a checkpoint (", "copy or download it again")


def test_a_truncated_pickle_is_refused_wherever_it_ends(tmp_path):
    whole = pickle.dumps({"ema": nn.Linear(3, 3)})
    for end in [8, 30, *range(100, len(whole) - 1, len(whole) // 10), len(whole) - 5]:
        (tmp_path / "x.pkl").write_bytes(whole[:end])
        refused(tmp_path / "x.pkl", "copy or download it again")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"P6 a picture")
    refused(tmp_path / "x", "it is not a pickled file; give a .bin, .ckpt, .pt, .pth or .pkl file")
    code, facts = asked(tmp_path / "out", saved(tmp_path / "y", {"step": 3, "shadow": [torch.ones(2)]}))
    assert code == 2
    assert facts["error"] == (
        f"{tmp_path / 'y'}: it contains no state dict (tensors by name), which is what can be converted"
    )


# --- which state dict ---


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (["state_dict"], {}, "state_dict"),
        (["ema"], {}, "ema"),
        (["model", "ema"], {}, "model"),
        (["model", "model_ema"], {"ema": True}, "model_ema"),
        (["model", "ema.a", "ema.b"], {"weights": "ema.b"}, "ema.b"),
        (["a", "b"], {}, "it contains the state dicts a, b; choose one of them with --weights NAME"),
        (["model", "ema.a", "ema.b"], {"ema": True}, "the state dicts model, ema.a, ema.b; choose one of them with"),
        (["schema", "model"], {"ema": True}, "the state dicts schema, model; choose one of them with --weights"),
        (["model"], {"weights": "mod"}, "--weights mod: it contains no such state dict; valid: model"),
    ],
)
def test_one_state_dict_is_chosen(names, options, expected):
    found = {name: unpickle.StateDict() for name in names}
    options = {"wanted": options.get("weights"), "ema": options.get("ema", False)}
    if expected in names:
        assert unpickle.chosen(found, **options) == expected
    else:
        with pytest.raises(InputError) as error:
            unpickle.chosen(found, **options)
        assert expected in str(error.value)


def test_tensors_that_share_memory_are_written_in_full(tmp_path):
    shared = torch.randn(4, 4)
    weights = {"a": shared, "b": shared, "c": shared.t(), "d": nn.Parameter(shared[1:3])}
    code, facts = asked(tmp_path / "out", saved(tmp_path / "x.ckpt", {"model": weights, "ema": weights}), ema=True)
    assert (code, facts) == (0, {"chosen": "ema", "found": ["model", "ema"], "module": None})
    written = load_file(tmp_path / "out" / unpickle.WEIGHTS)
    assert all(torch.equal(written[name], each) for name, each in weights.items())


# --- the command ---


def pickled(folder, **options):
    """A pipeline folder as old versions of diffusers wrote it; returns its .bin file."""
    write(folder, unet(), DDIMScheduler())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    weights = folder / "unet" / FILE
    file = saved(weights.with_suffix(".bin"), load_file(weights), **options)
    weights.unlink()
    return file


def said(capfd, tmp_path, *arguments):
    before = snapshot(tmp_path)
    done = command(capfd, "convert", *map(str, arguments))
    assert (done.code, done.out) == (2, ""), done.err
    assert snapshot(tmp_path) == before
    return done.err


def test_mistakes_are_told_before_anything_is_read(capfd, tmp_path):
    file, new = pickled(tmp_path / "old"), tmp_path / "new"
    assert f"{tmp_path} exists already; name another folder" in said(capfd, tmp_path, file, tmp_path)
    assert f"{new} is not a folder; create it first" in said(capfd, tmp_path, file, new / "er")
    assert f"{file.parent} is a folder; give a pickled file, such as {file}" in said(capfd, tmp_path, file.parent, new)
    assert f"{new} does not exist" in said(capfd, tmp_path, new, tmp_path / "other")
    (tmp_path / "x.bin").write_bytes(file.read_bytes())
    assert "is not beside it; give the folder that contains it with --config" in said(
        capfd, tmp_path, tmp_path / "x.bin", new
    )
    write(tmp_path / "safe", unet(), DDIMScheduler())
    safe = tmp_path / "safe" / "unet" / FILE
    assert f"{safe} is a safetensors file, which needs no conversion" in said(capfd, tmp_path, safe, new)
    config = file.parent / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "UNet3"))
    assert f"{config}: network class UNet3 is not supported; valid: " in said(capfd, tmp_path, file, new)
    assert f"{config} is not a pickled checkpoint; valid: .bin, .ckpt, .pkl, .pt, .pth files" in said(
        capfd, tmp_path, config, new
    )


@pytest.mark.process
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_weights_are_the_same_bits_and_a_teacher(capfd, tmp_path, zipped):
    file = pickled(tmp_path / "old", zipped=zipped)
    done = command(capfd, "convert", str(file), str(tmp_path / "new"))
    assert (done.code, done.err) == (0, "")
    assert done.out == f"converted {file} to {tmp_path / 'new'}: UNet2DModel\n"
    assert set(snapshot(tmp_path / "new")) == {
        "config.json",
        FILE,
        "scheduler",
        "scheduler/scheduler_config.json",
        "README.md",
    }
    written = load_file(tmp_path / "new" / FILE)
    expected = unet().state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], each) for name, each in expected.items())
    teacher = load(tmp_path / "new")
    assert teacher.license == "mit"
    same = load(write(tmp_path / "same", unet(), DDIMScheduler()))
    x, t = noise(), torch.full((3,), 0.5)
    assert torch.equal(teacher.field(x, t, {}), same.field(x, t, {}))


@pytest.mark.process
def test_an_average_in_a_checkpoint_of_a_training_is_converted(capfd, tmp_path):
    """With the names that wrappers give, and without a scheduler."""
    unet().save_pretrained(tmp_path / "config")
    average = {f"module._orig_mod.{name}": each for name, each in unet(seed=1).state_dict().items()}
    file = saved(tmp_path / "last.ckpt", {"state_dict": unet().state_dict(), "ema": average, "callback": Callback()})
    options = ["--config", str(tmp_path / "config"), "--ema"]
    done = command(capfd, "convert", str(file), str(tmp_path / "new"), *options)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        f"converted 'ema' of {file} to {tmp_path / 'new'}: UNet2DModel",
        "the file also contains state_dict; to convert one of these instead: --weights NAME",
        "there was no scheduler_config.json to copy, so the noise schedule is not known: set teacher.scheduler or "
        "teacher.prediction",
    ]
    written = load_file(tmp_path / "new" / FILE)
    assert all(torch.equal(written[name], each) for name, each in unet(seed=1).state_dict().items())


@pytest.mark.process
def test_shards_become_one_file(capfd, tmp_path):
    file = pickled(tmp_path / "old")
    weights = list(unet().state_dict().items())
    shards = [file.with_name(f"diffusion_pytorch_model-0000{i}-of-00002.bin") for i in (1, 2)]
    for path, part in zip(shards, (weights[:20], weights[20:]), strict=True):
        saved(path, dict(part))
    done = command(capfd, "convert", str(shards[0]), str(tmp_path / "new"))
    assert (done.code, done.err) == (0, "")
    assert all(torch.equal(load_file(tmp_path / "new" / FILE)[name], each) for name, each in weights)
    shards[1].unlink()
    assert f"{shards[0]} is one of 2 files, and {shards[1].name} is missing" in said(
        capfd, tmp_path, shards[0], tmp_path / "other"
    )


@pytest.mark.process
def test_a_file_that_is_refused_leaves_nothing(capfd, tmp_path):
    file, mark = pickled(tmp_path / "old"), tmp_path / "mark"
    harmful("zip", file, mark)
    assert f"error: {file}: it refers to posix.system" in said(capfd, tmp_path, file, tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_in.bias": None}, "config.json and the weights do not match: missing weights: conv_in.bias"),
        ({"more": torch.ones(2)}, "config.json and the weights do not match: unknown weights: more"),
        ({"conv_in.bias": torch.ones(9)}, "conv_in.bias has shape [9] in the weights, but config.json implies [8]"),
        ({"conv_in.bias": torch.ones(8, dtype=torch.int8)}, "conv_in.bias has dtype I8, so the weights are"),
        ({"conv_in.bias": torch.full((8,), float("nan"))}, "contains NaN or infinity in conv_in.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, message):
    file, out = pickled(tmp_path / "old"), tmp_path / "out"
    saved(file, {name: each for name, each in {**unet().state_dict(), **change}.items() if each is not None})
    assert asked(out, file)[0] == 0
    with pytest.raises(InputError) as error:
        conversion.complete(file, None, out)
    assert str(error.value).startswith(str(file))
    assert message in str(error.value)
