"""One YAML file -> one validated Recipe.

A recipe is everything a run depends on: which documents, how they are scored, selected and
packed, which model, how it is trained, when it is good enough, on which machines, and what it
may cost. Keys of the training section are transformers' own (``TrainingArguments``), keys of
the LoRA section are peft's (``LoraConfig``). Unknown keys are refused with the nearest right one
named, values out of range with their limits, each with its line in the file.

Knows neither Airflow nor torch: every room of the library may import this module.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastcpt.yaml_files import YamlError, read_yaml_lines

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULT_RECIPE = "cpt_config_fast"


class RecipeError(ValueError):
    """The recipe cannot be used; the message names file, line and key, and what to do."""


class Section(BaseModel):
    """A mapping of the recipe: no unknown keys, no silent conversions, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Fields(Section):
    """Where a document's facts are, as dotted paths into its record."""

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


class LegalWeights(Section):
    """Weights of the ``legal`` score; each component lies in 0..1 before it is weighted."""

    recency: float = 20.0
    kind_of_act: float = 20.0
    subject_matter: float = 20.0
    length: float = 10.0
    running_text: float = 15.0
    boilerplate: float = 5.0
    in_force: float = 5.0
    citations: float = 15.0
    language: float = 10.0


class Score(Section):
    method: Literal["legal", "published"] = Field(
        "legal", description="The project's own score, or the published one (docs/corpus.md)."
    )
    weights: LegalWeights = LegalWeights()
    subjects: dict[str, float] = Field(
        default={
            "data protection": 1.0,
            "consumer": 0.9,
            "environment": 0.7,
            "digital": 0.8,
            "information": 0.6,
            "competition": 0.6,
            "financial services": 0.6,
            "employment": 0.5,
            "public health": 0.5,
        },
        description="Subject matters that count, by whole words, each with a weight in 0..1.",
    )
    languages: list[str] = Field(default=["en"], description="Languages of full value.")


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
    min_characters: int = Field(0, ge=0, description="Shorter documents are not taken.")
    min_year: int | None = Field(
        None, ge=1900, le=2100, description="Older documents are not taken."
    )
    doc_types: list[str] | None = Field(None, description="Kinds of act to take; all where empty.")
    subjects: list[str] | None = Field(
        None, description="Take only documents whose subject matter or title names one of these."
    )
    near_duplicate_threshold: float = Field(
        0.7,
        ge=0.3,
        le=1.0,
        description="Jaccard similarity of 5-grams from which two documents are duplicates.",
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
        description="Most tokens of each validation set, where its share would be more.",
    )
    seed: int = 0


class Tokenizer(Section):
    path: str | None = Field(
        None, description="Folder or file of the tokenizer; the model's own where empty."
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
        "auto", description="auto takes the fastest that is installed, and logs it."
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


class Training(Section):
    """One training's settings; the names are transformers' ``TrainingArguments``."""

    max_steps: int = Field(12_000, ge=1, le=10_000_000, description="Optimizer steps.")
    per_device_train_batch_size: int = Field(2, ge=1, le=1024, description="Micro-batch a GPU.")
    gradient_accumulation_steps: int = Field(16, ge=1, le=4096)
    learning_rate: float = Field(3e-5, gt=0.0, le=1.0)
    warmup_steps: int = Field(500, ge=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    weight_decay: float = Field(0.1, ge=0.0, le=1.0)
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(1e-8, gt=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="auto: only as far as the memory needs it."
    )
    logging_steps: int = Field(10, ge=1)
    save_steps: int = Field(500, ge=1)
    save_total_limit: int = Field(2, ge=1)
    seed: int = 0
    use_fp8: bool = Field(
        False, description="transformer-engine FP8 layers; needs Hopper or newer."
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
        description="A step is skipped whose loss or gradient norm is this many standard deviations "
        "above the last 128.",
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
        description="One adapter a legal area: its name and the subject matters it is trained on.",
    )

    @field_validator("areas")
    @classmethod
    def other_folders(cls, areas: dict[str, list[str]]) -> dict[str, list[str]]:
        known: dict[str, str] = {}
        for name in areas:
            if (other := known.setdefault(name.casefold(), name)) != name:
                raise ValueError(f"'{other}' and '{name}' are one folder on a Mac: rename one")
        return areas


class Gate(Section):
    perplexity_threshold: float = Field(
        18.0, gt=1.0, le=100_000.0, description="Validation perplexity below it goes on to SFT."
    )
    validation_set: Literal["random", "newest"] = "random"


class InstructionFields(Section):
    """Where an instruction's parts are, as dotted paths into its record."""

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
        description="The prompt where the record has none; {title} and {id} are filled in.",
    )
    held_out: int = Field(64, ge=1, description="Instructions kept for evaluation.")
    max_new_tokens: int = Field(256, ge=1)
    training: Training = Training(max_steps=500, warmup_steps=20)


class Slurm(Section):
    account: str | None = None
    partition: str | None = None
    time_limit: str | None = Field(None, pattern=r"^(\d+-)?\d{1,3}(:\d{2}){0,2}$")
    extra_lines: list[str] = Field(default=[], description="More #SBATCH options, one a line.")


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
        "B200", description="Their name, for a plan before the cluster is seen."
    )
    hosts: list[str] = Field(default=[], description="More hosts of the training, by SSH name.")
    launcher: Literal["process", "slurm"] = "process"
    slurm: Slurm = Slurm()
    python: str | None = Field(
        None, description="An interpreter there that has the pinned packages; built where empty."
    )
    min_free_gb: float = Field(50.0, ge=0.0, description="Free disk the run needs there.")
    cpu_only: bool = Field(False, description="Train on CPUs: for trying the pipeline out.")


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


class Publish(Section):
    destination: Literal["bring_back", "leave_on_cluster"] = "bring_back"


class Claim(Section):
    """What the published guide says of this recipe; shown beside the product's own figures."""

    hours: str
    cost: str
    quality: str


class Recipe(Section):
    """A validated recipe.

    In the file, ``stage2`` and ``sft.training`` hold only what these trainings change in
    ``training``; here all three are whole.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")
    description: str = ""
    claim: Claim | None = None
    documents: Documents = Documents()
    score: Score = Score()
    selection: Selection = Selection()
    corpus: Corpus = Corpus()
    tokenizer: Tokenizer = Tokenizer()
    model: Model = Model()
    training: Training = Training()
    stage2: Training = Training(max_steps=30_000, learning_rate=1e-5)
    lora: Lora | None = None
    gate: Gate = Gate()
    sft: Sft = Sft()
    cluster: Cluster = Cluster()
    budget: Budget = Budget()
    publish: Publish = Publish()

    @property
    def global_batch_size(self) -> int:
        """Sequences of one optimizer step, over all GPUs."""
        training = self.training
        return (
            training.per_device_train_batch_size
            * training.gradient_accumulation_steps
            * self.cluster.gpus
        )

    def to_yaml(self) -> str:
        """The recipe with every default written out; ``load_recipe`` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def recipe_names() -> list[str]:
    """The recipes that come with the project, by file name without ``.yaml``."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name or by path; ``RecipeError`` where there is none."""
    for path in (CONFIGS / f"{name}.yaml", CONFIGS / name, Path(name)):
        if path.suffix in {".yaml", ".yml"} and path.is_file():
            return path
    close = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise RecipeError(f"no recipe '{name}'{hint} Recipes here: {', '.join(recipe_names())}.")


def load_recipe(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    ``name`` is a recipe's name or a path to its YAML file. ``overrides`` maps dotted keys
    (``"selection.quality_threshold"``) to values that replace the file's. Raises ``RecipeError``
    that lists every problem with file, line and key.
    """
    path = find_recipe(str(name))
    try:
        content, lines = read_yaml_lines(path)
    except YamlError as error:
        raise RecipeError(str(error)) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path.name}: a recipe is a mapping of sections, this file is not")
    content.setdefault("name", path.stem)
    for key, value in (overrides or {}).items():
        _put(content, key, value)
    whole = _with_inherited_training(content)
    if "training.max_steps" in (overrides or {}):
        whole["training"] = _with_short_warmup(whole["training"])
    try:
        return Recipe.model_validate(whole)
    except ValidationError as error:
        problems = [
            _problem(path.name, lines, item, set(overrides or {}))
            for item in error.errors()
            if not _is_inherited(item["loc"], content)
        ]
        raise RecipeError("\n".join(problems)) from error


def _with_inherited_training(content: dict[str, Any]) -> dict[str, Any]:
    """``stage2`` and ``sft.training`` with what they do not change taken from ``training``."""
    training = content.get("training")
    base = dict(training) if isinstance(training, dict) else {}
    # the budget is the first stage's alone, and an unknown key is reported where it stands
    inherited = Training.model_fields.keys() - {"time_budget_hours"}
    base = {key: value for key, value in base.items() if key in inherited}
    stage2 = content.get("stage2") or {}
    sft = content.get("sft") or {}
    if not isinstance(stage2, dict) or not isinstance(sft, dict):
        return content
    sft_training = sft.get("training") or {}
    if not isinstance(sft_training, dict):
        return content
    return {
        **content,
        "stage2": {**base, "max_steps": 30_000, "learning_rate": 1e-5, **stage2},
        "sft": {
            **sft,
            "training": {**base, "max_steps": 500, "warmup_steps": 20, **sft_training},
        },
    }


def _is_inherited(loc: tuple[int | str, ...], content: dict[str, Any]) -> bool:
    """Whether a wrong value of a later training came from ``training``, where it is reported."""
    for section in (("stage2",), ("sft", "training")):
        if loc[: len(section)] == section and len(loc) > len(section):
            given: Any = content
            for key in section:
                given = (given or {}).get(key)
            return loc[len(section)] not in (given or {})
    return False


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            inner = content[section] = {}
        content = inner
    content[last] = value


def _with_short_warmup(training: dict[str, Any]) -> dict[str, Any]:
    """The first stage's settings with a warm-up of a tenth of its steps at most.

    Who overrides the steps in the form has no field for it. The later stages keep theirs.
    """
    steps, warmup = training["max_steps"], training.get("warmup_steps", 500)
    if not (isinstance(steps, int) and isinstance(warmup, int)):
        return training
    return {**training, "warmup_steps": min(warmup, steps // 10)}


def _problem(
    file: str,
    lines: dict[tuple[str, ...], int],
    error: Any,
    overridden: set[str],
) -> str:
    keys = tuple(str(part) for part in error["loc"] if _is_key(part))
    dotted = ".".join(keys)
    line = next((lines[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in lines), None)
    where = f"{file}:{line}" if line and dotted not in overridden else file
    if dotted in overridden:
        where = "override"
    if error["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        close = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key '{dotted}'; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], (dict, BaseModel)) else f", not {error['input']!r}"
    return f"{where}: {dotted or 'recipe'}: {message}{given}"


def _is_key(part: object) -> bool:
    # pydantic puts the tried member of a union into the path of an error: not a key of the file
    return not (
        isinstance(part, str) and part in {"bool", "int", "float", "str", "literal['auto']"}
    )


def _known_keys(sections: tuple[str, ...]) -> list[str]:
    model: Any = Recipe
    for section in sections:
        annotation = model.model_fields[section].annotation
        members = [annotation, *get_args(annotation)]
        model = next(
            member for member in members if isinstance(member, type) and issubclass(member, Section)
        )
    return list(model.model_fields)


# What the trigger form can override: the form's name of a value and its key in the recipe.
FORM = {
    "documents": "documents.path",
    "instructions": "sft.instructions",
    "tokenizer": "tokenizer.path",
    "target_tokens": "selection.target_tokens",
    "quality_threshold": "selection.quality_threshold",
    "max_seq_length": "corpus.max_seq_length",
    "num_shards": "corpus.num_shards",
    "max_steps": "training.max_steps",
    "gpus": "cluster.gpus",
    "perplexity_threshold": "gate.perplexity_threshold",
    "use_fp8": "training.use_fp8",
    "connection": "cluster.connection",
}


def form_schema(name: str) -> dict[str, Any]:
    """JSON schema of one of ``FORM``'s values: the recipe's own type, limits and description.

    ``null`` stands for "as the recipe says". The description tells numbers' limits in words.
    """
    *sections, field = FORM[name].split(".")
    model: Any = Recipe
    for section in sections:
        model = model.model_fields[section].annotation
    schema = model.model_json_schema()["properties"][field]
    typed = next((s for s in schema.get("anyOf", []) if s.get("type") != "null"), schema)
    limits = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "pattern"}
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    told = [f"{word} {typed[key]:,.15g}" for key, word in words.items() if key in typed]
    return {
        "type": [typed["type"], "null"],
        "description": f"{schema.get('description', '')} {', '.join(told).capitalize()}.".removesuffix(
            " ."
        ),
        **{key: typed[key] for key in limits & typed.keys()},
    }


def form_overrides(values: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of ``load_recipe`` for the trigger form's values; empty ones are left out.

    A tokenizer given in the form takes the place of training one.
    """
    overrides = {
        FORM[name]: value
        for name, value in values.items()
        if name in FORM and value not in (None, "")
    }
    if "tokenizer.path" in overrides:
        overrides["tokenizer.train_vocab_size"] = None
    return overrides
