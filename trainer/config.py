"""Define every option of `python -m trainer.run`: name, type, default and meaning.

The sections are those of a YAML file; on the command line an option is `--section.option value`.
`trainer/config_rules.py` says which values go together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Metric = Literal["auto", "exact", "choice", "regex", "rules", "continuation", "logprob"]


@dataclass
class Source:
    """One file, folder or hub data set, read into chat records."""

    # JSON, JSONL, Parquet or CSV files, also compressed: one, a pattern, a folder of parts, or s3://, gs://, hf://, https://; a folder
    # written by `save_to_disk`; or a hub name
    path: str
    name: str | None = None  # in reports and logs; default: the file's stem
    format: Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"  # auto: inferred from the columns
    columns: dict[str, str] | None = None  # ours -> the file's, e.g. {prompt: question, completion: answer}
    split: str = "train"  # split of a hub data set, saved folder or folder of parts
    subset: str | None = None  # configuration name of a hub data set
    weight: float = 1.0  # times each sample is seen per epoch; 0.5 takes another half every epoch
    max_records: int | None = None  # keep the first n records


@dataclass
class Items:
    """One file of items with known answers, or of held-out text, and its metric."""

    path: str  # files, a folder or a hub name, as in data.train
    name: str | None = None  # in reports and logs; default: the file's stem
    # exact: the answer equals what is generated; choice: the likeliest of several; regex: what a pattern finds in both; rules: what is
    # generated keeps rules, as in IFEval; continuation: every token of the answer is the likeliest, as in LAMBADA; logprob: of text
    metric: Metric = "auto"  # auto: that of the section, and if that is auto too, inferred from the columns
    columns: dict[str, str] | None = None  # ours -> the file's: prompt, answer, choices, messages, text, rules, arguments, input...
    regex: str = ""  # a pattern with a group, searched in what is generated; default: that of the section
    answer_regex: str | None = None  # a pattern for the file's answers; default: `regex`; "" takes an answer as it is
    take: Literal["first", "last"] = "first"  # the match of the pattern that is compared
    ignore_case: bool = False  # compare without regard to case
    ignore_punctuation: bool = False  # compare without punctuation
    choice_by: Literal["sum", "characters", "tokens"] = "sum"  # compare the log-probs of choices, or those per character or token
    chat: bool = True  # render prompts with the chat template, if data.chat asks for it
    max_tokens: int | None = None  # longest answer, if generation.max_tokens names none; default: 256
    stop: list[str] = field(default_factory=list)  # texts that end an answer, beside those of generation.stop
    must_end: bool = False  # an answer that is cut off is wrong
    split: str = "train"  # split of a hub data set, saved folder or folder of parts
    subset: str | None = None  # configuration name of a hub data set
    max_records: int | None = None  # keep the first n items


@dataclass
class Data:
    """The training data, the eval set, and how chats become tokens."""

    train: str | list[str | Source] = field(default_factory=list)  # the domain: a path, or a list of paths and sources
    eval: str | list[str | Source] = field(default_factory=list)  # the eval set: its loss is measured during training; same forms
    eval_fraction: float = 0.0  # instead of `eval`: this share of the domain's records, which are then not trained on
    train_on: Literal["assistant", "last", "all"] = "assistant"  # supervised: every assistant turn, the last one, or every token
    max_length: int = 2048  # longest sample, in tokens
    on_overlong: Literal["error", "drop", "truncate", "split"] = "error"  # what to do with longer samples
    on_bad_row: Literal["error", "skip"] = "error"  # rows that are no chats, or that the template refuses: stop, or skip and count them
    same_role: Literal["keep", "join", "refuse"] = "keep"  # turns that follow one of their own role; keep: the template decides
    chat_template: str | None = None  # a Jinja file to use instead of the tokenizer's own template
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # keywords for the template, e.g. {enable_thinking: false}
    empty_reasoning: Literal["train", "mask"] = "train"  # reasoning without words that a template prints before an answer that has none
    # domain samples of every epoch from easy to hard: by tokens, or by their mean loss under the base, which reads them once before
    # training; replay stays mixed in evenly (trainer/data/curriculum.py). none: random order
    curriculum: Literal["none", "length", "loss"] = "none"
    num_proc: int = 0  # processes that tokenize; 0: one per core, at most 8
    cache_dir: str | None = None  # folder of tokenized data; default: the cache of `datasets`


@dataclass
class Replay:
    """General data that is mixed with the domain, so that the model keeps its abilities."""

    data: str | list[str | Source] = field(default_factory=list)  # a path, or a list of paths and sources
    ratio: float | None = None  # share of the mix that is replay, 0 <= ratio < 1; default: every replay sample once per epoch
    unit: Literal["samples", "tokens"] = "samples"  # `ratio` is a share of the samples, or of the tokens, of an epoch


@dataclass
class ReplaySearch:
    """Short probe runs that choose the least replay, and a KL weight, that hold forgetting.floor."""

    enabled: bool = False  # needs forgetting.general and forgetting.floor
    ratios: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.83])  # replay ratios to choose from, rising
    kl_weights: list[float] = field(default_factory=lambda: [0.0, 0.3, 1.0])  # weights of the KL to the base to choose from, rising
    probe_fraction: float = 0.25  # of the run's epochs that a probe trains for, with the whole learning-rate schedule


@dataclass
class Model:
    """Model, tokenizer, and how they are loaded."""

    path: str | None = None  # folder or hub name with config, tokenizer and safetensors weights
    config: str | None = None  # instead of `path`: a config.json (or its folder) of a model that starts from random weights
    tokenizer: str | None = None  # folder or hub name; default: the model's own
    new_tokens: str | list[str] = field(default_factory=list)  # to add, or a file with one a line; beside an adapter their rows train
    fused_kernels: bool = True  # use our fused layers if the model family is supported
    trust_remote_code: bool = False  # run Python code that comes with the model


@dataclass
class Lora:
    """Low-rank adapter, in PEFT's terms."""

    rank: int = 16  # of A and B
    alpha: float = 32.0  # the update is scaled by alpha / rank (rsLoRA: alpha / sqrt(rank))
    dropout: float = 0.0  # on the adapter's input
    # ends of names of linear layers, a regular expression, or all-linear: all of the text decoder but routers and layers narrower than
    # rank; or mlp-linear: those of them that are in an MLP
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] = field(default_factory=list)  # embedding or head (embed_tokens, lm_head) to train whole beside the adapter
    experts: bool = False  # adapt the weights of experts too, in mixtures of experts; they are most of such a model
    rslora: bool = False  # scale by alpha / sqrt(rank)
    dora: bool = False  # also train a magnitude of each output (DoRA)
    rank_pattern: dict[str, int] = field(default_factory=dict)  # ranks of layers by ends of names or regular expressions: {down_proj: 32}
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # their alphas, in the same form
    # how A and B start, in PEFT's names. default: A random, B = 0; olora (arXiv 2406.01775), pissa (2404.02948) and pissa_niter_4, a fast
    # one: from the weights of the base; eva (2410.07170): from the inputs of layers on the training data; loftq (2310.08659), for method
    # qlora: from what 4 bits lose of the weights, for which the dense checkpoint is in the host's memory for a while
    init: Literal["default", "gaussian", "olora", "pissa", "pissa_niter_4", "eva", "loftq"] = "default"
    path: str | None = None  # continue from this saved adapter instead of a new one

    @property
    def mutates_base(self) -> bool:
        """Return whether what the adapter starts with is taken out of the base's weights in memory."""
        return self.init in ("olora", "pissa", "pissa_niter_4")


@dataclass
class Quantization:
    """4-bit base of a QLoRA run: bitsandbytes' NF4 in blocks of 64 weights.

    A checkpoint that is in NF4 already stays as it is.
    """

    double_quant: bool = True  # keep the scales of blocks in 8 bits: 4.1 bits a weight instead of 4.5
    skip_modules: list[str] = field(default_factory=list)  # linear layers to keep dense, by the ends of their names; the head stays dense


@dataclass
class Retention:
    """Terms that keep the model near its base: the model before training, without any adapter."""

    kl_weight: float = 0.0  # weight of the KL to the base, in nats per token, added to the loss; 0: off; 0.3 is a good start
    kl_sources: Literal["replay", "domain", "all"] = "replay"  # the samples whose tokens the KL counts
    kl_positions: Literal["supervised", "all"] = "supervised"  # of those samples: the supervised tokens, or prompts too
    kl_direction: Literal["forward", "reverse", "js"] = "forward"  # KL(base || model), KL(model || base), Jensen-Shannon
    kl_mask_target: bool = False  # leave each supervised token out of both distributions: the KL of the alternatives alone
    kl_only: bool = False  # the samples that the KL counts have no loss of their own: the base is distilled, their words are not taught
    kl_reference: Literal["live", "cached"] = "live"  # the base runs in every step; or once, its hidden states cached in the run folder
    token_weighting: Literal["none", "dft", "eaft", "stm", "flow"] = "none"  # weights of tokens (trainer/retention/token_weighting.py)
    token_weighting_sources: Literal["domain", "all"] = "domain"  # the samples whose tokens are weighted
    stm_threshold: float = 2.5  # stm only: tokens of a higher perplexity under the base are masked
    l2_sp: float = 0.0  # trained weights decay by lr times this a step towards their start: the base's, or a new adapter's A and B = 0

    @property
    def caches_base(self) -> bool:
        """Return whether the KL reads the base's hidden states from a cache."""
        return self.kl_weight > 0 and self.kl_reference == "cached"


@dataclass
class OnPolicy:
    """Training on the model's own answers to the domain's prompts, in place of its chats' answers."""

    # sdft: the base, which reads the chat's answer as an example, teaches each token of the model's own answer (arXiv 2601.19897)
    method: Literal["none", "sdft"] = "none"
    every: int = 16  # steps between answers, which the model gives at temperature 1 to the prompts of the steps that follow
    max_tokens: int = 256  # of an answer
    # what the base reads in place of the last user turn, with {prompt} and {answer}: the turn, and the chat's answer to it
    prompt: str = ("{prompt}\n\nThis is an example for a response to the question:\n{answer}\n\n"
                   "Now answer with a response of your own, including the thinking process.")


@dataclass
class Forgetting:
    """Items with known answers that are scored during the run, and the accuracy that must remain."""

    general: str | list[str | Items] = field(default_factory=list)  # general items: what the base can do
    domain: str | list[str | Items] = field(default_factory=list)  # items of the domain, scored beside them
    metric: Metric = "auto"  # of item files that do not name theirs
    regex: str = ""  # of item files that do not name theirs, e.g. '#### (-?[\d,.]+)'
    max_tokens: int = 256  # of a generated answer
    every: int = 0  # steps between measurements; 0: only before the first step and after the last
    floor: float | None = None  # export the best measured state with at least this share of the base's general accuracy, e.g. 0.95
    patience: int = 3  # in the second half: stop after this many measurements in a row that miss the floor and do not improve; 0: never


@dataclass
class BatchSize:
    """Batch size, in tokens."""

    tokens_per_pack: int = 4096  # capacity of a pack: the tokens that a device holds at once
    tokens_per_step: int = 16384  # global batch size: capacity of one optimizer step, over all packs and ranks
    max_samples_per_pack: int = 1024  # at most


@dataclass
class Fsdp:
    """Sharding of weights, gradients and optimizer states over the ranks of torchrun, by FSDP2."""

    enabled: bool = False  # each rank keeps its part of every weight, and gathers a layer to compute it; off: each holds the whole model
    shard_size: int = 0  # ranks that share one model, such as those of a machine; the others replicate it (HSDP). 0: all
    reshard_after_forward: bool = True  # free a layer after its forward and gather it again in the backward; off: more memory, less traffic
    cpu_offload: bool = False  # keep the shards, their gradients and optimizer states in the host's memory, and update them there


@dataclass
class Optim:
    """AdamW and its learning rate schedule."""

    lr: float = 2e-4  # the peak learning rate
    # adamw_8bit (bitsandbytes): moments of matrices take 2 bytes a weight, not 8; adafactor (torch's, arXiv 1804.04235): almost none, and a
    # step moves a weight by a share of its own size, lr at most; muon (torch's, arXiv 2502.16982), for method full: orthogonal steps of the
    # matrices in layers, as large as AdamW's, and AdamW for embeddings, head, norms and biases
    name: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = "adamw"
    weight_decay: float = 0.0  # on matrices only, never on norms and biases
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.999  # decay of the second moment
    eps: float = 1e-8
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "wsd"] = "cosine"  # after the warm-up
    num_cycles: int = 1  # cosine_with_restarts only: times that the rate falls from its peak (arXiv 1608.03983)
    warmup_ratio: float = 0.03  # share of all steps in the linear warm-up, below 1
    warmup_steps: int = 0  # steps of the warm-up; above 0 they replace the share
    decay_ratio: float = 0.2  # wsd only: share of all steps in the final linear decay, below 1
    decay_steps: int = 0  # wsd only: steps of that decay; above 0 they replace the share
    min_lr_ratio: float = 0.1  # the schedule ends at lr times this; unused by `constant`
    loraplus_lr_ratio: float = 1.0  # LoRA+ (arXiv 2402.12354): B learns at lr times this, A at lr; the paper takes 16 with a lower lr
    ema_decay: float = 0.0  # above 0: what is evaluated and exported is a moving average of the weights, of which a step keeps this share
    neftune_noise_alpha: float = 0.0  # above 0: uniform noise on embeddings while training (NEFTune, arXiv 2310.05914); 5 is usual
    max_grad_norm: float = 1.0  # clip the gradient norm to this; 0: no clipping


@dataclass
class Eval:
    """Loss of the eval set during training, and answers that show what training changed."""

    every: int = 0  # steps between evaluations; 0: only at the end
    patience: int = 0  # stop after this many evaluations without a better loss, and keep the last weights; 0: never stop
    # prompts that base and tuned model answer greedily, side by side in the report: as many of the eval set (without one, domain items or
    # training rows) and as many general ones (items or replay rows). 0: none, as each costs four answers, seconds to minutes on a CPU
    show: int = 0


@dataclass
class Checkpoint:
    """Saved states, from which a run resumes bit for bit."""

    every: int = 0  # steps between checkpoints; 0: when a signal or an error stops the run, and before the export until it is whole
    keep: int = 2  # newest checkpoints kept


@dataclass
class Export:
    """The trained model's form, and where it goes."""

    format: Literal["adapter", "merged", "both"] = "adapter"  # what a LoRA or QLoRA run writes; merged: a whole, dense model
    check: bool = True  # reload what was exported with stock classes, and compare its log-probs with the trained model's
    push_to_hub: str | None = None  # name on the hub to upload the adapter to, or the model where there is no adapter; needs a login
    public: bool = False  # make that repository public if it is new; it is private by default
    gguf: Literal["none", "f32", "f16", "bf16", "q8_0", "q4_k_m"] = "none"  # also write the merged model as GGUF, by llama.cpp
    llama_cpp: str | None = None  # its folder; default: that of the variable LLAMA_CPP, or its programs on PATH


@dataclass
class Logging:
    """Logs of a run's figures; metrics.jsonl is always written."""

    every: int = 10  # steps between log lines; between them the host never waits for the device
    tensorboard: bool = True  # write tensorboard/
    wandb_project: str | None = None  # log to this Weights & Biases project (package wandb)
    trackio_project: str | None = None  # log to this project of trackio, a dashboard on this machine (package trackio)
    mlflow_experiment: str | None = None  # log to this experiment of MLflow, at MLFLOW_TRACKING_URI, else in ./mlflow.db (package mlflow)
    progress: bool = True  # show a progress bar on a terminal
    profile_steps: str | None = None  # FIRST-LAST, e.g. 20-25: find what makes the host wait in step 20, trace 21 to 25, write profile/


@dataclass
class Config:
    """Fine-tune a language model on chats: `python -m trainer.run --model.path M --data.train F.jsonl`."""

    output: str = "runs/latest"  # the run folder
    model: Model = field(default_factory=Model)
    method: Literal["lora", "qlora", "full"] = "lora"  # lora, or qlora on a 4-bit base (`quant` extra): an adapter; full: all weights
    lora: Lora = field(default_factory=Lora)
    quantization: Quantization = field(default_factory=Quantization)
    data: Data = field(default_factory=Data)
    replay: Replay = field(default_factory=Replay)
    replay_search: ReplaySearch = field(default_factory=ReplaySearch)
    retention: Retention = field(default_factory=Retention)
    on_policy: OnPolicy = field(default_factory=OnPolicy)
    forgetting: Forgetting = field(default_factory=Forgetting)
    batch: BatchSize = field(default_factory=BatchSize)
    fsdp: Fsdp = field(default_factory=Fsdp)
    optim: Optim = field(default_factory=Optim)
    router_aux_loss_coef: float = 0.0  # of mixtures of experts: weight of the routers' load-balancing loss, added to the loss; 0: off
    epochs: float = 1.0  # passes over the domain
    max_steps: int | None = None  # stop here even if epochs remain
    seed: int = 0  # of the adapter's weights, the order of samples, and dropout
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of computation; masters are fp32. auto: bf16 on a GPU that has it, else fp32
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # recompute layers in backward; selective: every second
    compile: bool = False  # torch.compile the decoder layers
    device: Literal["auto", "cuda", "cpu"] = "auto"
    export: Export = field(default_factory=Export)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    resume: Literal["auto", "never"] = "never"  # auto: from the newest checkpoint in the run folder, if there is one
    logging: Logging = field(default_factory=Logging)
    dry_run: bool = False  # check everything, print samples, packing and memory, and train nothing
