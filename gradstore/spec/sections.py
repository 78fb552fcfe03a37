"""The tables of run.toml, as frozen values; those of [data], [cluster], [learn], [training] and [evaluate] are in files of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gradstore.errors import SpecError
from gradstore.spec.cluster import ClusterSection
from gradstore.spec.data import DataSection
from gradstore.spec.evaluation import EvaluateSection, TailPatchSection
from gradstore.spec.learning import LearnSection
from gradstore.spec.section import NAME, Section
from gradstore.spec.signal import SignalSection
from gradstore.spec.training import TrainingSection

LONE_MEMBER = "m0"
# The mean of all members; none of them has a dot in its name.
MEAN_MEMBER = "members.mean"
# Folders that a feature set has beside those of its members, so that no member can be called so.
SET_FOLDERS = ("inputs", "examples", "statistics", "blocks", "scales")
RESERVED_NAMES = {"kernel": "baseline", "learn": "unweighted"}


class RunSection(Section):
    """[run]: what the run is called, where its store is, and the seed that every random draw is derived from."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    store: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)


class MemberSection(Section):
    """[[model.members]]: one of several checkpoints whose contributions are added, and what it has otherwise than [model].

    ``eta`` is its weight in that sum: the learning rate at the checkpoint (TracInCP), or 1 / E for a mean over E models.
    ``options`` are those of [model.options] that it has otherwise, such as the timestep of a diffusion model.
    """

    name: str = Field(pattern=NAME)
    eta: float = 1.0
    source: str | None = None
    weights: str | None = None
    optimizer: str | None = None
    peft: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class ModelSection(Section):
    """[model]: which model, what is differentiated, and in what precision it is run.

    ``adapter`` is a name of ADAPTERS, or a user's own ``module:function``; ``options`` are the adapter's own keys.
    ``optimizer`` is a file with the state of an Adam optimizer: the features of training examples are then of the direction
    of its step, those of queries of the gradient.
    """

    adapter: str = "causal_lm"
    source: str = Field(min_length=1)
    output: str | None = None
    weights: str | None = None
    optimizer: str | None = None
    peft: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    config: str | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    options: dict[str, Any] = Field(default_factory=dict)
    members: list[MemberSection] = Field(default_factory=list)

    @property
    def etas(self) -> dict[str, float]:
        """Weight of every member by its name; of a lone model 1."""
        return {member.name: member.eta for member in self.members} or {LONE_MEMBER: 1.0}

    def of_member(self, name: str) -> ModelSection:
        """Return what [model] says of one member alone."""
        for member in self.members:
            if member.name == name:
                own = member.model_dump(exclude={"name", "eta", "options"}, exclude_none=True)
                options = {**self.options, **member.options}
                return self.model_copy(update={**own, "options": options, "members": []})
        assert name == LONE_MEMBER, f"[model] has no member {name}"
        return self

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        names = [member.name for member in self.members]
        if len(set(names)) < len(names):
            raise SpecError(f"model.members: found the names {', '.join(names)}; each member needs its own.")
        if taken := [name for name in names if name in SET_FOLDERS]:
            raise SpecError(
                f"model.members: found the name {taken[0]}, which is another folder's. Choose another name."
            )
        return self


class GroupsSection(Section):
    """[features.groups]: how parameters are partitioned into groups; the keys are those of `gradstore.groups.Grouping`."""

    rule: str = "module"
    patterns: dict[str, str] = Field(default_factory=dict)
    include: str = ".*"
    exclude: str = ""
    biases: bool = False
    norms: bool = False
    embeddings: bool = False
    output_head: bool = False
    max_skipped: float = Field(default=0.2, ge=0, le=1)


class FeaturesSection(Section):
    """[features]: groups, projection (a kind and its options) and how features are computed and stored."""

    groups: GroupsSection = GroupsSection()
    projection: dict[str, Any] = Field(default_factory=lambda: {"kind": "logra", "rank": 16})
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    compression: Literal["none", "blosc"] = "none"
    block_rows: int | None = Field(default=None, ge=1)
    token_budget: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(default="auto")
    covariances: bool = True
    max_invalid: float = Field(default=0.001, ge=0, lt=1)


class KernelSection(Section):
    """[kernel]: a kind and its options; ``name`` tells apart several kernels of one store.

    Of several members ``each`` has a kernel of its own features, or all have one, of the ``mean`` of their features
    (Journey-TRAK).
    """

    name: str = Field(default="block", pattern=NAME)
    kind: str = "block"
    members: Literal["each", "mean"] = "each"
    options: dict[str, Any] = Field(default_factory=dict)

    def of_member(self, name: str) -> str:
        """Return the name under which the kernel of a member is stored: its own, or that of the one kernel of all."""
        return name if self.members == "each" else MEAN_MEMBER

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, values: Any) -> Any:
        """Keys other than name, kind and members are the kind's options, checked when the kind is resolved."""
        if not isinstance(values, Mapping):
            return values
        own = {key: value for key, value in values.items() if key in ("name", "kind", "members")}
        rest = {key: value for key, value in values.items() if key not in own}
        if set(rest) == {"options"} and isinstance(rest["options"], Mapping):
            rest = dict(rest["options"])
        own.setdefault("name", own.get("kind", "block"))
        return {**own, "options": rest}

    def suffixes(self) -> dict[str, KernelSection]:
        """Return the kernels of a damping sweep, each of one damping and with a name of its own, by what that ends in.

        A ``damping`` that is a list sweeps: block becomes block_0p01, block_0p1 and so on, of the same spectra. One number
        is a sweep of one, without a suffix.
        """
        dampings = self.options.get("damping")
        if not isinstance(dampings, list | tuple):
            return {"": self}
        numbers = [value for value in dampings if isinstance(value, int | float) and not isinstance(value, bool)]
        if not numbers or len(numbers) < len(dampings) or len({*numbers}) < len(numbers):
            raise SpecError(
                f"kernel.damping: found {list(dampings)}; accepted: a number, or a list of different numbers to sweep."
            )
        found = {}
        for number in numbers:
            suffix = "_" + repr(float(number)).removesuffix(".0").replace(".", "p").replace("+", "")
            options = {**self.options, "damping": float(number)}
            found[suffix] = self.model_copy(update={"name": self.name + suffix, "options": options})
        return found


class ContributeSection(Section):
    """[contribute]: what is made of C[q, n, j], and how it is stored.

    ``mode`` is ``tensor`` (C itself), ``streamed`` (what the learner needs of C, without C, which is built again from features
    whenever it is read) or ``scores`` (S = sum_j w_j C alone, under uniform weights and those of ``weights``, if a name is
    given).
    """

    mode: Literal["tensor", "streamed", "scores"] = "tensor"
    dtype: Literal["float32", "float16"] = "float32"
    weights: str | None = Field(default=None, pattern=NAME)
    normalize: Literal["none", "cosine", "relatif"] = "none"
    second_moments: bool = True


class ScoreSection(Section):
    """[score]: how many proponents and opponents are kept per query, whether all scores are, and what they are compared with."""

    k: int = Field(default=10, ge=1)
    matrices: bool = False
    weights: list[Annotated[str, Field(pattern=NAME)]] = Field(default_factory=list)
    tail_patch: TailPatchSection = TailPatchSection()


class SketchSection(Section):
    """[sketch]: how much is kept of every row, and how surely the best rows are to be among the candidates.

    ``share`` is what the sketch should take of the features' bytes where ``rank`` is left to it. ``recall`` is what its
    candidates must reach of the exact answer on the learn queries, where their number is left to it.
    """

    rank: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(default="auto")
    share: float = Field(default=0.05, gt=0, le=1)
    candidates: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(default="auto")
    recall: float = Field(default=0.95, gt=0, le=1)


class RunSpec(Section):
    """All of run.toml."""

    run: RunSection
    model: ModelSection
    data: DataSection
    features: FeaturesSection = FeaturesSection()
    kernel: KernelSection = Field(default_factory=lambda: KernelSection(name="block"))
    contribute: ContributeSection = ContributeSection()
    learn: LearnSection = LearnSection()
    score: ScoreSection = ScoreSection()
    sketch: SketchSection = SketchSection()
    training: TrainingSection = TrainingSection()
    signal: SignalSection = SignalSection()
    evaluate: EvaluateSection = EvaluateSection()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="before")
    @classmethod
    def _as_they_are(cls, values: Any) -> Any:
        """Representations are kept as they are, unless another projection of them is asked for."""
        model = values.get("model") if isinstance(values, Mapping) else None
        if not isinstance(model, Mapping) or model.get("adapter") != "text_encoder":
            return values
        features = values.get("features", {})
        if not isinstance(features, Mapping) or "projection" in features:
            return values
        return {**values, "features": {**features, "projection": {"kind": "identity"}}}

    @model_validator(mode="after")
    def _check(self) -> RunSpec:
        self.data.ranges()
        self.kernel.suffixes()
        for section, reserved in RESERVED_NAMES.items():
            if getattr(self, section).name == reserved:
                raise SpecError(f"{section}.name: found {reserved!r}, which has another meaning. Choose another name.")
        if self.score.matrices and self.contribute.mode == "streamed":
            raise SpecError(
                'score.matrices: found true with contribute.mode = "streamed", which keeps no C to make them of; set '
                'contribute.mode = "tensor", or "scores", which makes them alone.'
            )
        if self.contribute.weights is not None and self.contribute.mode != "scores":
            raise SpecError(
                f'contribute.weights: found {self.contribute.weights!r} with mode = "{self.contribute.mode}"; C has no '
                'weights in it. Set contribute.mode = "scores", or leave contribute.weights out.'
            )
        self._refuse_score_weights()
        last = self.model.of_member([*self.model.etas][-1])
        for key, step in (("score", self.score.tail_patch), ("evaluate", self.evaluate.tail_patch)):
            if step is not None and step.optimizer == "saved" and last.optimizer is None:
                raise SpecError(
                    f'{key}.tail_patch.optimizer: found "saved", and model.optimizer names no file with the state of one. Name it, or '
                    'take a fresh "adamw" or "sgd".'
                )
        return self

    def _refuse_score_weights(self) -> None:
        if RESERVED_NAMES["learn"] in self.score.weights:
            raise SpecError(
                f"score.weights: found {RESERVED_NAMES['learn']!r}, by which rows are ranked anyway. Leave it out."
            )
        if self.score.weights and self.contribute.mode == "scores":
            raise SpecError(
                f'score.weights: found {", ".join(self.score.weights)} with contribute.mode = "scores", which keeps no C to rank '
                "by. Name one of them in contribute.weights, or set another contribute.mode."
            )

    def sweep(self) -> list[RunSpec]:
        """Return the runs of a damping sweep: as many as kernel.damping lists, each with a kernel and weights of its own."""
        return [
            self.model_copy(
                update={"kernel": kernel, "learn": self.learn.model_copy(update={"name": self.learn.name + suffix})}
            )
            for suffix, kernel in self.kernel.suffixes().items()
        ]

    def untrained(self) -> RunSpec:
        """Return the run as it is before there is a model: with [training] base in the place of its source, and no weights."""
        section = self.model.model_copy(update={"weights": None, "source": self.training.base or self.model.source})
        gone = {"weights": None} | ({} if self.training.base is None else {"source": None})
        members = [member.model_copy(update=gone) for member in section.members]
        return self.model_copy(update={"model": section.model_copy(update={"members": members})})

    def learn_targets(self) -> list[tuple[str, str]]:
        """Return what is learned: from which set of queries, and the name of the weights, those of an aspect ending in its own."""
        return [(name, self.learn.name + name.removeprefix("learn")) for name in self.data.learn_sets()]
