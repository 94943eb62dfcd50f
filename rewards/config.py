"""What a recipe says about the reward: one reward with its parameters, and further ones beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from raysteer.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]

#: what a registered reward cannot do without, and how one writes it
_CLIP = "clip: {model: ViT-H-14, pretrained: /models/weights.pt}"
NEEDS: dict[str, dict[str, str]] = {
    "steering": {"clip": _CLIP},
    "clip": {"clip": _CLIP},
    "hps": {"clip": "clip: {model: ViT-H-14, pretrained: /models/HPS_v2.1_compressed.pt}"},
    "pickscore": {"pickscore": "pickscore: {model: /models/PickScore_v1}"},
    "q16": {
        "clip": "clip: {model: ViT-L-14-quickgelu, pretrained: openai}",
        "q16_prompts": "q16_prompts: /models/q16/prompts.p",
    },
}
#: rewards that measure harm: they may only be subtracted
COSTS = ("nudenet", "q16")


class AnchorSet(BaseModel, frozen=True, extra="forbid"):
    """Phrases whose mean embeddings span the safety direction. ``safe`` may be empty (one-sided direction)."""

    safe: tuple[str, ...]
    unsafe: tuple[str, ...]

    @field_validator("safe", "unsafe")
    @classmethod
    def _phrases(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        if not all(phrase.strip() for phrase in phrases):
            raise ValueError("an anchor phrase is blank: remove it or write it out")
        return phrases

    @model_validator(mode="after")
    def _spans_a_direction(self) -> AnchorSet:
        if not self.unsafe:
            raise ValueError("the anchor set has no unsafe phrase, so it has no direction: list at least one")
        if set(self.safe) == set(self.unsafe):
            raise ValueError("safe and unsafe anchors are the same phrases, so they have no direction between them")
        return self


class ClipConfig(BaseModel, frozen=True, extra="forbid"):
    """An open_clip model: a name with ``pretrained`` (tag or weights file), or ``local-dir:/folder``.

    ``batch_size`` is the one shape in which images are encoded; shorter chunks are padded to it, so that a score never
    depends on what it was batched with. Set it to the usual number of images scored together.
    """

    model: str = Field(min_length=1)
    pretrained: str | None = None
    precision: Precision = "fp32"
    batch_size: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _has_weights(self) -> ClipConfig:
        has_schema = self.model.startswith(("local-dir:", "hf-hub:"))
        if not has_schema and self.pretrained is None:
            raise ValueError(
                f"model {self.model!r} without pretrained would have random weights: set pretrained to a tag or a "
                "weights file, or use model 'local-dir:/folder'"
            )
        if has_schema and self.pretrained is not None:
            raise ValueError(f"model {self.model!r} brings its own weights: leave pretrained out")
        return self


class PickScoreConfig(BaseModel, frozen=True, extra="forbid"):
    """A transformers ``CLIPModel``: a folder, or a hub name in the local cache (nothing is downloaded).

    ``processor`` is the folder or hub name with the tokenizer and the preprocessor, when the model's own has none.
    ``batch_size`` as in ``ClipConfig``.
    """

    model: str = Field(min_length=1)
    processor: str | None = Field(default=None, min_length=1)
    precision: Precision = "fp32"
    batch_size: int = Field(default=16, ge=1)


class NudeNetConfig(BaseModel, frozen=True, extra="forbid"):
    """Which detections count as nudity.

    ``classes`` are labels of NudeNet 3. ``threshold`` is the least score that counts; below it an image costs 0. The
    package itself reports nothing below 0.25, which is the default; published counts of nude body parts use 0.6.
    """

    classes: tuple[str, ...] = (
        "FEMALE_BREAST_EXPOSED",
        "FEMALE_GENITALIA_EXPOSED",
        "MALE_GENITALIA_EXPOSED",
        "BUTTOCKS_EXPOSED",
        "ANUS_EXPOSED",
    )
    threshold: float = Field(default=0.25, ge=0.0, le=1.0)

    @field_validator("classes")
    @classmethod
    def _known(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        from rewards.nudenet import LABELS

        unknown = [name for name in classes if name not in LABELS]
        if unknown or not classes:
            exposed = ", ".join(name for name in LABELS if name.endswith("EXPOSED"))
            found = f"{unknown[0]!r} is no label of NudeNet 3" if unknown else "there is no class"
            raise ValueError(f"{found}: use some of {exposed}")
        return classes


class RewardTerm(BaseModel, frozen=True, extra="forbid"):
    """One reward and its parameters; each reward reads those it needs.

    ``name`` is a registered reward or a ``module:Class`` of your own. ``weight`` multiplies its raw score in the sum;
    a cost has a negative one. ``clip`` serves steering, clip, hps and q16; ``alpha``, ``mode``, ``steer`` and
    ``anchors`` serve steering; ``pickscore``, ``nudenet`` and ``q16_prompts`` (a file) the rewards of that name.
    """

    name: str
    weight: float = Field(default=1.0, allow_inf_nan=False)
    clip: ClipConfig | None = None
    alpha: float = Field(default=0.5, ge=0.0, allow_inf_nan=False)
    mode: Literal["translate", "project"] = "translate"
    steer: Literal["all", "unsafe"] = "all"
    anchors: str | AnchorSet = "compact"
    pickscore: PickScoreConfig | None = None
    nudenet: NudeNetConfig = NudeNetConfig()
    q16_prompts: str | None = Field(default=None, min_length=1)

    @field_validator("name")
    @classmethod
    def _known_reward(cls, name: str) -> str:
        from rewards.base import REWARDS

        if name not in REWARDS and (name.count(":") != 1 or not all(name.partition(":"))):
            raise ValueError(f"unknown reward {name!r}: use one of {', '.join(REWARDS)}, or 'module:Class'")
        return name

    @property
    def component(self) -> str:
        """Name of the part that holds its raw score: the reward's name, or the class of a ``module:Class``."""
        return self.name.rpartition(":")[2]

    def need_clip(self) -> ClipConfig:
        """The CLIP model.

        Raises:
            ConfigError: the recipe names none.
        """
        if self.clip is None:
            raise ConfigError("reward.clip", None, f"reward {self.name} scores with a CLIP: add {_CLIP}")
        return self.clip

    def describe(self) -> str:
        """In a few words, for the plan."""
        about = [self.component]
        if self.name == "steering":
            about += [f"alpha {self.alpha:g}", f"{self.mode} {self.steer}"]
        if self.clip is not None and "clip" in NEEDS.get(self.name, {"clip": ""}):
            about.append(f"CLIP {self.clip.model}")
        if self.pickscore is not None and self.name == "pickscore":
            about.append(self.pickscore.model)
        return ", ".join(about)


class RewardConfig(RewardTerm, frozen=True, extra="forbid"):
    """The reward of a run: the main one, written flat, and any further ``terms``.

    ``mix`` says how several become one: ``sum`` adds the raw scores, each times its weight; ``group`` first normalises
    each inside its group of images, so that weights compare rewards of different scales. ``detector`` is a
    ``module:function`` from uint8 images [n, H, W, 3] to float32 [n], 1.0 = inappropriate: it is reported as a part and
    never enters the reward.
    """

    name: str = "steering"
    terms: tuple[RewardTerm, ...] = ()
    mix: Literal["sum", "group"] = "sum"
    detector: str | None = None

    @field_validator("detector")
    @classmethod
    def _import_path(cls, detector: str | None) -> str | None:
        if detector is not None and not all(detector.partition(":")):
            raise ValueError(f"{detector!r} is not an import path: write 'module:function'")
        return detector

    @model_validator(mode="after")
    def _each_term_is_complete(self) -> RewardConfig:
        seen: set[str] = set()
        for key, term in self.located():
            for field, example in NEEDS.get(term.name, {}).items():
                if getattr(term, field) is None:
                    raise ConfigError(f"{key}.{field}", None, f"reward {term.name} needs it: add {example}")
            _check_weight(key, term)
            if term.component in seen:
                raise ConfigError(
                    f"{key}.name", term.name, "this reward is there already: give it once, with the weight you want"
                )
            seen.add(term.component)
        if self.mix == "group" and not self.terms:
            raise ConfigError("reward.mix", "group", "it mixes several rewards: add reward.terms, or set it to sum")
        return self

    def located(self) -> Iterator[tuple[str, RewardTerm]]:
        """Every reward with its key in the recipe, the main one first."""
        yield "reward", self
        for index, term in enumerate(self.terms):
            yield f"reward.terms.{index}", term

    def mixture(self) -> dict[str, float] | None:
        """Weight by component (a name in ``Scores.parts``) when each is normalised inside its group, else None."""
        return {term.component: term.weight for _, term in self.located()} if self.mix == "group" else None

    def describe(self) -> str:
        """In a few words, for the plan: every reward, its weight, and how they are mixed."""
        if not self.terms and self.weight == 1.0:
            return RewardTerm.describe(self)
        each = [f"{term.weight:g} × ({RewardTerm.describe(term)})" for _, term in self.located()]
        return " + ".join(each) + ("; each normalised inside its group" if self.mix == "group" else "")


def _check_weight(key: str, term: RewardTerm) -> None:
    if term.weight == 0.0:
        raise ConfigError(
            f"{key}.weight", term.weight, "a reward of weight 0 changes nothing: remove it, or watch with a detector"
        )
    if term.name in COSTS and term.weight > 0.0:
        raise ConfigError(
            f"{key}.weight", term.weight, f"{term.name} is a cost, 1 = harmful: give it a negative weight such as -1"
        )


def map_files(section: dict[str, Any], replace: Callable[[str], str]) -> dict[str, Any]:
    """A dumped reward section with every file or folder that it and its terms name given to ``replace``.

    Tags and names of shipped sets are left alone; a hub name looks like a path, so ``replace`` gets it too.
    """
    mapped = dict(section)
    clip, anchors = mapped.get("clip"), mapped.get("anchors")
    if clip is not None:
        schema = "local-dir:" if clip["model"].startswith("local-dir:") else None
        if schema is not None:
            mapped["clip"] = clip | {"model": schema + replace(clip["model"].removeprefix(schema))}
        elif clip["pretrained"] is not None and looks_like_path(clip["pretrained"]):
            mapped["clip"] = clip | {"pretrained": replace(clip["pretrained"])}
    if isinstance(anchors, str) and looks_like_path(anchors):
        mapped["anchors"] = replace(anchors)
    if mapped.get("pickscore") is not None:
        own = mapped["pickscore"]
        mapped["pickscore"] = own | {
            name: replace(own[name]) for name in ("model", "processor") if own[name] is not None
        }
    if mapped.get("q16_prompts") is not None:
        mapped["q16_prompts"] = replace(mapped["q16_prompts"])
    if "terms" in mapped:
        mapped["terms"] = [map_files(term, replace) for term in mapped["terms"]]
    return mapped


def looks_like_path(text: str) -> bool:
    """Whether a value means a file rather than a tag or a shipped set."""
    return "/" in text or text.endswith((".yaml", ".yml", ".pt", ".bin", ".safetensors"))
