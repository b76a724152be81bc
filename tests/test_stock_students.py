"""Publishing and pulling of students with the network class of a stock pipeline: what they may consist of."""

import json
from inspect import signature

import diffusers
import pytest
import test_teacher_sd3 as sd3
import transformers
from commands import command
from diffusers import DiffusionPipeline
from latent import load, write, write_conditions
from runs import folder_bytes
from students import PIPELINE, card, put, relist, tensors

from distill.core.errors import InputError
from distill.exchange import pulling, stock_students, student_card
from distill.exchange.transports import at
from distill.students import shipped
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.teachers import codecs, schedulers
from distill.teachers.architectures import known
from distill.teachers.convention import Convention

SD3, WEIGHTS = "SD3Transformer2DModel", "transformer/diffusion_pytorch_model.safetensors"
SHARDS = "transformer/diffusion_pytorch_model.safetensors.index.json"
NOTHING = [None, None]
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.42.1",
    "transformer": ["diffusers", SD3],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "vae": NOTHING,
    "text_encoder": NOTHING,
    "tokenizer": NOTHING,
}
WHOLE = {  # the files of a complete pipeline, besides those of the network
    "vae/config.json": b'{"_class_name": "AutoencoderKL"}',
    "vae/diffusion_pytorch_model.safetensors": tensors(300, 1),
    "text_encoder/config.json": b'{"architectures": ["CLIPTextModelWithProjection"], "attn_implementation": null}',
    "text_encoder/model.safetensors": tensors(300, 2),
    "text_encoder_3/config.json": b'{"model_type": "t5", "_attn_implementation": "sdpa"}',
    "text_encoder_3/model.safetensors.index.json": b'{"weight_map": {"w": "model-1.safetensors"}}',
    "text_encoder_3/model-1.safetensors": tensors(300, 3),
    "tokenizer/vocab.json": '{"a\x7f\x85": 1}'.encode(),
    "tokenizer/merges.txt": "\u0120a b\n\x85c\n".encode(),
    "tokenizer/tokenizer_config.json": b'{"special_tokens_map_file": "/home/x/y.json", "vocab_file": "vocab.json"}',
    "tokenizer_3/spiece.model": b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00",
    "tokenizer_3/chat_template.jinja": b"{{ messages }}",
}
PARTS = {
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "image_encoder": NOTHING,
}


def make(folder, index=None, files=None, **facts):
    """A student of SD 3. Files with the content None are left out."""
    content = {
        "model_index.json": json.dumps(INDEX | (index or {})).encode(),
        "transformer/config.json": json.dumps({"_class_name": SD3}).encode(),
        WEIGHTS: tensors(300, 0),
        "scheduler/scheduler_config.json": b'{"_class_name": "FlowMatchEulerDiscreteScheduler"}',
        **(files or {}),
    }
    made = card(**{"network": SD3, "component": "transformer", "shape": (4, 8, 12), **facts})
    content["README.md"] = student_card.readme(made).encode()
    for name, data in content.items():
        if data is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    relist(folder, made)
    return folder


def lora(**settings) -> bytes:
    """A safetensors file with the settings of a LoRA in its header."""
    text = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    header = json.dumps({"__metadata__": {"format": "pt", "lora_adapter_metadata": text}}).encode()
    return len(header).to_bytes(8, "little") + header


SECOND_TIME, SCHEDULER = "second_time/diffusion_pytorch_model.safetensors", "scheduler/linear_path_scheduler.py"
OWN_CODE = {
    "flow_map_pipeline.py": shipped.flow_map_pipeline().encode(),
    SCHEDULER: shipped.scheduler().encode(),
    "second_time/second_time.py": shipped.second_time().encode(),
    "second_time/config.json": b"{}",
    SECOND_TIME: tensors(300, 1),
}
FLOW_MAP = {
    "_class_name": ["flow_map_pipeline", "FlowMapStableDiffusion3Pipeline"],
    "scheduler": ["linear_path_scheduler", "LinearPathScheduler"],
    "second_time": ["second_time", "SecondTime"],
}
RIGHT = {
    "network": {},
    "flow map": {"files": {"second_time/config.json": b"{}", SECOND_TIME: tensors(300, 1)}},
    "complete flow map": {"files": OWN_CODE, "index": FLOW_MAP},
    "times of its own": {
        "files": {SCHEDULER: OWN_CODE[SCHEDULER]},
        "index": {"scheduler": ["linear_path_scheduler", "LinearPathScheduler"]},
    },
    "acceleration": {
        "files": {
            "acceleration/config.json": b"{}",
            "acceleration/diffusion_pytorch_model.safetensors": tensors(300, 1),
        }
    },
    "shards": {
        "files": {
            WEIGHTS: None,
            SHARDS: b'{"weight_map": {"w": "diffusion_pytorch_model-1.safetensors"}}',
            "transformer/diffusion_pytorch_model-1.safetensors": tensors(300, 1),
        }
    },
    "whole pipeline": {"files": WHOLE, "index": PARTS | {"force_zeros_for_empty_prompt": True}},
    "adapters": {
        "files": {
            "pytorch_lora_weights.safetensors": lora(
                r=4, lora_alpha=8.0, target_modules=["all_x.2-1"], alpha_pattern={"^all_x.2-1": 2}
            ),
            "adapter_model.safetensors": tensors(300, 1),
            "adapter_config.json": b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "target_modules": ["to_q"]}',
            "comfyui/name.safetensors": tensors(300, 1),
        }
    },
    "names of classes": {"index": {"id2label": {"0": "tench, Tinca tinca", "999": "toilet tissue"}}},
}


@pytest.mark.parametrize("case", RIGHT)
def test_students_of_all_kinds_are_published_pulled_and_verified(tmp_path, case):
    student = make(tmp_path / "student", **RIGHT[case])
    assert put(student, tmp_path / "runs", "x").label == "x:v1"
    pulling.pull(at(student), tmp_path / "s")
    assert folder_bytes(tmp_path / "s") == folder_bytes(student)
    assert pulling.verify(tmp_path / "s") == student_card.read(student)


def of_index(**parts):
    return {"index": parts}


def of_file(name, content=b"{}"):
    return {"files": {name: content}}


NO_FILE = " is not a file of a student with the network class of a stock pipeline (SD3Transformer2DModel); the "
ELSEWHERE = " refers to code or weights elsewhere ({})"
CONFIG, TOKENS = "text_encoder/config.json", "tokenizer/tokenizer_config.json"
ADAPTERS = "pytorch_lora_weights.safetensors"
LIES = {
    "another network": ({"network": "UNet2DModel"}, "UNet2DModel is not a network class that students have; valid: A"),
    "another folder": (
        {"component": "unet"},
        "distill.json has the SD3Transformer2DModel in the folder 'unet'; valid:",
    ),
    "code": (of_file("pipeline.py", PIPELINE), "pipeline.py" + NO_FILE),
    "code of a network": (of_file("transformer/sd3.py", b""), "transformer/sd3.py" + NO_FILE),
    "a pipeline within": (of_file("vae/model_index.json"), "vae/model_index.json" + NO_FILE),
    "an adapter of transformers": (
        of_file("text_encoder/adapter_config.json"),
        "text_encoder/adapter_config.json" + NO_FILE,
    ),
    "a folder that no pipeline has": (of_file("controlnet/config.json"), "controlnet/config.json" + NO_FILE),
    "a fourth text encoder": (of_file("text_encoder_4/config.json"), "text_encoder_4/config.json" + NO_FILE),
    "a tokenizer elsewhere": (of_file("vae/vocab.model", b"\x0a"), "vae/vocab.model" + NO_FILE),
    "a pickle as a vocabulary": (
        of_file("tokenizer/spiece.model", b"\x80\x04"),
        "tokenizer/spiece.model is not a SentencePiece model",
    ),
    "another pipeline": (
        of_index(_class_name="StableDiffusionPipeline"),
        'model_index.json: _class_name is "StableDiffusionPipeline"; '
        "valid for a SD3Transformer2DModel: StableDiffusion3Pipeline",
    ),
    "a pipeline of its own": (
        of_index(_class_name=["pipeline", "Own"]),
        '_class_name is ["pipeline", "Own"]; valid for',
    ),
    "a flow map of another pipeline": (
        {"files": OWN_CODE, "index": FLOW_MAP | {"_class_name": ["flow_map_pipeline", "FlowMapDiTPipeline"]}},
        '_class_name is ["flow_map_pipeline", "FlowMapDiTPipeline"]; valid for',
    ),
    "a flow map without its code": (
        {"files": {**OWN_CODE, "flow_map_pipeline.py": None}, "index": FLOW_MAP},
        '_class_name is ["flow_map_pipeline", "FlowMapStableDiffusion3Pipeline"]; valid for',
    ),
    "another class of its code": (
        {"files": OWN_CODE, "index": FLOW_MAP | {"second_time": ["second_time", "Other"]}},
        'second_time is ["second_time", "Other"]; valid: ',
    ),
    "a scheduler without its code": (
        {"files": {**OWN_CODE, SCHEDULER: None}, "index": FLOW_MAP},
        'scheduler is ["linear_path_scheduler", "LinearPathScheduler"]; valid: ',
    ),
    "another class of network": (of_index(transformer=["diffusers", "FluxTransformer2DModel"]), "transformer is ["),
    "a network of its own": (
        of_index(transformer=["sd3", "Own"]),
        'transformer is ["sd3", "Own"]; valid: [null, null] or',
    ),
    "a part that looks for its class": (of_index(text_encoder=["transformers", "AutoModel"]), "text_encoder is ["),
    "a pipeline as a part": (
        of_index(vae=["diffusers", "DiffusionPipeline"]),
        'vae is ["diffusers", "DiffusionPipeline"]',
    ),
    "a function as a part": (of_index(tokenizer=["os", "system"]), 'tokenizer is ["os", "system"]; valid'),
    "three words": (of_index(vae=["diffusers", "AutoencoderKL", "x"]), 'vae is ["diffusers", "AutoencoderKL", "x"]'),
    "a part that no pipeline has": (of_index(controlnet=["diffusers", "ControlNetModel"]), "controlnet is ["),
    "a word": (of_index(boundary_ratio="ab"), 'boundary_ratio is "ab"; valid: true, false, null or a number'),
    "another key": (of_index(_module="x"), '_module is "x"; valid: a line of text, for one of the keys'),
    "a pipeline from a hub": (
        of_index(custom_pipeline="a/b"),
        "model_index.json" + ELSEWHERE.format("custom_pipeline"),
    ),
    "trusted code": (of_index(trust_remote_code=True), "model_index.json" + ELSEWHERE.format("trust_remote_code")),
    "an index that is a list": (of_file("model_index.json", b"[]"), "model_index.json is not a JSON object"),
    "code of transformers": (of_file(CONFIG, b'{"auto_map": {}}'), CONFIG + ELSEWHERE.format("auto_map")),
    "code of a tokenizer": (of_file(TOKENS, b'{"auto_map": {}}'), TOKENS + ELSEWHERE.format("auto_map")),
    "a kernel": (
        of_file(CONFIG, b'{"text_config": {"attn_implementation": "a/b"}}'),
        CONFIG + ELSEWHERE.format("attn_implementation"),
    ),
    "kernels by part": (
        of_file(CONFIG, b'{"_attn_implementation": {"x": "a/b"}}'),
        CONFIG + ELSEWHERE.format("_attn_implementation"),
    ),
    "kernels": (of_file(CONFIG, b'{"use_kernels": true}'), CONFIG + ELSEWHERE.format("use_kernels")),
    "quantised weights": (
        of_file(CONFIG, b'{"quantization_config": {}}'),
        CONFIG + ELSEWHERE.format("quantization_config"),
    ),
    "a vocabulary elsewhere": (
        of_file(TOKENS, b'{"vocab_file": "../../x"}'),
        f'{TOKENS}: vocab_file is "../../x"; valid: the name of a file in',
    ),
    "an absolute vocabulary": (
        of_file(TOKENS, b'{"tokenizer_file": "/x"}'),
        f'{TOKENS}: tokenizer_file is "/x"; valid:',
    ),
    "a shard elsewhere": (of_file(SHARDS, b'{"weight_map": {"w": "../vae/x.safetensors"}}'), "refers to weights in"),
    "a module of PEFT": (
        of_file(ADAPTERS, lora(r=1, megatron_core="os")),
        f"{ADAPTERS}: the settings of its LoRA have "
        'transformer.megatron_core="os"; valid: r, lora_alpha, target_modules',
    ),
    "a pattern that never ends": (
        of_file(ADAPTERS, lora(rank_pattern={"(a+)+$": 1})),
        'rank_pattern={"(a+)+$": 1}; valid: r, lora_alpha',
    ),
    "a pattern of layers": (of_file(ADAPTERS, lora(target_modules="(a+)+$")), 'target_modules="(a+)+$"; valid:'),
    "a class of PEFT": (
        of_file("adapter_config.json", b'{"peft_type": "LORA", "auto_mapping": {"parent_library": "os"}}'),
        'adapter_config.json: the settings of its LoRA have auto_mapping={"parent_library": "os"}; valid: r,',
    ),
    "another adapter": (of_file(ADAPTERS, lora(peft_type="LOHA")), 'peft_type="LOHA"; valid:'),
}


@pytest.mark.parametrize("case", LIES)
def test_whatever_is_not_known_is_refused_by_pull_verify_and_publish(tmp_path, case):
    given, said = LIES[case]
    student = make(tmp_path / "student", **given)
    for call in (
        pulling.verify,
        lambda folder: pulling.verify(folder, lambda name, text: None),  # --trust-code
        lambda folder: pulling.pull(at(folder), tmp_path / "s", show=lambda name, text: None),
        lambda folder: put(folder, tmp_path / "runs", "x"),
    ):
        with pytest.raises(InputError) as caught:
            call(student)
        assert said in str(caught.value) and str(caught.value).count("\n") == 0
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".s.part-*")), "nothing of it is kept"


def test_changed_code_is_accepted_only_if_it_is_trusted(tmp_path):
    student = make(tmp_path / "student", index=FLOW_MAP, files={**OWN_CODE, SCHEDULER: b"print(1)"})
    shown = []
    with pytest.raises(InputError, match=f"contains code that distill has never shipped: {SCHEDULER}; it would run"):
        pulling.verify(student)
    pulling.verify(student, lambda name, text: shown.append((name, text)))
    assert shown == [(SCHEDULER, "print(1)")]


def test_a_student_with_code_has_no_tokenizer(tmp_path):
    student = make(tmp_path / "student", **of_file("tokenizer/x.model", b"\x0a"))
    (student / "model_index.json").unlink()
    relist(student, card())
    with pytest.raises(InputError, match="tokenizer/x.model belongs in the folder of a tokenizer, which this student"):
        pulling.verify(student)


def test_the_lists_agree_with_diffusers_and_with_the_teachers():
    found = {}
    for name, convention in known().items():
        if isinstance(convention, Convention) and type(convention).__module__.startswith("distill."):
            found[name] = stock_students.StockNetwork(convention.folder, tuple(convention.pipelines))
    assert found == stock_students.NETWORKS
    assert set(codecs.KINDS) == stock_students.AUTOENCODERS
    assert set(schedulers.KINDS) - {"ScoreSdeVeScheduler"} == stock_students.SCHEDULERS


@pytest.mark.long
def test_the_components_are_those_of_the_pipelines():
    """They are what the pipeline classes say, except base classes and those that choose a class."""
    for each in stock_students.TEXT_ENCODERS | stock_students.COMPONENTS["image_encoder"][1]:
        assert issubclass(getattr(transformers, each), transformers.PreTrainedModel), each
    for name in (pipeline for network in stock_students.NETWORKS.values() for pipeline in network.pipelines):
        for part, parameter in signature(getattr(diffusers, name)).parameters.items():
            library, classes = stock_students.COMPONENTS.get(part.removesuffix("_2").removesuffix("_3"), ("", ()))
            of = str(parameter.annotation)
            names = [each for each in dir(transformers) if f".{each}'" in of or f".{each} |" in of] if library else []
            for each in names:
                plain = each.removesuffix("Fast")
                if not each.startswith("Auto") and each != "PreTrainedModel":
                    assert each in classes or plain in classes, (name, part, each)


def test_a_student_goes_from_a_folder_to_stock_diffusers(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    stock, rows = sd3.pipeline(), write_conditions(tmp_path / "rows.safetensors", sd3.embeddings(2))
    teacher = teacher_on_linear_path(load(write(tmp_path / "sd3", stock), size=[16, 24], conditions=rows))
    student = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher).velocity_field().eval()
    facts = card("student", shape=teacher.shape, teacher="my-sd3", metrics={})
    export(student, tmp_path / "student", facts, teacher.packaging)
    done = command(capfd, "publish", "student", "mine")
    assert done.code == 0, done.err
    said = "no evaluation has drawn samples, and outside of a run its teacher, which samples need, is not known"
    assert f"the model card has no picture of samples: {said}" in done.err
    done = command(capfd, "pull", "mine", "got")
    assert done.out.splitlines()[1] == (
        "use it: distill sample got --teacher TEACHER --prompt TEXT --out samples.png (TEACHER: the pipeline of my-sd3"
        "; got/README.md has the code for diffusers)"
    )
    drawn = command(
        capfd, "sample", "got", "--teacher", f"{{path: sd3, conditions: {rows}}}", "--count", "2", "--out", "x.png"
    )
    assert drawn.code == 0, drawn.err
    pipeline = DiffusionPipeline.from_pretrained(
        "got", vae=stock.vae, **dict.fromkeys([n for n in stock.components if n.startswith(("text", "tok"))])
    )
    weights = dict(pipeline.transformer.named_parameters())
    assert all(each.equal(weights[name]) for name, each in student.network.named_parameters())


@pytest.mark.parametrize(
    ("files", "facts", "said"),
    [
        (WHOLE, {}, 'use it: DiffusionPipeline.from_pretrained("got")'),
        (
            {WEIGHTS: None, "transformer/config.json": None, "model_index.json": None, ADAPTERS: lora(r=1)},
            {"lora": {"student": {"rank": 1, "alpha": 1.0, "targets": ["to_q"]}}, "teacher": "my-sd3"},
            'use it: pipeline.load_lora_weights("got"), where pipeline is that of my-sd3; got/README.md says how to '
            "sample it",
        ),
        ({}, {"num_classes": 5, "teacher": ""}, "use it: distill sample got --teacher TEACHER --classes 0 --out "
         "samples.png (TEACHER: the pipeline of its teacher; got/README.md has the code for diffusers)"),
    ],
)  # fmt: skip
def test_pull_says_how_to_use_a_student(capfd, tmp_path, monkeypatch, files, facts, said):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "student", PARTS if files is WHOLE else None, files, **facts)
    assert command(capfd, "pull", "student", "got").out.splitlines()[1] == said
