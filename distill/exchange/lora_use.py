"""How other people load the files of a LoRA student. Its README and `distill pull` show these lines.

`students.lora_program`, which proves the files, makes the same calls.
"""

from collections.abc import Collection

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT; only for classes to which diffusers cannot add a LoRA
FIRST_FILE, SECOND_FILE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"
LORA_FILES = (FIRST_FILE, SECOND_FILE, "adapter_model.safetensors", ADAPTER_CONFIG)


def calls(files: Collection[str], component: str, folder: str) -> list[str]:
    """The calls in Python that add a LoRA student to `pipeline`, the pipeline of its teacher in diffusers.

    files: the names of its files. component: the network's folder in the pipeline. folder: of the student.
    """
    if ADAPTER_CONFIG in files:
        return [f'peft.PeftModel.from_pretrained(pipeline.{component}, "{folder}")']
    first = f'pipeline.load_lora_weights("{folder}")'
    if SECOND_FILE not in files:
        return [first]
    second = f'pipeline.load_lora_weights("{folder}", weight_name="{SECOND_FILE}", load_into_transformer_2=True)'
    return [first, second] if FIRST_FILE in files else [second]
