"""Settings of the training of modules. All are stored in `module_config.json`."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK, Stack
from variator_export.training.settings import Losses, Weight

Granularity = Annotated[int, Field(ge=2)]
Share = Annotated[float, Field(gt=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModuleShape(_Part):
    """The modules to train from scratch.

    Attributes:
        granularities: The numbers of layers that a module of the encoder replaces; the groups of each begin
            at layer 0.
        decoder_granularities: The same of the decoder, of a backbone that generates text.
        start: The layer of its group that a module is a copy of: `first`, `middle` or `last`.
    """

    granularities: tuple[Granularity, ...] = ()
    decoder_granularities: tuple[Granularity, ...] = ()
    start: Literal["first", "middle", "last"] = "last"

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not self.granularities and not self.decoder_granularities:
            raise ValueError("there is no granularity")
        return self

    @property
    def sets(self) -> dict[str, tuple[Stack, int]]:
        """The stack and the granularity of each set of modules, by the name of its folder."""
        return {
            **{f"g{granularity}": (ENCODER_STACK, granularity) for granularity in self.granularities},
            **{
                f"decoder-g{granularity}": (DECODER_STACK, granularity)
                for granularity in self.decoder_granularities
            },
        }


class Replacing(_Part):
    """How many groups of layers are replaced by their modules in the steps of a run.

    Each step draws an assembly. From the first layer on, a module that begins there is taken with the
    probability p, each granularity equally likely; otherwise the original layer. p rises linearly
    (BERT-of-Theseus, arXiv 2002.02925, 3.2, whose curriculum ends at 1).

    Attributes:
        begin: p in the first step.
        end: p at the end of the rise, and from then on. Below 1, some original layers stay between modules to
            the last step, as they do in assemblies of both.
        rise: The share of the steps in which p rises.
    """

    begin: Share = 0.5
    end: Share = 0.9
    rise: Share = 0.5

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.begin > self.end:
            raise ValueError(f"begin {self.begin} is more than end {self.end}")
        return self

    def probability(self, step: int, steps: int) -> float:
        """p in a step, counted from 0, of a run."""
        share = min(1.0, step / max(1.0, self.rise * steps))
        return self.begin + (self.end - self.begin) * share


class ModuleLosses(Losses):
    """Weights of the terms of the loss; those of `Losses`, of which `layers` is at the end of each module.

    Attributes:
        attention: Kullback-Leibler divergence of each module's attention from that of the last layer that it
            replaces.
    """

    attention: Weight = 0.0
