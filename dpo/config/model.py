"""The settings of the policy that a run trains, and of adapters on it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from dpo.config.marks import BESIDE, OFF_THE_CARD, OWN, PLACE, marks
from dpo.config.ranges import check_range
from dpo.outcomes import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The policy that is trained, and by default the reference."""

    source: str = field(default="embedded:smollm2-135m-instruct", metadata=marks(PLACE))
    """The model to train: a Hugging Face hub id, a directory (a peft adapter too), a GGUF file, or
    embedded:smollm2-135m-instruct."""
    reference: str | None = field(default=None, metadata=marks(PLACE))
    """The frozen model that the policy is compared with, named like model.source; the policy as it starts,
    adapters included, when not given."""
    reference_store: str | None = field(default=None, metadata=marks(BESIDE, OFF_THE_CARD, OWN))
    """Directory in which the reference's log-probs are kept from run to run; reference/ in DPO_CACHE
    (~/.cache/dpo) when not given."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the activations. Trained parameters, softmax and sums of log-probs stay float32."""
    round_products: Literal["neither", "backward", "both"] | None = None
    """The passes in which products with the model's weights (not adapters') round their operands to bfloat16
    (they always sum in float32): neither; backward, which leaves losses exact; or both (with float32
    activations the output projection backward alone). When not given: both if model.compute_dtype is
    bfloat16, else neither."""
    remat: Literal["none", "dots", "full"] = "dots"
    """What of layers, attention's scores aside, the backward pass computes again instead of keeping it:
    nothing (none), all but what products and attention give (dots), or all but what attention gives (full,
    which takes the least memory and the most time)."""
    attention: Literal["auto", "plain", "blocked", "ranges", "splash", "cudnn"] = "auto"
    """The code that computes attention. auto is plain for models with ALiBi, else blocked on CPUs, ranges on
    GPUs and plain on TPUs. ranges and cudnn need a GPU (cudnn with bfloat16), splash needs a TPU."""
    log_prob_chunk: int = 1024
    """How many scored tokens of a device are compared with the vocabulary at once. Fewer take less memory:
    a chunk holds so many times the vocabulary's size in floats."""
    scan_unroll: int = 1
    """How many layers one pass of the loop over layers holds. More take longer to compile; on accelerators
    less is then copied between passes."""

    def __post_init__(self) -> None:
        check_range("model.log_prob_chunk", self.log_prob_chunk, low=1)
        check_range("model.scan_unroll", self.scan_unroll, low=1)
        if self.attention == "cudnn" and self.compute_dtype == "float32":
            raise UserError(
                "model.attention is cudnn with model.compute_dtype float32; allowed there: bfloat16, because "
                "cuDNN attends in half precision only"
            )
        if self.compute_dtype == "bfloat16" and self.round_products not in (None, "both"):
            raise UserError(
                f"model.round_products is {self.round_products} with model.compute_dtype bfloat16; allowed "
                "there: both, because operands that are bfloat16 already cannot be exact"
            )

    @property
    def forward_dtype(self) -> Literal["float32", "bfloat16"]:
        """The coarsest dtype that log-probs go through."""
        return "bfloat16" if self.round_products == "both" else self.compute_dtype


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank adapters on a frozen model instead of all its weights.

    LoRA is off unless lora.rank or lora.init is given.
    """

    rank: int | None = None
    """Rank of the adapters: a linear x W becomes x W + s (x A) B, with so many columns in A and rows in B.
    LoRA is off when neither rank nor init is given."""
    alpha: float | None = None
    """Sets the adapters' scale s = alpha / rank; twice the rank when not given."""
    target_modules: list[str] | str = "all-linear"
    """The linears that get an adapter, named as in peft: all-linear, a list of ends of names, or a regular
    expression."""
    use_rslora: bool = False
    """Make the adapters' scale s = alpha / sqrt(rank) (rsLoRA) instead of alpha / rank."""
    use_dora: bool = False
    """Train the length of every output's weights too (DoRA)."""
    init: str | None = field(default=None, metadata=marks(PLACE))
    """Directory of a peft adapter to start from; rank, alpha, modules and kind are the adapter's own."""
    base_name: str | None = field(default=None, metadata=marks(BESIDE))
    """The hub id or path that the written adapters name as their base; model.source when not given. peft
    opens neither a GGUF file nor embedded:NAME, so that these need another name."""
    merged: bool = field(default=True, metadata=marks(BESIDE))
    """Write the whole model with the adapters merged at the run's end too (export/), which is as large as the
    base in float32; otherwise the adapters alone (adapter/)."""
    base_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Dtype in which the matrices of the frozen model are held (with int8 its embeddings are bfloat16).
    What is small, such as norms, biases and adapters, is float32."""

    def __post_init__(self) -> None:
        check_range("lora.rank", self.rank, low=1)
        check_range("lora.alpha", self.alpha, above=0.0)
        if self.rank is not None and self.init is not None:
            raise UserError(
                f"lora.rank is {self.rank} and lora.init is {self.init!r}; allowed is one of "
                "them: an adapter has a rank"
            )
        if not self.target_modules:
            raise UserError("lora.target_modules is empty; allowed: all-linear, names, a regular expression")
        of_new = ["alpha", "target_modules", "use_rslora", "use_dora"]
        of_any = [] if self.is_on else ["base_dtype", "base_name", "merged"]
        defaults = {item.name: item.default for item in fields(self)}
        for name in [*of_new, *of_any] if self.rank is None else []:
            if getattr(self, name) != defaults[name]:
                reason = "LoRA is off" if self.init is None else "the adapter in lora.init has its own"
                where = "lora.rank" if name in of_new else "lora.rank or lora.init"
                raise UserError(
                    f"lora.{name} is {getattr(self, name)!r}, but {reason}; allowed where {where} is given"
                )

        if not self.merged and self.base_name is not None:
            raise UserError(
                f"lora.merged is false and lora.base_name is {self.base_name!r}; allowed is one of them, "
                "because the run's only policy has to name the weights that it was trained on; afterwards "
                "dpo export RUN --format adapter --base_name NAME writes it with another name"
            )

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained, and not the model."""
        return self.rank is not None or self.init is not None

    @property
    def is_all_there_is(self) -> bool:
        """Whether a run leaves its adapters and no model."""
        return self.is_on and not self.merged
