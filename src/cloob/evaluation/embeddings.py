"""Several models, several sets, each embedded once: in memory, and in the cache under what weights and data are.

A file of the cache that cannot be read counts as absent and is written anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cloob.data.batch import Skip
from cloob.data.source import content_key, digest
from cloob.errors import InputError
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
from cloob.evaluation.measures import class_embeddings
from cloob.evaluation.probe import Probe, ProbeOptions, fit_probe
from cloob.family import member_name
from cloob.models.aligned.encoders import FeatureMemory
from cloob.models.load import find_model_folder, fingerprint, load_model, package_versions
from cloob.models.tokenizer import describe

T = TypeVar("T")

_VERSION = "6"  # of what is kept and how it is computed; another number makes the files of the old one unused
_PAPER_BETA = 8.0


class Labelled(Reader, Protocol):
    """A set of labelled images; :class:`cloob.evaluation.sets.labelled.LabelledSet` is one."""

    @property
    def classnames(self) -> Sequence[str]: ...  # C names; a label is an index into them

    @property
    def templates(self) -> Sequence[str]: ...  # prompts with ``{c}`` in the place of the class name

    @property
    def labels(self) -> Any: ...  # (n,) integers, an array or a sequence


class LabelledEmbeddings(NamedTuple):
    """A labelled set through one model: n images, their (n,) int64 labels, and (C, D) class embeddings."""

    images: ImageEmbeddings
    labels: Tensor
    classes: Tensor


@dataclass(frozen=True)
class ModelFacts:
    objective: str | None  # the member of the family that it was trained with, if known
    settings: Mapping[str, Any]  # its ``objective.json``
    inv_tau: float  # of its objective, else of its ``logit_scale``, else CLIP's initial 1/0.07
    beta: float  # of its objective if it retrieves, else the paper's
    fingerprint: str | None


_KEPT: list[Any] = [ImageEmbeddings, PairEmbeddings, ModelFacts, Probe, Skip]


class Embeddings:
    """The embeddings of all models and sets, computed on first use and kept, in the cache too if there is one.

    Of models given by their source at most one is loaded at a time, and none if the cache has everything.

    Args:
        models: Models by the name they have in results: loaded, or what ``load_model`` takes.
        options: How to embed; None takes the defaults.
        progress: Called with ("model: set", images done, images in all) after every batch.
        tower: Keep the image tower's features of labelled sets too, for :meth:`tower`.
    """

    def __init__(
        self,
        models: Mapping[str, Encoder | str | Path],
        options: EmbedOptions | None = None,
        *,
        progress: Callable[[str, int, int], None] | None = None,
        tower: bool = False,
    ) -> None:
        self.models = dict(models)
        self._options = options or EmbedOptions()
        self._progress = progress
        self._with_tower = tower
        self._loaded: tuple[str, Encoder] | None = None
        self._memories: dict[str, FeatureMemory] = {}
        self._known: dict[tuple[str, str, int], tuple[Any, Any]] = {}

    def encoder(self, model: str) -> Encoder:
        source = self.models[model]
        if not isinstance(source, str | Path):
            return source
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # let go of the other one first
            encoder: Any = load_model(self._folder(model) or source, device=self._options.device)
            if encoder.config.kind == "aligned":
                # Features that training kept of its frozen encoders, and that other models computed with equal ones.
                for key, kept in zip(encoder.encoder_keys(), ("images", "texts"), strict=True):
                    if key not in self._memories:
                        cache = self._options.cache
                        files = [] if cache is None else cache.named("features", f"-{key}-")
                        self._memories[key] = FeatureMemory(files, kept)
                images, texts = (self._memories[key] for key in encoder.encoder_keys())
                encoder.memories = images, texts
            self._loaded = (model, encoder)
        return self._loaded[1]

    def facts(self, model: str) -> ModelFacts:
        def read() -> ModelFacts:
            encoder = self.encoder(model)
            settings: Mapping[str, Any] = getattr(encoder, "objective_config", None) or {}
            objective = member_name(settings.get("contrast"), settings.get("hopfield")) or settings.get("closed_form")
            scale = getattr(getattr(encoder, "model", None), "logit_scale", None)
            trained_scale = float(scale.detach().exp()) if isinstance(scale, Tensor) else 1 / 0.07
            beta = settings.get("beta", _PAPER_BETA) if settings.get("hopfield") else _PAPER_BETA
            known = isinstance(encoder, nn.Module) or hasattr(encoder, "fingerprint")
            inv_tau = float(settings.get("inv_tau", trained_scale))
            return ModelFacts(objective, settings, inv_tau, float(beta), fingerprint(encoder) if known else None)

        return self._once("facts", model, None, read, lambda: "model")

    def labelled(self, model: str, data: Labelled) -> LabelledEmbeddings:
        """The images, labels and classes of a set through a model; InputError too if a label has no class."""
        labels, names = _labels(data), data.classnames

        def classes() -> Tensor:
            return class_embeddings(self.encoder(model), names, data.templates, self._options.batch_size)

        words = str(len(names)), *names, *data.templates
        prompts = self._once("classes", model, data, classes, lambda: digest(words))
        return LabelledEmbeddings(self._images(model, data, self._with_tower), labels, prompts)

    def tower(self, model: str, data: Labelled) -> tuple[Tensor, Tensor]:
        """The (n, F) features of the image tower on a labelled set, for probes, and the (n,) labels."""
        features = self._images(model, data, True).tower
        assert features is not None
        return features, _labels(data)

    def probe(self, model: str, train: Labelled, n_classes: int, options: ProbeOptions, seed: int) -> Probe:
        how = json.dumps([n_classes, seed, options.shots, _labels(train).tolist()])

        def fit() -> Probe:
            return fit_probe(*self.tower(model, train), n_classes, options=options, seed=seed)

        return self._once(f"probe-{digest([how])}", model, train, fit, lambda: self._content_key(train))

    def pairs(self, model: str, source: Reader) -> PairEmbeddings:
        def embed() -> PairEmbeddings:
            reports = self._report(model, source.name), self._report(model, f"{source.name}, texts")
            return embed_pairs(self.encoder(model), source, self._options, *reports)

        return self._once("captioned", model, source, embed, lambda: self._content_key(source))

    def _images(self, model: str, data: Labelled, tower: bool) -> ImageEmbeddings:
        def embed() -> ImageEmbeddings:
            report = self._report(model, data.name)
            return embed_images(self.encoder(model), data, self._options, report, tower=tower)

        def once(kind: str) -> ImageEmbeddings:
            return self._once(kind, model, data, embed, lambda: self._content_key(data))

        result = once("images")  # with the tower's features, if a run with probes was the first
        return once("images-tower") if tower and result.tower is None else result

    def _once(
        self, kind: str, model: str, data: Any, compute: Callable[[], T], key: Callable[[], str] | None = None
    ) -> T:
        """A value that is computed once of a model and a set; with a ``key`` of the set it is kept in the cache too."""
        known = kind, model, id(data)
        if known not in self._known:
            cache = None if key is None else self._options.cache
            model_key = None if cache is None else self._key(model)
            name = "" if key is None or model_key is None else f"{model_key}/{kind}-{key()}.pt"
            value: T | None = None
            if cache is not None and name and (path := cache.find("embeddings", name)) is not None:
                with (
                    contextlib.suppress(OSError, RuntimeError, EOFError, pickle.UnpicklingError),
                    torch.serialization.safe_globals(_KEPT),
                ):
                    value = torch.load(path, weights_only=True)
            if value is None:
                value = compute()
                if cache is not None and name:
                    stream = io.BytesIO()
                    torch.save(value, stream)
                    cache.put("embeddings", name, stream.getvalue())
            self._known[known] = data, value  # with the set, so that its id stays its own: two may have one name
        result: T = self._known[known][1]
        return result

    def _content_key(self, data: Reader) -> str:
        return self._once("content", "", data, lambda: content_key(data))

    def _report(self, model: str, name: str) -> Progress | None:
        call = self._progress
        return None if call is None else lambda done, total: call(f"{model}: {name}", done, total)

    def _key(self, model: str) -> str | None:
        """What the cache knows a model by; None for an encoder whose weights nobody can see."""

        def compute() -> str | None:
            folder, device = self._folder(model), self._options.device
            if folder is not None:
                return folder_key(folder, device)
            encoder = self.encoder(model)
            if not isinstance(encoder, nn.Module):
                return None
            objective = json.dumps(getattr(encoder, "objective_config", None), sort_keys=True, default=str)
            parts = fingerprint(encoder), describe(getattr(encoder, "tokenizer", None)), objective
            return digest([*_place(getattr(encoder, "device", device)), *parts])

        return self._once("key", model, None, compute)

    def _folder(self, model: str) -> Path | None:
        """The model folder, the same one even if a run goes on to write newer checkpoints; None for others."""
        source = self.models[model]
        return self._once(
            "folder", model, None, lambda: find_model_folder(source) if isinstance(source, str | Path) else None
        )


def folder_key(folder: Path, device: str | torch.device) -> str:
    """The key of a model folder or a file of weights: the bytes of its files, without loading it."""
    parts: list[str | bytes] = [*_place(device)]
    for path in [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            parts += [path.relative_to(folder).as_posix(), hashlib.file_digest(file, "sha256").digest()]
    return digest(parts)


def _place(device: str | torch.device) -> list[str]:
    packages = ("torch", "open_clip_torch", "timm", "pillow", "onnxruntime")
    return [_VERSION, torch.device(device).type, *package_versions(packages)]


def _labels(data: Labelled) -> Tensor:
    labels, n = [int(label) for label in data.labels], len(data.classnames)
    for image, label in enumerate(labels):
        if not 0 <= label < n:
            there = f"there are {n} class names (labels 0 to {n - 1})"
            raise InputError(f"{data.name}: image {image} has label {label}, but {there}")
    return torch.tensor(labels, dtype=torch.int64)
