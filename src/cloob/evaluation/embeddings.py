"""Several models, several sets, embedded once: kept in memory, and in the cache by the
content of weights and data.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from cloob.evaluation.probe import Probe, fit_probe
from cloob.family import member_name
from cloob.models.aligned.encoders import FeatureMemory
from cloob.models.load import (
    find_model_folder,
    fingerprint,
    load_model,
    package_versions,
)

T = TypeVar("T")

# of what is kept and how it is computed; another number makes the files of the old one
# unused
_VERSION = "7"
_PAPER_BETA = 8.0


class Labelled(Reader, Protocol):
    """A set of labelled images; :class:`cloob.evaluation.sets.pictures.LabelledSet` is
    one.
    """

    @property
    def classnames(self) -> Sequence[str]: ...  # C names; a label is an index into them

    @property
    def templates(
        self,
    ) -> Sequence[str]: ...  # prompts with ``{c}`` in the place of the class name

    @property
    def labels(self) -> Any: ...  # (n,) integers, an array or a sequence


class LabelledEmbeddings(NamedTuple):
    """A labelled set through one model: n images, their (n,) int64 labels, and (C, D)
    class embeddings.
    """

    images: ImageEmbeddings
    labels: Tensor
    classes: Tensor


@dataclass(frozen=True)
class ModelTraits:
    objective: str | None  # the member of the family that it was trained with, if known
    settings: Mapping[str, Any]  # its ``objective.json``
    # of its objective, else of its ``logit_scale``, else CLIP's initial 1/0.07
    inv_tau: float
    beta: float  # of its objective if it retrieves, else the paper's
    fingerprint: str | None


_KEPT: list[Any] = [ImageEmbeddings, PairEmbeddings, ModelTraits, Probe, Skip]


class Embeddings:
    """The embeddings of all models and sets, computed on first use and kept, in the
    cache too if there is one.

    Of models given by their source at most one is loaded at a time, and none if the
    cache has everything.

    Args:
        models: Models by the name they have in results: loaded, or what ``load_model``
            takes.
        options: How to embed.
        progress: Called with ("model: set", images done, images in all) after every
            batch.
        tower: Keep the image tower's features of labelled sets too.
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
        self._folders: dict[str, Path | None] = {}
        self._keys: dict[str, str | None] = {}
        self._contents: dict[
            int, tuple[Reader, str]
        ] = {}  # with the set, so that its id stays unique
        self._values: dict[
            tuple[str, str, int], tuple[Any, Any]
        ] = {}  # likewise: two sets may have one name

    def encoder(self, model: str) -> Encoder:
        """The encoder of a model; the last one stays loaded."""
        source = self.models[model]
        if not isinstance(source, str | Path):
            return source
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # frees the other one first
            encoder: Any = load_model(
                self._folder(model) or source, device=self._options.device
            )
            if encoder.config.kind == "aligned":
                self._share_features(encoder)
            self._loaded = (model, encoder)
        return self._loaded[1]

    def _share_features(self, encoder: Any) -> None:
        """Gives it the features that training kept of its frozen encoders, and that
        other models computed with equal ones.
        """
        keys = encoder.encoder_keys()
        for key, kind in zip(keys, ("images", "texts"), strict=True):
            if key not in self._memories:
                cache = self._options.cache
                files = [] if cache is None else cache.named("features", f"-{key}-")
                self._memories[key] = FeatureMemory(files, kind)
        encoder.memories = tuple(self._memories[key] for key in keys)

    def traits(self, model: str) -> ModelTraits:
        return self._once("traits", model, None, _traits_of, "model")

    def labelled(self, model: str, data: Labelled) -> LabelledEmbeddings:
        """The images, labels and classes of a set through a model; InputError too if a
        label has no class.
        """
        names, templates = data.classnames, data.templates
        embed = partial(
            class_embeddings,
            classnames=names,
            templates=templates,
            batch_size=self._options.batch_size,
        )
        labels = _labels(data)
        words = digest([str(len(names)), *names, *templates])
        classes = self._once("classes", model, data, embed, words)
        images = self._images(model, data, self._with_tower)
        return LabelledEmbeddings(images, labels, classes)

    def tower(self, model: str, data: Labelled) -> tuple[Tensor, Tensor]:
        """The (n, F) features of the image tower on a labelled set, for probes, and the
        (n,) labels.
        """
        features = self._images(model, data, True).tower
        assert features is not None
        return features, _labels(data)

    def probe(self, model: str, train: Labelled, n_classes: int) -> Probe:
        def fit(_: Encoder) -> Probe:
            return fit_probe(*self.tower(model, train), n_classes)

        how = json.dumps([n_classes, _labels(train).tolist()])
        return self._once(f"probe-{digest([how])}", model, train, fit)

    def pairs(self, model: str, source: Reader) -> PairEmbeddings:
        embed = partial(
            embed_pairs,
            source=source,
            options=self._options,
            progress=self._report(model, source.name),
            text_progress=self._report(model, f"{source.name}, texts"),
        )
        return self._once("captioned", model, source, embed)

    def _images(self, model: str, data: Labelled, tower: bool) -> ImageEmbeddings:
        embed = partial(
            embed_images,
            reader=data,
            options=self._options,
            progress=self._report(model, data.name),
            tower=tower,
        )
        return self._once("images-tower" if tower else "images", model, data, embed)

    def _once(
        self,
        kind: str,
        model: str,
        data: Any,
        compute: Callable[[Encoder], T],
        key: str | None = None,
    ) -> T:
        """A value that is computed once of a model and a set, and kept in the cache by
        the content of both.

        ``key`` stands for the content of the set, where less than all of it matters.
        """
        place = kind, model, id(data)
        if place not in self._values:
            name = self._file_name(kind, model, data, key)
            value: T | None = self._read(name)
            if value is None:
                value = compute(self.encoder(model))
                self._write(name, value)
            self._values[place] = data, value
        result: T = self._values[place][1]
        return result

    def _file_name(self, kind: str, model: str, data: Any, key: str | None) -> str:
        """The name of a value in the cache; empty where it is not kept."""
        if self._options.cache is None:
            return ""
        model_key = self._key(model)
        if model_key is None:
            return ""
        if key is None:
            if id(data) not in self._contents:
                self._contents[id(data)] = data, content_key(data)
            key = self._contents[id(data)][1]
        return f"{model_key}/{kind}-{key}.pt"

    def _read(self, name: str) -> Any:
        """What the cache has; a damaged file counts as absent and is written anew."""
        if not name or self._options.cache is None:
            return None
        path = self._options.cache.find("embeddings", name)
        damaged = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)
        with contextlib.suppress(*damaged), torch.serialization.safe_globals(_KEPT):
            return None if path is None else torch.load(path, weights_only=True)
        return None

    def _write(self, name: str, value: Any) -> None:
        if name and self._options.cache is not None:
            stream = io.BytesIO()
            torch.save(value, stream)
            self._options.cache.put("embeddings", name, stream.getvalue())

    def _report(self, model: str, name: str) -> Progress | None:
        return (
            None
            if self._progress is None
            else partial(self._progress, f"{model}: {name}")
        )

    def _key(self, model: str) -> str | None:
        """The key of a model in the cache; None for a loaded one."""
        if model not in self._keys:
            folder = self._folder(model)
            key = None if folder is None else folder_key(folder, self._options.device)
            self._keys[model] = key
        return self._keys[model]

    def _folder(self, model: str) -> Path | None:
        """The model folder, the same one even if a run goes on to write newer
        checkpoints; None for others.
        """
        if model not in self._folders:
            source = self.models[model]
            self._folders[model] = (
                find_model_folder(source) if isinstance(source, str | Path) else None
            )
        return self._folders[model]


def _traits_of(encoder: Encoder) -> ModelTraits:
    """What a loaded encoder says of its objective; where it says nothing, τ⁻¹ is its
    ``logit_scale`` or CLIP's, and β the paper's.
    """
    settings: Mapping[str, Any] = getattr(encoder, "objective_config", None) or {}
    member = member_name(settings.get("contrast"), settings.get("hopfield"))
    beta = settings.get("beta") if settings.get("hopfield") else None
    inv_tau = settings.get("inv_tau")
    if inv_tau is None:
        scale = getattr(getattr(encoder, "model", None), "logit_scale", None)
        inv_tau = scale.detach().exp() if isinstance(scale, Tensor) else 1 / 0.07
    has_weights = isinstance(encoder, nn.Module) or hasattr(encoder, "fingerprint")
    return ModelTraits(
        objective=member or settings.get("closed_form"),
        settings=settings,
        inv_tau=float(inv_tau),
        beta=float(_PAPER_BETA if beta is None else beta),
        fingerprint=fingerprint(encoder) if has_weights else None,
    )


def folder_key(folder: Path, device: str | torch.device) -> str:
    """The key of a model folder or a file of weights: the bytes of its files, without
    loading it.
    """
    files = [folder]
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts: list[str | bytes] = [*_place(device)]
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        parts += [path.relative_to(folder).as_posix(), content]
    return digest(parts)


def _place(device: str | torch.device) -> list[str]:
    packages = ("torch", "open_clip_torch", "timm", "pillow", "onnxruntime")
    return [_VERSION, torch.device(device).type, *package_versions(packages)]


def _labels(data: Labelled) -> Tensor:
    """(N,) int64 labels of a set; refuses those that name no class."""
    labels = [int(label) for label in data.labels]
    n = len(data.classnames)
    for image, label in enumerate(labels):
        if not 0 <= label < n:
            raise InputError(
                f"{data.name}: image {image} has label {label}, but there are {n} class"
                f" names (labels 0 to {n - 1})"
            )
    return torch.tensor(labels, dtype=torch.int64)
