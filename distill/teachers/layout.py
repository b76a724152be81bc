"""The names of the files and folders of a diffusers checkpoint.

A checkpoint is a pipeline, whose folder has model_index.json and a folder for each component, or a single model.
"""

INDEX, CONFIG, STUDENT, SCHEDULER = "model_index.json", "config.json", "distill.json", "scheduler_config.json"
NETWORKS = ("unet", "transformer")  # components of a pipeline that are the network
SECOND = "transformer_2"  # a second network, for other times
VAES = ("vae", "vqvae")  # and those that are the autoencoder
ADAPTERS = "pytorch_lora_weights.safetensors"  # a LoRA, as diffusers names its file
LICENSED = "README.md"  # the model card, which names the licence
# Small files that are read of a pipeline or a model.
SMALL = (
    INDEX,
    CONFIG,
    STUDENT,
    LICENSED,
    *(f"{folder}/{CONFIG}" for folder in (*NETWORKS, SECOND, *VAES)),
    f"scheduler/{SCHEDULER}",
)
