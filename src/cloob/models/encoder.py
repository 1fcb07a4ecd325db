"""One module around both towers: pixels and strings in, unit rows out.

Shapes: n items, (H, W) = (image_size, image_size), L = context_length, D = embed_dim.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cloob.errors import InputError
from cloob.models.importing import translated
from cloob.models.pixels import EvalTransform, open_image
from cloob.models.runs import (
    CONFIG_FILE,
    MODULE_FILE,
    TOWERS_FILE,
    TOWERS_WEIGHTS_FILE,
    WEIGHTS_FILE,
)
from cloob.models.settings import ModelConfig, Pixels
from cloob.models.tokenizer import ClipTokenizer, is_open_clips
from cloob.objective import ContrastiveObjective

if TYPE_CHECKING:
    from PIL.Image import Image

Tokenize = Callable[[list[str]], Tensor]
_STEP = 8  # lengths of trimmed texts are multiples of it: few shapes, and even ones


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder was built from: the kind of its model folder, and the folder's
    configuration.
    """

    kind: Literal["open_clip", "towers", "aligned", "vectors", "onnx", "module"]
    embed_dim: int
    context_length: int
    settings: dict[str, object]

    @classmethod
    def open_clip(cls, model_cfg: ModelConfig) -> Self:
        """Of towers that open_clip builds from this ``model_cfg``; the bias of its
        logits is the objective's.
        """
        length = int(model_cfg["text_cfg"].get("context_length", 77))
        settings: dict[str, object] = {**model_cfg}
        settings.pop("init_logit_bias", None)
        return cls("open_clip", int(model_cfg["embed_dim"]), length, settings)


class ModelFiles(NamedTuple):
    """The configuration and the weights of a model folder, by the names of their
    files.
    """

    config_name: str
    config: dict[str, object]
    weights_name: str
    weights: dict[str, Tensor]


class Model(nn.Module):
    """What is trained, stored and loaded: towers, or heads.

    Attributes:
        name: The configuration's name, or where the model came from.
        config: What it was built from.
        objective_config: Settings of the objective that it was trained with, of which
            :meth:`make_objective` makes it; empty where they are unknown.
        embed_dim: Width D of its rows.
    """

    # where it is known without a look at the weights, see
    # ``cloob.models.load.fingerprint``
    fingerprint: str = ""
    model: Any

    def __init__(
        self, name: str, config: EncoderConfig, objective: dict[str, object] | None
    ) -> None:
        super().__init__()
        self.name = name
        self.config = config
        self.objective_config = objective or {}
        self.embed_dim = config.embed_dim

    def check_weights(self) -> None:
        """Raises InputError for a model that has no weights to train, store or export:
        an ONNX export.
        """
        if self.config.kind == "onnx":
            raise InputError(
                f"{self.name}: an ONNX export embeds and does no more; give the model"
                " that it was made of"
            )

    def files(
        self, objective: Mapping[str, Any], weights: dict[str, Tensor]
    ) -> ModelFiles:
        """What a model folder holds of it, with an objective's settings; ``weights``
        are those of ``model``.
        """
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    def make_objective(self, **overrides: Any) -> ContrastiveObjective:
        """The objective that the model was trained with: the member of the family, at
        its τ⁻¹ and β.

        Args:
            **overrides: Arguments of :class:`cloob.ContrastiveObjective` in the place
                of the stored ones. ``gather`` is False unless it is given: it belongs
                to a run, not to a model.

        Raises:
            InputError: The model has no objective stored, or one whose settings cannot
                be used.
        """
        stored = self.objective_config
        settings = {**stored, "gather": False, **overrides}
        unknown = ""
        if not stored:
            unknown = "what it was trained with; cloob.make_objective(NAME) makes one"
        elif "closed_form" in stored:
            unknown = (
                "what loss it was trained with: there was none"
                f" ({stored['closed_form']} is a closed form)"
            )
        elif settings.get("hopfield") and "beta" not in settings:
            unknown = "which β it was trained with; give make_objective(beta=…)"
        if unknown:
            raise InputError(f"{self.name}: does not say {unknown}")
        with translated(f"{self.name}: its objective's settings cannot be used"):
            return ContrastiveObjective(**settings)


class DualEncoder(Model):
    """An image tower and a text tower that share an embedding space.

    Attributes:
        model: The open_clip module; its ``logit_scale`` is frozen and its
            ``logit_bias`` taken out: both are the objective's, and stored with the
            towers again by ``save_model``.
        tokenizer: list of n strings -> int64 (n, L).
        preprocess: PIL image -> uint8 (3, H, W).
        preprocess_cfg: open_clip's ``preprocess_cfg``.
        image_size: Side of the square input in pixels.
        mean: Channel means for pixels in [0, 1]; ``std``: their standard deviations.
        context_length: L.
    """

    _mean: Tensor
    _std: Tensor
    # the file that all of its weights were read from, if it was one
    weights_file: Path | None = None
    # whether tokens may come without the padding that all rows of a batch share, see
    # ``trimmed``
    trims_texts = False

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Tokenize,
        config: EncoderConfig,
        objective: dict[str, object] | None = None,
    ) -> None:
        """Wraps what ``open_clip.create_model`` and ``open_clip.get_tokenizer`` return,
        or modules like these.
        """
        super().__init__(name, config, objective)
        self.model = model
        self.tokenizer = (
            ClipTokenizer.of(tokenizer) if is_open_clips(tokenizer) else tokenizer
        )
        self.context_length = config.context_length
        self._causal_tower = causal_tower(model, self.context_length)
        self.trims_texts = self._causal_tower is not None
        self._set_preprocessing(model.visual.preprocess_cfg)
        model.logit_scale.requires_grad_(False)
        model.logit_bias = None
        self.set_channels_last(True)

    def _set_preprocessing(self, preprocess_cfg: Pixels) -> None:
        """How pictures become pixels; InputError for what is not square."""
        size = preprocess_cfg["size"]
        sides = {size} if isinstance(size, int) else {*size}  # some have (H, W)
        self.image_size = int(max(sides))
        self.mean = tuple(map(float, preprocess_cfg["mean"]))
        self.std = tuple(map(float, preprocess_cfg["std"]))
        self.preprocess_cfg = preprocess_cfg | {
            "size": self.image_size,
            "mean": self.mean,
            "std": self.std,
        }
        self.preprocess = EvalTransform(self.preprocess_cfg)
        if len(sides) > 1 or not min(self.std) > 0:
            raise InputError(
                f"{self.name}: image size {size}, std {self.std}; a square and positive"
                " numbers are expected"
            )
        for name, values in (("_mean", self.mean), ("_std", self.std)):
            column = torch.tensor(values).view(1, 3, 1, 1)
            self.register_buffer(name, column, persistent=False)

    def set_channels_last(self, enabled: bool) -> None:
        """Chooses the image tower's memory layout; convolutions run 1.2 to 1.5 times as
        fast in channels last.
        """
        self._layout = torch.channels_last if enabled else torch.contiguous_format
        self.model.visual.to(memory_format=self._layout)

    def files(
        self, objective: Mapping[str, Any], weights: dict[str, Tensor]
    ) -> ModelFiles:
        """The ``inv_tau`` and ``bias`` of an objective are open_clip's ``logit_scale``
        and ``logit_bias`` too.
        """
        settings = self.config.settings
        if self.config.kind == "module":
            return ModelFiles(MODULE_FILE, settings, TOWERS_WEIGHTS_FILE, weights)
        inv_tau = objective.get("inv_tau")
        scale = weights["logit_scale"].cpu()
        if inv_tau is not None:
            scale = torch.full_like(scale, math.log(inv_tau))
        weights = weights | {"logit_scale": scale}
        if self.config.kind == "towers":
            config = {"name": self.name, **settings}
            return ModelFiles(TOWERS_FILE, config, TOWERS_WEIGHTS_FILE, weights)
        bias = objective.get("bias")
        if bias is not None:
            settings = settings | {"init_logit_bias": float(bias)}
            weights["logit_bias"] = torch.full_like(scale, bias)
        config = {
            "model_cfg": settings,
            "preprocess_cfg": self.preprocess_cfg,
            "name": self.name,
        }
        # Only a tokenizer that is not open_clip's has settings; open_clip ignores them.
        tokenizer = getattr(self.tokenizer, "settings", None)
        if tokenizer is not None:
            config["tokenizer"] = tokenizer
        return ModelFiles(CONFIG_FILE, config, WEIGHTS_FILE, weights)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeds n pairs; differentiable.

        Args:
            images: (n, 3, H, W) on the towers' device: uint8 raw pixels, or float
                already normalised.
            tokens: (n, L) int64; (n, L') with L' < L too for an encoder that
                ``trims_texts``.

        Returns:
            ``(image_features, text_features)``, (n, D) unit rows: float32 under
            autocast too, float64 for such towers.
        """
        return self._image_features(images), self._text_features(tokens)

    def encode_image(
        self,
        images: Sequence[Image | str | Path] | Tensor,
        *,
        batch_size: int = 256,
        grad: bool = False,
    ) -> Tensor:
        """Embeds images, without a gradient unless ``grad``.

        Mode (train, eval) is the caller's.

        Args:
            images: PIL images, paths, or a tensor as in ``forward`` (moved to the
                towers' device).
            batch_size: Images that go through the tower at once.
            grad: Whether autograd records the way to the rows; then memory grows with
                n.

        Returns:
            (n, D) unit rows.

        Raises:
            InputError: A file that is missing or not an image.
        """
        return self._in_batches(self._embed_images, images, batch_size, grad)

    def encode_text(
        self,
        texts: Sequence[str] | Tensor,
        *,
        batch_size: int = 1024,
        grad: bool = False,
    ) -> Tensor:
        """Embeds texts as ``encode_image`` does images.

        Args:
            texts: Strings, or (n, L) int64 tokens as in ``forward`` (moved to the
                towers' device).
            batch_size: Texts that go through the tower at once; such a batch costs what
                its longest text does.
            grad: As in ``encode_image``.

        Returns:
            (n, D) unit rows.

        Raises:
            InputError: The text tower does not know a token, as with another model's
                tokenizer.
        """
        return self._in_batches(self._embed_texts, texts, batch_size, grad)

    def encode_text_tokens(
        self, texts: Sequence[str] | Tensor, *, grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The text tower's states of every token, after its last norm and before
        pooling and projection: what a diffusion model attends to.

        Args:
            texts: As in ``encode_text``.
            grad: As in ``encode_image``.

        Returns:
            (n, L, W) states, W the tower's width, and (n, L) bool, True for tokens of
            the text: not for the padding behind it.

        Raises:
            InputError: The text tower gives none.
        """
        _refuse_string(texts)
        tokens = self._tokens(texts).to(self.device)
        text: Any = getattr(self.model, "text", None)
        with nullcontext() if grad else torch.no_grad():
            if self._causal_tower is not None:
                tower = self.model.get_submodule(self._causal_tower)
                positions = torch.arange(tokens.shape[1], device=tokens.device)
                end_positions = tokens.argmax(dim=1, keepdim=True)
                return causal_states(tower, tokens), positions <= end_positions
            if hasattr(text, "text_tokens"):
                return text.states(tokens), text.text_tokens(tokens)
        raise InputError(f"{self.name}: gives no states of tokens")

    def _in_batches(
        self,
        embed: Callable[[Any], Tensor],
        items: Sequence[object] | Tensor,
        batch_size: int,
        grad: bool,
    ) -> Tensor:
        """(n, embed_dim) unit rows of items, in batches."""
        _refuse_string(items)
        with nullcontext() if grad else torch.no_grad():
            starts = range(0, len(items), batch_size)
            batches = [embed(items[start : start + batch_size]) for start in starts]
            if batches:
                return torch.cat(batches)
            no_rows = torch.zeros(0, self.embed_dim, device=self.device)
            return _unit_rows(no_rows.to(self._dtype()))

    def _embed_images(self, images: Sequence[Image | str | Path] | Tensor) -> Tensor:
        """Unit rows of pictures, or of their pixels."""
        if not isinstance(images, Tensor):
            opened = [open_image(image) for image in images]
            images = torch.stack([self.preprocess(image) for image in opened])
        return self._image_features(images.to(self.device))

    def _embed_texts(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Unit rows of texts, or of their tokens."""
        tokens = self._tokens(texts)
        if self.trims_texts and tokens.device.type == "cpu":
            tokens = trimmed(tokens)
        try:
            return self._text_features(tokens.to(self.device))
        except IndexError as error:
            raise InputError(
                f"{self.name}: tokens of another model's tokenizer ({error})"
            ) from error

    def _tokens(self, texts: Sequence[str] | Tensor) -> Tensor:
        """(n, L) tokens of texts, or the tokens that were given."""
        tokens: Tensor = (
            texts if isinstance(texts, Tensor) else self.tokenizer(list(texts))
        )
        self._check_tokens(tokens)
        return tokens

    def _image_features(self, images: Tensor) -> Tensor:
        """(n, embed_dim) unit rows of pixels of the right size, uint8 or normalised."""
        size = self.image_size
        is_raw = images.dtype == torch.uint8
        has_dtype = is_raw or images.is_floating_point()
        if images.shape[1:] != (3, size, size) or not has_dtype:
            raise ValueError(
                f"images: {images.dtype} {tuple(images.shape)}, where uint8 or float"
                f" (n, 3, {size}, {size}) is expected"
            )
        pixels = self._normalised(images) if is_raw else images
        pixels = pixels.to(self._dtype(), memory_format=self._layout)
        return _unit_rows(self.model.encode_image(pixels))

    def _normalised(self, images: Tensor) -> Tensor:
        """Float32 pixels of uint8 ones."""
        # in place: half the time on a CPU
        return images.float().div_(255).sub_(self._mean).div_(self._std)

    def _text_features(self, tokens: Tensor) -> Tensor:
        """(n, embed_dim) unit rows of tokens, which a causal tower also takes without
        their padding.
        """
        self._check_tokens(tokens)
        if self._causal_tower is None:
            return _unit_rows(self.model.encode_text(tokens))
        tower = self.model.get_submodule(self._causal_tower)
        return _unit_rows(causal_features(tower, tokens))

    def _check_tokens(self, tokens: Tensor) -> None:
        shortest = 1 if self.trims_texts else self.context_length
        is_tokens = tokens.ndim == 2 and tokens.dtype in (torch.int64, torch.int32)
        if not is_tokens or not shortest <= tokens.shape[1] <= self.context_length:
            raise ValueError(
                f"tokens: {tokens.dtype} {tuple(tokens.shape)}, where int64 (n,"
                f" {self.context_length}) is expected"
            )

    def _dtype(self) -> torch.dtype:
        """The towers'; graphs, which have no parameters, take float32."""
        return next(
            (parameter.dtype for parameter in self.model.visual.parameters()),
            torch.float32,
        )


def _refuse_string(items: object) -> None:
    if isinstance(items, str):
        raise TypeError("one string, where a list is expected")


def _unit_rows(features: Tensor) -> Tensor:
    # In at least float32: bfloat16 would leave lengths that are off by 0.4 %.
    return F.normalize(
        features if features.dtype == torch.float64 else features.float(), dim=-1
    )


def cloob_objective(
    inv_tau: float, beta: float | None, scale: str
) -> dict[str, object]:
    """Settings of a model that was trained with CLOOB; without β where nothing gives
    it.
    """
    objective = ContrastiveObjective.cloob(
        inv_tau=float(inv_tau), beta=8.0 if beta is None else float(beta), scale=scale
    )
    settings = objective.config()
    if beta is None:
        del settings["beta"]
    return settings


def sigmoid_objective(model: Any) -> dict[str, object]:
    """Settings of an open_clip module with a ``logit_bias``, which the sigmoid loss
    alone learns; else empty.
    """
    if getattr(model, "logit_bias", None) is None:
        return {}
    inv_tau = float(model.logit_scale.detach().exp())
    bias = float(model.logit_bias.detach())
    return ContrastiveObjective.siglip(inv_tau=inv_tau, bias=bias).config()


def causal_tower(model: nn.Module, context_length: int) -> str | None:
    """Which module (``"text"`` or ``""``) is a text tower of open_clip with a causal
    mask and the row at the end token; None where padding may change features.
    """
    text = getattr(model, "text", None)
    name = "text" if isinstance(text, nn.Module) else ""
    tower: Any = model.get_submodule(name)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    mask: Any = getattr(tower, "attn_mask", None)
    if pool != "argmax" or not isinstance(mask, Tensor):
        return None
    causal = torch.full((context_length, context_length), -torch.inf).triu(1).to(mask)
    has_class = getattr(tower, "cls_emb", None) is not None
    if has_class or not torch.equal(mask, causal):
        return None
    return name


def causal_states(tower: Any, tokens: Tensor) -> Tensor:
    """(n, L, W) states of open_clip's causal text tower after its last norm, for L
    tokens, at most its context length.
    """
    length = tokens.shape[1]
    embedded = tower.token_embedding(tokens) + tower.positional_embedding[:length]
    mask = tower.attn_mask[:length, :length]
    states: Tensor = tower.ln_final(tower.transformer(embedded, attn_mask=mask))
    return states


def causal_features(tower: Any, tokens: Tensor) -> Tensor:
    """(n, D) features: the projected states at the end, which is the highest token."""
    states = causal_states(tower, tokens)
    rows = torch.arange(states.shape[0], device=states.device)
    pooled = states[rows, tokens.argmax(dim=1)]
    projection = tower.text_projection
    if projection is None:
        return pooled
    is_module = isinstance(projection, nn.Module)
    features: Tensor = projection(pooled) if is_module else pooled @ projection
    return features


def before_padding(tokens: Tensor, pad: int) -> Tensor:
    """(n, L) bool, True for all but the padding at a row's end: a text may hold the
    padding's token.
    """
    return (tokens != pad).flip(1).cumsum(1).flip(1) > 0


def trimmed(tokens: Tensor) -> Tensor:
    """(n, L) tokens on the CPU without the columns that are padding in every row, up to
    a multiple of 8.
    """
    longest = int(tokens.argmax(1).max()) + 1 if len(tokens) else 1
    length = -(-longest // _STEP) * _STEP
    return tokens if length >= tokens.shape[1] else tokens[:, :length].contiguous()


def trimmed_tokens(tokenizer: Tokenize, texts: Sequence[str]) -> Tensor:
    return trimmed(tokenizer(list(texts)))


@contextmanager
def evaluating(encoder: object) -> Iterator[None]:
    """Inside, an encoder is in evaluation mode and nothing gets a gradient; the modes
    come back.
    """
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def weights_digest(module: nn.Module, *values: object) -> str:
    """A digest of a module's parameters and buffers and of JSON-able values: 32 hex
    digits, the same on all machines.
    """
    state = hashlib.sha256()
    for value in values:
        state.update(f"{json.dumps(value, sort_keys=True, default=str)}\n".encode())
    for name, tensor in module.state_dict().items():
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(memoryview(flat.view(torch.uint8).numpy()))
    return state.hexdigest()[:32]
