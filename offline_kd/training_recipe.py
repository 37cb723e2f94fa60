"""How a network is trained: the field `training` of recipes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from offline_kd.objectives.term import Positive
from offline_kd.support.strict import Count, Strict


def is_unused(value: object) -> bool:
    """An option that is not used is no part of what a recipe says: runs from before it existed go on."""
    return value is None or value is False or value == []


class ParameterGroups(Strict):
    """Parameters that are treated in another way than the rest."""

    no_decay: list[str] = Field(
        [],
        exclude_if=is_unused,
        description="parameters without weight decay: `bias`, `norm` (all of normalisation layers), or "
        "patterns such as '*pos_embed' of names in student.safetensors",
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        exclude_if=is_unused,
        description="the rate of a layer is this times that of the next one; timm's layers, of timm's networks",
    )


class SGD(ParameterGroups):
    name: Literal["sgd"]
    lr: Positive
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0)


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(ParameterGroups):
    name: Literal["adamw"]
    lr: Positive
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, ge=0, exclude_if=lambda eps: eps == 1e-8)
    weight_decay: float = Field(0.05, ge=0)


class Step(Strict):
    """Multiply the rate by `gamma` after each milestone (epochs that are over)."""

    name: Literal["step"]
    milestones: list[int]
    gamma: Positive = 0.1
    warmup_epochs: float = Field(0, ge=0)


class Cosine(Strict):
    """From the full rate to `final_fraction` of it along half a cosine."""

    name: Literal["cosine"]
    final_fraction: float = Field(0, ge=0, le=1)
    warmup_epochs: float = Field(0, ge=0)


class EMA(Strict):
    """Exponential moving average of the weights, evaluated and saved beside them."""

    decay: float = Field(0.9999, ge=0, lt=1)
    warmup: bool = Field(True, description="the decay of step n is at most (1 + n) / (10 + n)")


class Every(Strict):
    every: Count = Field(description="epochs")


Residence = Literal["auto", "always", "never"]


class Training(Strict):
    epochs: Count
    batch_size: int = Field(64, ge=2, lt=2**31, description="of all ranks together, where torchrun starts several")
    optimizer: Annotated[SGD | AdamW, Field(discriminator="name")]
    schedule: Annotated[Step | Cosine, Field(discriminator="name")]
    label_smoothing: float = Field(0, ge=0, lt=1)
    views_per_decode: Count = Field(
        1, description="views shown of an image once it is decoded; so many epochs pass at once"
    )
    checkpoint_steps: Count | None = Field(None, description="save every so many steps, beside every epoch's end")
    amp: Literal[False, True, "bfloat16", "float16"] = Field(
        False,
        description="autocast of the student, true: bfloat16; helps on GPUs with tensor cores. float16 scales the loss",
    )
    pool_blocks: Count = Field(16, description="tars whose rows are shuffled together")
    resident: Residence = Field(
        "auto",
        exclude_if=lambda residence: residence == "auto",
        description="keep images, views and targets on the device, and make the same batches there; auto: on a GPU, "
        "where images are copied and not resampled, if they fit into half of its free memory",
    )
    sync_batchnorm: bool = Field(
        False,
        description="under torchrun: BatchNorm over the batch of all ranks, as one process has it, instead of each "
        "rank's own rows; costs a message between ranks in every layer",
    )
    accumulate: Count = Field(
        1,
        exclude_if=lambda parts: parts == 1,
        description="parts of a batch that pass one after the other, to save memory",
    )
    clip_norm: Positive | None = Field(None, exclude_if=is_unused, description="largest norm of all gradients together")
    ema: EMA | None = Field(None, exclude_if=is_unused)
    train: Literal["all", "head"] = Field(
        "all",
        exclude_if=lambda part: part == "all",
        description="head: a linear probe. What does not depend on the number of classes stays as the weights to begin "
        "from are, with its statistics; KD layers train",
    )
    compile: Literal[False, True, "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = Field(
        False, exclude_if=is_unused, description="torch.compile of the student's steps, or the mode of that"
    )
    keep: list[Literal["best"] | Every] = Field(
        [],
        exclude_if=is_unused,
        description="weights beside those of the end: `best` on the evaluation split, `{every: 10}` epochs",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.accumulate > 1 and self.batch_size < 2 * self.accumulate:
            raise ValueError(
                f"accumulate is {self.accumulate}, batch_size {self.batch_size}: a part must have 2 rows at least"
            )
        for one in self.keep:
            if isinstance(one, Every) and one.every % self.views_per_decode:
                raise ValueError(
                    f"keep: every is {one.every}, views_per_decode {self.views_per_decode}: so many epochs pass at "
                    "once, so it must be a multiple of them"
                )
        return self
