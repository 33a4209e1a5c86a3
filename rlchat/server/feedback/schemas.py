"""Requests and responses of `/feedback` and `/learning`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt, model_validator

from rlchat.server.schemas import FINGERPRINT, JUDGED_FILE, FileName, RatedReply


class FeedbackRequest(RatedReply):
    """A verdict on a response (none: withdraw it), or a corrected response."""

    verdict: Literal["good", "bad", "none"] | None = None
    correction: str | None = None
    client: Annotated[str, Field(max_length=64)] = Field(
        default="", description="The author of the verdict. A later verdict by the same client replaces an earlier one."
    )
    model: FileName | None = Field(default=None, description=JUDGED_FILE)

    @model_validator(mode="after")
    def _require_one(self) -> FeedbackRequest:
        if (self.verdict is None) == (self.correction is None):
            raise ValueError("expected either a verdict or a correction")
        return self


class FeedbackKept(BaseModel):
    """What became of a verdict."""

    kept: bool = Field(
        default=True, description="False: this client had no verdict on the response that it could take back."
    )


class Measures(BaseModel):
    """What the gate has measured of one model; null if it was not measured."""

    agrees: int | None = Field(default=None, description="Held-back verdicts that the model agrees with.")
    verdicts: int = Field(default=0, description="Held-back verdicts.")
    correct: int | None = Field(default=None, description="Correct controls.")
    controls: int = Field(default=0, description="Controls.")
    perplexity: float | None = Field(default=None, description="On held-out human replies.")


class LearningRound(BaseModel):
    """What came of one round of training."""

    version: int | None = Field(description="The number of the new version; null if it was rejected.")
    sentence: str
    remarks: list[str] = Field(description="What was left out, and what the gate did not measure, and why.")
    learned_from: str = Field(description="The verdicts that it used, with their kinds.")
    date: str
    verdicts: int = Field(description="The number of verdicts that it used.")
    before: Measures = Field(description="The version that was active before.")
    after: Measures = Field(description="The new version.")
    seconds: float


class LearningStatus(BaseModel):
    """Where learning from feedback stands."""

    on: bool = Field(description="Whether new verdicts start a round of training.")
    every: int = Field(description="The number of new verdicts that starts a round.")
    verdicts: int = Field(description="The number of verdicts that count.")
    new: int = Field(description="How many of them no round has used.")
    bad_lines: int = Field(description="Damaged lines of the feedback file, which are skipped.")
    others: int = Field(description="Verdicts on responses of other models, which do not count.")
    other_models: str = Field(description="The names of these models.")
    version: int = Field(description="The number of the active version; 0: the original model.")
    file: str = Field(description=FINGERPRINT.replace("generated the response", "generates new responses"))
    versions: list[int] = Field(description="The versions that can be rolled back to.")
    previous: int | None = Field(description="The version that was active before; null if there is none.")
    training_seconds: float | None = Field(description="Time of the round that runs now; null if none runs.")
    rounds: list[LearningRound] = Field(description="All rounds so far, the oldest first.")
    error: str | None = Field(description="Why the last round or swap failed; null after a success.")
    notices: list[str] = Field(
        description="What has happened to the files of the model and its versions, as sentences."
    )
    failures: int = Field(description="Rounds and swaps that have failed since the start, also for the same reason.")


class LearningSwitch(BaseModel):
    """Turns learning on or off."""

    on: StrictBool


class RollbackRequest(BaseModel):
    """The version to roll back to."""

    version: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None, description="Its number, 0 for the original model. Default: the version that was active before."
    )


def measures_of(figures: dict[str, Any]) -> Measures:
    """The known ones among ``figures``, which are from a file; a value of another type counts as not measured."""
    kinds: dict[str, Any] = {
        "agrees": int,
        "verdicts": int,
        "correct": int,
        "controls": int,
        "perplexity": (int, float),
    }
    return Measures(**{name: figures[name] for name, kind in kinds.items() if isinstance(figures.get(name), kind)})
