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
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    lr: Positive = Field(description="the whole rate, which the schedule changes")
    momentum: float = Field(0.9, ge=0, lt=1, description="share of the last step that is kept")
    nesterov: bool = Field(False, description="Nesterov's momentum")
    weight_decay: float = Field(5e-4, ge=0, description="added to the gradient, times the weight")


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(ParameterGroups):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    name: Literal["adamw"]
    lr: Positive = Field(description="the whole rate, which the schedule changes")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of the averages of gradients, and of squares")
    eps: float = Field(1e-8, ge=0, exclude_if=lambda eps: eps == 1e-8, description="added to the root of the squares")
    weight_decay: float = Field(0.05, ge=0, description="of the weight itself, times the rate")


WARMUP = "epochs in which the rate grows from 0"


class Step(Strict):
    """Multiply the rate by `gamma` after each milestone (epochs that are over)."""

    name: Literal["step"]
    milestones: list[int] = Field(description="epochs")
    gamma: Positive = Field(0.1, description="what the rate is multiplied by")
    warmup_epochs: float = Field(0, ge=0, description=WARMUP)


class Cosine(Strict):
    """From the full rate to `final_fraction` of it along half a cosine."""

    name: Literal["cosine"]
    final_fraction: float = Field(0, ge=0, le=1, description="of the rate, at the end")
    warmup_epochs: float = Field(0, ge=0, description=WARMUP)


class EMA(Strict):
    """Exponential moving average of the weights, evaluated and saved beside them."""

    decay: float = Field(0.9999, ge=0, lt=1, description="share of the average that a step keeps")
    warmup: bool = Field(True, description="the decay of step n is at most (1 + n) / (10 + n)")


class Every(Strict):
    """Weights of every n-th epoch."""

    every: Count = Field(description="epochs")


Residence = Literal["auto", "always", "never"]


class Training(Strict):
    """How a network is trained."""

    epochs: Count = Field(description="each shows every sample once, in one of its views")
    batch_size: int = Field(64, ge=2, lt=2**31, description="of all ranks together, where torchrun starts several")
    optimizer: Annotated[SGD | AdamW, Field(discriminator="name")] = Field(description="what makes a step of gradients")
    schedule: Annotated[Step | Cosine, Field(discriminator="name")] = Field(description="of the rate")
    label_smoothing: float = Field(0, ge=0, lt=1, description="of cross-entropy on labels, the term `ce`")
    views_per_decode: Count = Field(
        1, description="views shown of an image once it is decoded; so many epochs pass at once"
    )
    checkpoint_steps: Count | None = Field(None, description="save every so many steps, beside every epoch's end")
    amp: Literal[False, True, "bfloat16", "float16"] = Field(
        False,
        description="autocast of the student, true: bfloat16; helps on GPUs with tensor cores. float16 scales the loss",
    )
    evaluate_every: Count = Field(
        1,
        exclude_if=lambda epochs: epochs == 1,
        description="epochs between evaluations; the last is evaluated always",
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
    ema: EMA | None = Field(None, exclude_if=is_unused, description="a moving average of the weights, beside them")
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
