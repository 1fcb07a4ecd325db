"""Several models, several sets, each embedded once: in memory, and in the cache under what weights and data are.

A file of the cache that cannot be read counts as absent and is written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cloob.cache import Cache
from cloob.data.batch import Skip
from cloob.data.content import add_part, content_key
from cloob.errors import InputError, require
from cloob.evaluation.embed import (
    EmbedOptions,
    Encoder,
    ImageEmbeddings,
    PairEmbeddings,
    Progress,
    Reader,
    embed_images,
    embed_pairs,
)
from cloob.evaluation.measures.probe import Probe, ProbeOptions, fit_probe
from cloob.evaluation.measures.zeroshot import class_embeddings
from cloob.models.aligned import AlignedEncoder, FeatureMemory
from cloob.models.fingerprint import fingerprint, package_versions
from cloob.models.load import find_model_folder, load_model
from cloob.models.runs import ONNX_FILE
from cloob.models.tokenizer import describe
from cloob.objective import OBJECTIVES, make_objective

T = TypeVar("T")

_VERSION = "5"  # of what is kept and how it is computed; another number makes the files of the old one unused
_PAPER_BETA = 8.0


class Labelled(Reader, Protocol):
    """A set of labelled images; :class:`cloob.evaluation.sets.labelled.LabelledSet` is one."""

    @property
    def classnames(self) -> Sequence[str]:
        """C names; a label is an index into them."""

    @property
    def templates(self) -> Sequence[str]:
        """Prompts with ``{c}`` in the place of the class name."""

    @property
    def labels(self) -> Any:
        """(n,) integers, an array or a sequence."""


class LabelledEmbeddings(NamedTuple):
    """A labelled set through one model: n images, their (n,) int64 labels, and (C, D) class embeddings."""

    images: ImageEmbeddings
    labels: Tensor
    classes: Tensor


@dataclass(frozen=True)
class ModelFacts:
    """What evaluation reports of a model besides its numbers.

    Attributes:
        objective: Name of the family's member that it was trained with, None if unknown.
        settings: Its ``objective.json``; empty if unknown.
        inv_tau: τ⁻¹ of its objective, else of its ``logit_scale``, else CLIP's initial 1/0.07.
        beta: β of its objective if it retrieves and says so, else the paper's 8.
        fingerprint: Of :func:`cloob.models.fingerprint.fingerprint`; None if it has none.
    """

    objective: str | None
    settings: Mapping[str, Any]
    inv_tau: float
    beta: float
    fingerprint: str | None


class Embeddings:
    """The embeddings of all models and sets, computed on first use and kept, in the cache too if there is one.

    At most one of the models that are given by their source is held at a time, and none if the cache has everything.

    Args:
        models: Models by the name they have in results: loaded, or what ``load_model`` takes.
        options: How to embed; None takes the defaults.
        progress: Called with ("model: set", images done, images in all) after each batch.
        tower: Keep the image tower's features of labelled sets too, for :meth:`tower`.

    Raises:
        InputError: No models.
    """

    def __init__(
        self,
        models: Mapping[str, Encoder | str | Path],
        options: EmbedOptions | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        tower: bool = False,
    ) -> None:
        if not models:
            raise InputError("no model to evaluate")
        self.models = dict(models)
        self._options = options or EmbedOptions()
        self._progress = progress
        self._with_tower = tower
        self._loaded: tuple[str, Encoder] | None = None
        self._folders: dict[str, Path | None] = {}
        self._keys: dict[str, str | None] = {}
        self._facts: dict[str, ModelFacts] = {}
        self._memories: dict[str, FeatureMemory] = {}
        self._kept: dict[tuple[str, str, int], tuple[Reader, Any]] = {}

    def encoder(self, model: str) -> Encoder:
        """The model, loaded."""
        source = self.models[model]
        if not isinstance(source, str | Path):
            return source
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # let go of the other one first
            encoder = load_model(self._folder(model) or source, device=self._options.device)
            if isinstance(encoder, AlignedEncoder):
                self._remember(encoder)
            self._loaded = (model, encoder)
        return self._loaded[1]

    def facts(self, model: str) -> ModelFacts:
        """Objective, τ⁻¹, β and fingerprint of a model."""
        if model not in self._facts:

            def compute() -> _Stored:
                return _Stored({}, asdict(model_facts(self.encoder(model))))

            self._facts[model] = ModelFacts(**self._stored(model, "facts", lambda: "model", compute).facts)
        return self._facts[model]

    def labelled(self, model: str, data: Labelled) -> LabelledEmbeddings:
        """The images, labels and classes of a set through a model; InputError too if a label has no class."""

        def classes() -> _Stored:
            how = data.classnames, data.templates, self._options.batch_size
            return _Stored({"classes": class_embeddings(self.encoder(model), *how)}, {})

        def compute() -> LabelledEmbeddings:
            labels = _labels(data)
            words = str(len(data.classnames)), *data.classnames, *data.templates
            prompts = self._stored(model, "classes", lambda: _digest(*words), classes)
            images = self._images(model, data, self._with_tower)
            return LabelledEmbeddings(_restore(images), labels, prompts.tensors["classes"])

        return self._once("labelled", model, data, compute)

    def tower(self, model: str, data: Labelled) -> tuple[Tensor, Tensor]:
        """The (n, F) features of the image tower on a labelled set, for probes, and the (n,) labels."""
        labels = _labels(data)
        return self._images(model, data, True).tensors["tower"], labels

    def probe(self, model: str, train: Labelled, n_classes: int, options: ProbeOptions, seed: int) -> Probe:
        """A probe fitted on the tower's features of a set; errors as of ``tower`` and ``fit_probe``."""
        labels = _labels(train)

        def key() -> str:
            how = json.dumps([n_classes, seed, asdict(options) | {"seeds": None}, labels.tolist()])
            return _digest(self._content_key(train), how)

        def compute() -> _Stored:
            fitted = fit_probe(*self.tower(model, train), n_classes, options=options, seed=seed)
            facts = {name: value for name, value in fitted._asdict().items() if name != "weight"}
            return _Stored({"weight": fitted.weight}, facts)

        fit = self._stored(model, "probe", key, compute)
        return Probe(weight=fit.tensors["weight"], **fit.facts)

    def pairs(self, model: str, source: Reader) -> PairEmbeddings:
        """The images and captions of a source through a model; errors as of ``embed_pairs``."""

        def embed() -> _Stored:
            reports = self._report(model, source.name), self._report(model, f"{source.name}, texts")
            embedded = embed_pairs(self.encoder(model), source, self._options, *reports)
            return _store(embedded.images, texts=embedded.texts)

        def compute() -> PairEmbeddings:
            stored = self._stored(model, "captioned", lambda: self._content_key(source), embed)
            return PairEmbeddings(_restore(stored), stored.tensors["texts"])

        return self._once("pairs", model, source, compute)

    def reused(self) -> dict[str, tuple[int, int]]:
        """``images`` and ``texts`` -> how many features ``train align`` had kept, of how many that were asked for."""
        counts: dict[str, tuple[int, int]] = {}
        for memory in self._memories.values():
            taken, asked = counts.get(memory.kept, (0, 0))
            counts[memory.kept] = taken + memory.taken, asked + len(memory.asked)
        return {kept: found for kept, found in counts.items() if found[0]}

    def _remember(self, encoder: AlignedEncoder) -> None:
        """Gives a model what training kept of its frozen encoders, and what other models computed with equal ones."""
        keys, cache = encoder.encoder_keys(), self._options.cache
        for key, kept in zip(keys, ("images", "texts"), strict=True):
            if key not in self._memories:
                files = [] if cache is None else cache.named("features", f"-{key}-")
                self._memories[key] = FeatureMemory(files, kept, remember=len(self.models) > 1)
        encoder.memories = self._memories[keys[0]], self._memories[keys[1]]

    def _images(self, model: str, data: Labelled, tower: bool) -> _Stored:
        """The images of a labelled set, with the tower's features if they are wanted."""

        def embed() -> _Stored:
            report = self._report(model, data.name)
            return _store(embed_images(self.encoder(model), data, self._options, report, tower=tower))

        # A run with probes has left the embeddings too, which a run without them takes from there.
        kinds = ("images-tower",) if tower else ("images", "images-tower")
        return self._once(
            kinds[0], model, data, lambda: self._stored(model, kinds[0], lambda: self._content_key(data), embed, kinds)
        )

    def _once(self, kind: str, model: str, data: Reader, compute: Callable[[], T]) -> T:
        """What is computed once of a set, which is kept too, so that its id stays its own: two may have one name."""
        key = kind, model, id(data)
        if key not in self._kept:
            self._kept[key] = data, compute()
        value: T = self._kept[key][1]
        return value

    def _stored(
        self,
        model: str,
        kind: str,
        data_key: Callable[[], str],
        compute: Callable[[], _Stored],
        kinds: Sequence[str] = (),
    ) -> _Stored:
        """What the cache has as one of ``kinds``, else what ``compute`` gives, which it then has as ``kind``."""
        cache = self._options.cache
        model_key = None if cache is None else self._key(model)
        if cache is None or model_key is None:
            return compute()
        key = data_key()
        for name in kinds or (kind,):
            if (found := _load(cache, f"{model_key}/{name}-{key}.safetensors")) is not None:
                return found
        stored = compute()
        _save(cache, f"{model_key}/{kind}-{key}.safetensors", stored)
        return stored

    def _content_key(self, data: Reader) -> str:
        return self._once("content", "", data, lambda: content_key(data))

    def _report(self, model: str, name: str) -> Progress | None:
        call = self._progress
        return None if call is None else lambda done, total: call(f"{model}: {name}", done, total)

    def _key(self, model: str) -> str | None:
        """What the cache knows a model by; None for an encoder whose weights nobody can see."""
        if model not in self._keys:
            folder = self._folder(model)
            if folder is not None:
                self._keys[model] = folder_key(folder, self._options.device)
            else:
                self._keys[model] = _encoder_key(self.encoder(model), self._options.device)
        return self._keys[model]

    def _folder(self, model: str) -> Path | None:
        """The model folder, the same one even if a run goes on to write newer checkpoints; None for others."""
        if model not in self._folders:
            source = self.models[model]
            self._folders[model] = find_model_folder(source) if isinstance(source, str | Path) else None
        return self._folders[model]


def model_facts(encoder: Encoder) -> ModelFacts:
    """What is known of a loaded model; InputError if its settings are not readable."""
    settings: Mapping[str, Any] = getattr(encoder, "objective_config", None) or {}
    configs = {name: make_objective(name).config() for name in OBJECTIVES}
    members = {(config["contrast"], config["hopfield"]): name for name, config in configs.items()}
    scale = getattr(getattr(encoder, "model", None), "logit_scale", None)
    trained_scale = float(scale.detach().exp()) if isinstance(scale, Tensor) else 1 / 0.07
    try:
        objective = members.get((settings.get("contrast"), settings.get("hopfield")))
        inv_tau = float(settings.get("inv_tau", trained_scale))
        beta = float(settings.get("beta", _PAPER_BETA)) if settings.get("hopfield") else _PAPER_BETA
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the settings of its objective are not readable ({error})") from None
    own = isinstance(encoder, nn.Module) or hasattr(encoder, "fingerprint")
    return ModelFacts(objective, settings, inv_tau, beta, fingerprint(encoder) if own else None)


def folder_key(folder: Path, device: str | torch.device) -> str:
    """The key of a model folder or a file of weights: the bytes of its files, without loading it."""
    parts: list[str | bytes] = []
    if (folder / ONNX_FILE).is_file():
        parts += package_versions(("onnxruntime",))
    try:
        for path in [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                parts += [path.relative_to(folder).as_posix(), hashlib.file_digest(file, "sha256").digest()]
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    return _digest(*_place(device), *parts)


def _encoder_key(encoder: Encoder, device: str | torch.device) -> str | None:
    """The key of a loaded model: its weights, tokenizer and objective; None if it is no module."""
    if not isinstance(encoder, nn.Module):
        return None
    objective = json.dumps(getattr(encoder, "objective_config", None), sort_keys=True, default=str)
    tokenizer = describe(getattr(encoder, "tokenizer", None))
    return _digest(*_place(getattr(encoder, "device", device)), fingerprint(encoder), tokenizer, objective)


def _place(device: str | torch.device) -> list[str]:
    packages = ("torch", "open_clip_torch", "timm", "pillow")
    return [_VERSION, torch.device(device).type, *package_versions(packages)]


def _digest(*parts: str | bytes) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        add_part(state, part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return str(state.hexdigest())


class _Stored(NamedTuple):
    """What one file of the cache holds: tensors by name, and JSON-able values."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def _load(cache: Cache, name: str) -> _Stored | None:
    path = cache.find("embeddings", name)
    if path is None:
        return None
    library = require("safetensors", "train")
    try:
        with library.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            return _Stored(tensors, json.loads((file.metadata() or {})["facts"]))
    except (library.SafetensorError, OSError, KeyError, ValueError):
        return None


def _save(cache: Cache, name: str, stored: _Stored) -> None:
    tensors = {key: value.contiguous() for key, value in stored.tensors.items()}
    facts = json.dumps(stored.facts)  # escaped: a key may come from a file name that is not UTF-8
    cache.put("embeddings", name, require("safetensors.torch", "train").save(tensors, metadata={"facts": facts}))


def _store(images: ImageEmbeddings, **tensors: Tensor) -> _Stored:
    bad = [[skip.key, skip.reason, skip.detail] for skip in images.bad]
    tower = {} if images.tower is None else {"tower": images.tower}
    facts = {"keys": images.keys, "bad": bad, "captions": images.captions}
    return _Stored({"images": images.features, **tower, **tensors}, facts)


def _restore(stored: _Stored) -> ImageEmbeddings:
    bad = [Skip(*skip) for skip in stored.facts["bad"]]
    captions = tuple(map(tuple, stored.facts["captions"]))
    tower = stored.tensors.get("tower")
    return ImageEmbeddings(stored.tensors["images"], tuple(stored.facts["keys"]), bad, captions, tower)


def _labels(data: Labelled) -> Tensor:
    """(n,) int64 labels, checked."""
    labels = torch.tensor([int(label) for label in data.labels], dtype=torch.int64)
    classes = len(data.classnames)
    if labels.shape != (len(data),):
        raise InputError(f"{data.name}: {len(data)} images, but labels of shape {tuple(labels.shape)}")
    wrong = ((labels < 0) | (labels >= classes)).nonzero()[:, 0]
    if len(wrong):
        raise InputError(
            f"{data.name}: image {int(wrong[0])} has label {int(labels[wrong[0]])}, "
            f"but there are {classes} class names (labels 0 to {classes - 1})"
        )
    return labels
