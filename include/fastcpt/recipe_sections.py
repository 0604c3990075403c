"""The sections of a recipe: every key with its type, default, limits and description.

A section refuses unknown keys and values of another type. ``recipe`` combines the sections and reads them
from a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fastcpt.files import read_json

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Section(BaseModel):
    """A mapping of the recipe: no unknown keys, no silent conversions, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Fields(Section):
    """Dotted paths to a document's fields in its record."""

    id: str = "id"
    text: str = "full_text"
    title: str = "metadata.title"
    date: str = "metadata.date"
    doc_type: str = "metadata.doc_type"
    subject_matter: str = "metadata.subject_matter"
    language: str = "metadata.language"
    celex: str = "metadata.celex"
    work: str = "metadata.work"
    in_force: str = "metadata.in_force"
    directory_code: str = "metadata.directory_code"


class Replay(Section):
    """General documents mixed into the training shards, so that the model forgets less."""

    path: str = Field(description="Folder or URL of the general documents.")
    share: float = Field(0.03, gt=0.0, lt=1.0, description="Their share of the training tokens.")


class Documents(Section):
    path: str | None = Field(
        None, description="Folder (or fsspec URL) of JSON, JSONL (.gz, .zst) or Parquet documents."
    )
    fields: Fields = Fields()
    max_unreadable_share: float = Field(
        0.05,
        ge=0.0,
        le=1.0,
        description="Above this share of documents set aside as unreadable, scoring fails.",
    )
    max_record_mb: float = Field(
        256.0,
        gt=0.0,
        le=2000.0,
        description="Longer records (unpacked, in 10^6 bytes) are set aside, unread.",
    )
    replay: Replay | None = None


class Selection(Section):
    quality_threshold: float | None = Field(
        None, ge=0.0, le=1000.0, description="Documents that score lower are not taken."
    )
    top_share: Share | None = Field(
        None, description="Share of the corpus's tokens to take, from the best document down."
    )
    target_tokens: int | None = Field(
        None, ge=1_000, le=10**13, description="Token budget of the corpus."
    )
    max_document_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] | None = Field(
        "auto",
        description="Train on at most this many tokens of a document. auto: the number with which all "
        "documents fill top_share and target_tokens; null: fill them with the best documents, whole.",
    )
    min_characters: int = Field(0, ge=0, description="Shorter documents are not taken.")
    min_year: int | None = Field(
        None, ge=1900, le=2100, description="Older documents are not taken."
    )
    doc_types: list[str] | None = Field(None, description="Kinds of act to take; all if empty.")
    subjects: list[str] | None = Field(
        None, description="Take only documents whose subject matter or title names one of these."
    )
    near_duplicate_threshold: float = Field(
        0.7,
        ge=0.3,
        le=1.0,
        description="Jaccard similarity of 5-grams at which two documents are duplicates.",
    )


class Corpus(Section):
    max_seq_length: int = Field(3072, ge=64, le=131_072, description="Tokens of a sequence.")
    num_shards: int = Field(16, ge=1, le=1024, description="Parquet files of training sequences.")
    validation_share: float = Field(
        0.005,
        gt=0.0,
        le=0.5,
        description="Share of the kept documents held out, at random by work.",
    )
    newest_share: float = Field(
        0.0025, ge=0.0, le=0.5, description="Share of the kept documents held out, the newest acts."
    )
    validation_tokens: int = Field(
        500_000,
        ge=1000,
        description="At most this many tokens in each validation set.",
    )
    seed: int = 0


class Tokenizer(Section):
    path: str | None = Field(
        None, description="Folder or file of the tokenizer; the model's own if empty."
    )
    train_vocab_size: int | None = Field(
        None, ge=300, le=200_000, description="Train a BPE tokenizer of this size on the corpus."
    )

    @model_validator(mode="after")
    def one_source(self) -> Tokenizer:
        if self.path and self.train_vocab_size:
            raise ValueError("give either path or train_vocab_size, not both")
        return self


class Model(Section):
    name_or_path: str | None = Field(
        "meta-llama/Llama-3.1-70B-Instruct",
        description="Hub name or folder (on the cluster) of the base model, or a GGUF file here.",
    )
    config: dict[str, Any] | None = Field(
        None, description="A LlamaConfig to initialise at random, instead of a base model."
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto", description="auto uses the fastest that is installed, and logs it."
    )

    @field_validator("name_or_path")
    @classmethod
    def is_a_name(cls, name: str | None) -> str | None:
        if name is not None and (not name.isprintable() or name != name.strip() or not name):
            raise ValueError("not a hub name or folder: empty, or with line ends or outer blanks")
        return name

    @model_validator(mode="after")
    def one_source(self) -> Model:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("give exactly one of name_or_path and config")
        return self


OptimizerStates = Literal["float32", "bfloat16", "int8"]


class Training(Section):
    """One training's settings; the names are transformers' ``TrainingArguments``."""

    max_steps: int = Field(12_000, ge=1, le=10_000_000, description="Optimizer steps.")
    per_device_train_batch_size: int = Field(2, ge=1, le=1024, description="Micro-batch per GPU.")
    gradient_accumulation_steps: int = Field(16, ge=1, le=4096)
    learning_rate: float = Field(
        3e-5, gt=0.0, le=1.0, description="The highest rate, reached when the warm-up ends."
    )
    warmup_steps: int = Field(500, ge=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    weight_decay: float = Field(0.1, ge=0.0, le=1.0)
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-8, gt=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="auto: only as much as memory requires."
    )
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(500, ge=1)
    save_total_limit: int = Field(2, ge=1)
    seed: int = 0
    use_fp8: bool = Field(
        False, description="transformer-engine FP8 layers; needs Hopper or newer."
    )
    optimizer_states: OptimizerStates = Field(
        "float32",
        description="16 bytes per trained weight; bfloat16 8 and int8 6, without a float32 copy.",
    )
    time_budget_hours: float | None = Field(
        None,
        gt=0.0,
        le=1000.0,
        description="The decay begins so that training ends, decayed, inside these hours.",
    )
    skip_sigmas: float = Field(
        6.0,
        gt=0.0,
        description="Skip a step if its loss or gradient norm is this many standard deviations above "
        "the last 128 steps' mean.",
    )
    max_skipped_steps: int = Field(
        20, ge=0, description="Steps of 128 the guard may skip before the run ends."
    )
    deepspeed: str = Field("ds_config_zero3.json", description="DeepSpeed file of include/configs.")

    @field_validator("deepspeed")
    @classmethod
    def is_there(cls, name: str) -> str:
        if not (CONFIGS / name).is_file():
            there = ", ".join(sorted(path.name for path in CONFIGS.glob("ds_*.json")))
            raise ValueError(f"no such file in include/configs, which has {there}")
        return name

    @property
    def offloads(self) -> bool:
        """Whether the DeepSpeed file keeps the optimizer in the hosts' memory."""
        zero = read_json(CONFIGS / self.deepspeed).get("zero_optimization", {})
        return "offload_optimizer" in zero

    @model_validator(mode="after")
    def small_states_stay_on_the_gpu(self) -> Training:
        if self.optimizer_states != "float32" and self.offloads:
            raise ValueError(
                f"optimizer_states {self.optimizer_states} cannot be offloaded, DeepSpeed's CPU optimizer "
                f"does not round them: take float32, or a DeepSpeed file without offload_optimizer "
                f"in place of {self.deepspeed}"
            )
        return self

    @model_validator(mode="after")
    def warmup_is_shorter(self) -> Training:
        if self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below max_steps ({self.max_steps})"
            )
        return self


# it names a folder
AreaName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]{0,99}$")]


class Lora(Section):
    """Low-rank adapters; the names are peft's ``LoraConfig``."""

    r: int = Field(64, ge=1, le=1024)
    lora_alpha: int = Field(128, ge=1)
    lora_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    areas: dict[AreaName, Annotated[list[str], Field(min_length=1)]] = Field(
        default={},
        description="One adapter per legal area: its name and the subject matters it is trained on.",
    )

    @field_validator("areas")
    @classmethod
    def other_folders(cls, areas: dict[str, list[str]]) -> dict[str, list[str]]:
        known: dict[str, str] = {}
        for name in areas:
            if (other := known.setdefault(name.casefold(), name)) != name:
                raise ValueError(f"'{other}' and '{name}' are one folder on a Mac: rename one")
        return areas


class Evaluation(Section):
    questions: int = Field(
        100, ge=0, le=10_000, description="Questions of each kind made from held-out documents."
    )


class Gate(Section):
    perplexity_threshold: float = Field(
        18.0, gt=1.0, le=100_000.0, description="Validation perplexity below it goes on to SFT."
    )
    validation_set: Literal["random", "newest"] = "random"


class InstructionFields(Section):
    """Dotted paths to an instruction's parts in its record."""

    id: str = "id"
    title: str = "title"
    prompt: str | None = None
    response: str = "summary"


class Sft(Section):
    instructions: str | None = Field(
        None, description="JSONL (.gz, .zst) of instructions and answers for fine-tuning."
    )
    fields: InstructionFields = InstructionFields()
    prompt_template: str = Field(
        "Summarise the legal act: {title}",
        description="The prompt if the record has none; {title} and {id} are filled in.",
    )
    held_out: int = Field(64, ge=1, description="Instructions kept for evaluation.")
    max_new_tokens: int = Field(256, ge=1)
    training: Training = Training(max_steps=500, warmup_steps=20)


class Slurm(Section):
    account: str | None = None
    partition: str | None = None
    time_limit: str | None = Field(None, pattern=r"^(\d+-)?\d{1,3}(:\d{2}){0,2}$")
    extra_lines: list[str] = Field(default=[], description="More #SBATCH options, one per line.")


# a program and its arguments, run without a shell
Command = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class Rent(Section):
    """How a machine is rented for a run and given back (docs/rent.md).

    The commands run on this machine, in the project's folder, with JSON as input and output.
    """

    provider: Literal["command"] = "command"
    acquire: Command = Field(description="Rents a machine, or finds the one of the same key.")
    release: Command = Field(description="Gives it back; does nothing if it is gone.")
    status: Command = Field(description="Lists the machines of a key that still cost money.")
    keep_minutes: float = Field(
        0.0,
        ge=0.0,
        le=1440.0,
        description="How long to keep a failed run's machine, in case a step is cleared.",
    )
    orphan_hours: float = Field(
        6.0,
        gt=0.0,
        le=168.0,
        description="The machine ends itself if nobody asks for it for this long (docs/cluster.md).",
    )


class Cluster(Section):
    connection: str = Field(
        "gpu_cluster",
        pattern=r"^[A-Za-z0-9_.-]{1,200}$",
        description="Airflow connection (type GPU host) of the host that trains.",
    )
    root: str = Field(
        "fast_cpt",
        pattern=r"^[A-Za-z0-9_./~-]+$",
        description="Folder of this project there; relative to the login's home.",
    )
    gpus: int = Field(4, ge=1, le=4096, description="GPUs the training uses, over all hosts.")
    gpu: str | None = Field(
        "B200", description="Their name, for a plan before the cluster is checked."
    )
    hosts: list[str] = Field(default=[], description="More hosts of the training, by SSH name.")
    launcher: Literal["process", "slurm"] = "process"
    slurm: Slurm = Slurm()
    python: str | None = Field(
        None, description="An interpreter there with the pinned packages; built if empty."
    )
    min_free_gb: float = Field(50.0, ge=0.0, description="Free disk the run needs there.")
    cpu_only: bool = Field(False, description="Train on CPUs, to try the pipeline.")
    rent: Rent | None = Field(None, description="Rent the host when the corpus is ready.")

    @model_validator(mode="after")
    def one_machine_is_rented(self) -> Cluster:
        if self.rent and (self.hosts or self.launcher == "slurm"):
            raise ValueError("rent is for one machine: no hosts beside it, and no Slurm")
        return self


class Checkpoints(Section):
    """Copies of checkpoints off the GPU host (docs/reliability.md)."""

    bring_every_minutes: float | None = Field(
        None,
        gt=0.0,
        allow_inf_nan=False,
        description="Copy checkpoints here during training, so that the copy is never older; never if empty.",
    )
    to: str | None = Field(
        None,
        description="Folder here for it, or an fsspec URL, to which it is copied from here. "
        "FASTCPT_HOME/checkpoints if empty.",
    )


class Budget(Section):
    hours: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="The plan refuses to take longer."
    )
    money: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="The plan refuses to cost more (USD)."
    )
    price_per_gpu_hour: float | None = Field(
        None, ge=0.0, allow_inf_nan=False, description="USD; else planning's table."
    )
    max_passes: float = Field(
        4.0,
        gt=0.0,
        le=100_000.0,
        allow_inf_nan=False,
        description="The plan refuses to train more often on the same corpus.",
    )
    waiting_hours: float = Field(
        12.0,
        gt=0.0,
        allow_inf_nan=False,
        description="A step that waits longer for GPUs is reported (docs/notifications.md).",
    )


class Conditions(Section):
    """Further conditions, relative to the base model, for recommending a model; each may be empty."""

    improvement: float | None = Field(
        None, ge=0.0, le=8.0, description="At least this many bits per byte less on the gate's set."
    )
    tasks: float | None = Field(
        None, ge=-1.0, le=1.0, description="Share of correct answers higher by at least this."
    )
    forgotten: float | None = Field(
        None, ge=0.0, le=8.0, description="At most this many bits per byte more on general texts."
    )


class Publish(Section):
    destination: Literal["bring_back", "leave_on_cluster"] = "bring_back"
    margin: float = Field(
        0.002,
        ge=0.0,
        lt=1.0,
        description="The least share of the champion's bits per byte that a new champion must save.",
    )
    conditions: Conditions = Conditions()


class Claim(Section):
    """The published guide's claims about this recipe, shown beside the project's own figures."""

    hours: str
    cost: str
    quality: str
