"""One module around both towers: pixels and strings in, unit rows out.

Shapes: n items, (H, W) = (image_size, image_size), L = context_length, D = embed_dim.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cloob.data.source import add_part
from cloob.errors import InputError
from cloob.models.importing import translated
from cloob.models.pixels import EvalTransform, open_image
from cloob.models.tokenizer import ClipTokenizer, is_open_clips
from cloob.objective import ContrastiveObjective

if TYPE_CHECKING:
    from PIL.Image import Image

Tokenize = Callable[[list[str]], Tensor]
# while ``encode_short`` replaces a causal tower's positions: threads may share a model
_SWAPPING = threading.Lock()
_STEP = 8  # lengths of trimmed texts are multiples of it: few shapes, and even ones


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder was built from: the kind of its model folder, and the folder's
    configuration.
    """

    kind: Literal["open_clip", "towers", "aligned", "vectors", "onnx", "module"]
    embed_dim: int
    context_length: int
    settings: dict[str, Any]

    @classmethod
    def open_clip(cls, model_cfg: dict[str, Any]) -> Self:
        """Of towers that open_clip builds from this ``model_cfg``."""
        length = int(model_cfg["text_cfg"].get("context_length", 77))
        return cls("open_clip", int(model_cfg["embed_dim"]), length, model_cfg)


class DualEncoder(nn.Module):
    """An image tower and a text tower that share an embedding space.

    Attributes:
        name: The configuration's name, or where the model came from.
        model: The open_clip module; its ``logit_scale`` is frozen and its
            ``logit_bias`` taken out: both are the objective's, and stored with the
            towers again by ``save_model``.
        tokenizer: list of n strings -> int64 (n, L).
        preprocess: PIL image -> uint8 (3, H, W).
        config: What it was built from.
        preprocess_cfg: open_clip's ``preprocess_cfg``.
        objective_config: Settings of the objective that it was trained with, of which
            :meth:`make_objective` makes it; empty where they are unknown.
        image_size: Side of the square input in pixels.
        mean: Channel means for pixels in [0, 1]; ``std``: their standard deviations.
        embed_dim: D; ``context_length``: L.
    """

    _mean: Tensor
    _std: Tensor
    # where it is known without a look at the weights, see
    # ``cloob.models.load.fingerprint``
    fingerprint: str = ""
    # whether tokens may come without the padding that all rows of a batch share, see
    # ``trimmed``
    trims_texts = False

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Tokenize,
        config: EncoderConfig,
        objective: dict[str, Any] | None = None,
    ) -> None:
        """Wraps what ``open_clip.create_model`` and ``open_clip.get_tokenizer`` return,
        or modules like these.
        """
        super().__init__()
        self.name = name
        self.model: Any = model
        self.tokenizer = (
            ClipTokenizer.of(tokenizer) if is_open_clips(tokenizer) else tokenizer
        )
        self.config = config
        self.objective_config = objective or {}
        self.preprocess_cfg: dict[str, Any] = dict(self.model.visual.preprocess_cfg)
        size = self.preprocess_cfg["size"]
        # (H, W) in some of open_clip's
        sides = {size} if isinstance(size, int) else {int(side) for side in size}
        self.image_size = max(sides)
        self.preprocess_cfg["size"] = self.image_size
        self.mean, self.std = (
            tuple(map(float, self.preprocess_cfg[key])) for key in ("mean", "std")
        )
        if len(sides) > 1 or not min(self.std) > 0:
            raise InputError(
                f"{name}: image size {size}, std {self.std}; a square and positive"
                " numbers are expected"
            )
        self.embed_dim, self.context_length = config.embed_dim, config.context_length
        self._causal_tower = causal_tower(self.model, self.context_length)
        self.trims_texts = self._causal_tower is not None
        self.preprocess = EvalTransform(self.preprocess_cfg)
        for key, values in (("_mean", self.mean), ("_std", self.std)):
            self.register_buffer(
                key, torch.tensor(values).view(1, 3, 1, 1), persistent=False
            )
        self.model.logit_scale.requires_grad_(False)
        if getattr(self.model, "logit_bias", None) is not None:
            self.model.logit_bias = None
            settings = {
                key: value
                for key, value in config.settings.items()
                if key != "init_logit_bias"
            }
            self.config = replace(config, settings=settings)
        self.set_channels_last(True)

    def check_weights(self) -> None:
        """Raises InputError for an encoder that has no weights to train, store or
        export: an ONNX export.
        """
        if self.config.kind == "onnx":
            advice = (
                "an ONNX export embeds and does no more; give the model that it was"
                " made of"
            )
            raise InputError(f"{self.name}: {advice}")

    @property
    def heads(self) -> Any:
        """The heads of both sides, where these alone are trained: on frozen encoders,
        or on vectors; else None.
        """
        trained = self.config.kind in ("aligned", "vectors")
        return (self.model.image_head, self.model.text_head) if trained else None

    def set_channels_last(self, enabled: bool) -> None:
        """Chooses the image tower's memory layout; convolutions run 1.2 to 1.5 times as
        fast in channels last.
        """
        self._layout = torch.channels_last if enabled else torch.contiguous_format
        self.model.visual.to(memory_format=self._layout)

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
        settings = self.objective_config | {"gather": False} | overrides
        lacks = (
            ""
            if self.objective_config
            else "what it was trained with; cloob.make_objective(NAME) makes one"
        )
        if form := self.objective_config.get("closed_form"):
            lacks = (
                f"what loss it was trained with: there was none ({form} is a closed"
                " form)"
            )
        if settings.get("hopfield") and "beta" not in settings:
            lacks = "which β it was trained with; give make_objective(beta=…)"
        if lacks:
            raise InputError(f"{self.name}: does not say {lacks}")
        with translated(f"{self.name}: its objective's settings cannot be used"):
            return ContrastiveObjective(**settings)

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
        return self._embed("image", images, batch_size, grad)

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
        return self._embed("text", texts, batch_size, grad)

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
        if isinstance(texts, str):
            raise TypeError("one string, where a list is expected")
        text: Any = getattr(self.model, "text", None)
        last: nn.Module | None = None
        if self._causal_tower is not None:
            last = self.model.get_submodule(self._causal_tower).ln_final
        elif hasattr(text, "text_tokens"):
            last = text.blocks
        if last is None:
            raise InputError(f"{self.name}: gives no states of tokens")
        tokens = texts if isinstance(texts, Tensor) else self.tokenizer(list(texts))
        tokens = tokens.to(self.device)
        states: list[Tensor] = []
        caller = threading.get_ident()

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if threading.get_ident() == caller:  # threads may share a model
                states.append(output)

        hook = last.register_forward_hook(keep)
        try:
            with nullcontext() if grad else torch.no_grad():
                self._text_features(tokens)
        finally:
            hook.remove()
        if self._causal_tower is None:
            return states[0], text.text_tokens(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return states[0], places <= tokens.argmax(dim=1)[:, None]

    def _embed(
        self, side: Literal["image", "text"], items: Any, batch_size: int, grad: bool
    ) -> Tensor:
        """(n, embed_dim) unit rows of pictures or texts, or of their pixels or tokens,
        in batches.
        """
        if isinstance(items, str):
            raise TypeError("one string, where a list is expected")
        with nullcontext() if grad else torch.no_grad():
            parts = [
                _unit_rows(
                    torch.zeros(0, self.embed_dim).to(self.device, self._dtype())
                )
            ]
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                if side == "image":
                    if not isinstance(batch, Tensor):
                        batch = torch.stack(
                            [self.preprocess(open_image(image)) for image in batch]
                        )
                    parts.append(self._image_features(batch.to(self.device)))
                    continue
                tokens = (
                    batch if isinstance(batch, Tensor) else self.tokenizer(list(batch))
                )
                self._check_tokens(tokens)
                if self.trims_texts and tokens.device.type == "cpu":
                    tokens = trimmed(tokens)
                try:
                    parts.append(self._text_features(tokens.to(self.device)))
                except IndexError as error:
                    raise InputError(
                        f"{self.name}: tokens of another model's tokenizer ({error})"
                    ) from error
            return torch.cat(parts)

    def _image_features(self, images: Tensor) -> Tensor:
        """(n, embed_dim) unit rows of pixels of the right size, uint8 or normalised."""
        size, pixels = self.image_size, images.dtype == torch.uint8
        if images.shape[1:] != (3, size, size) or not (
            pixels or images.is_floating_point()
        ):
            expected = f"uint8 or float (n, 3, {size}, {size})"
            raise ValueError(
                f"images: {images.dtype} {tuple(images.shape)}, where {expected} is"
                " expected"
            )
        if pixels:
            # in place: half the time on a CPU
            images = images.float().div_(255).sub_(self._mean).div_(self._std)
        images = images.to(self._dtype(), memory_format=self._layout)
        return _unit_rows(self.model.encode_image(images))

    def _text_features(self, tokens: Tensor) -> Tensor:
        """(n, embed_dim) unit rows of tokens, which a causal tower also takes without
        their padding.
        """
        self._check_tokens(tokens)
        alone = self._causal_tower is None or torch.compiler.is_compiling()
        with nullcontext() if alone else _SWAPPING:
            if self._causal_tower is not None and tokens.shape[1] < self.context_length:
                return _unit_rows(encode_short(self.model, self._causal_tower, tokens))
            return _unit_rows(self.model.encode_text(tokens))

    def _check_tokens(self, tokens: Tensor) -> None:
        length = tokens.shape[1] if tokens.ndim == 2 else 0
        fits = (
            0 < length <= self.context_length
            if self.trims_texts
            else length == self.context_length
        )
        if not fits or tokens.dtype not in (torch.int64, torch.int32):
            expected = f"int64 (n, {self.context_length})"
            raise ValueError(
                f"tokens: {tokens.dtype} {tuple(tokens.shape)}, where {expected} is"
                " expected"
            )

    def _dtype(self) -> torch.dtype:
        """The towers'; graphs, which have no parameters, take float32."""
        return next(
            (parameter.dtype for parameter in self.model.visual.parameters()),
            torch.float32,
        )


def _unit_rows(features: Tensor) -> Tensor:
    # In at least float32: bfloat16 would leave lengths that are off by 0.4 %.
    return F.normalize(
        features if features.dtype == torch.float64 else features.float(), dim=-1
    )


def cloob_objective(inv_tau: float, beta: float | None, scale: str) -> dict[str, Any]:
    """Settings of a model that was trained with CLOOB; without β where nothing gives
    it.
    """
    beta_or_default = 8.0 if beta is None else float(beta)
    objective = ContrastiveObjective.cloob(
        inv_tau=float(inv_tau), beta=beta_or_default, scale=scale
    )
    return {
        key: value
        for key, value in objective.config().items()
        if key != "beta" or beta is not None
    }


def sigmoid_objective(model: Any) -> dict[str, Any]:
    """Settings of an open_clip module with a ``logit_bias``, which the sigmoid loss
    alone learns; else empty.
    """
    if getattr(model, "logit_bias", None) is None:
        return {}
    inv_tau = float(model.logit_scale.detach().exp())
    bias = float(model.logit_bias.detach())
    return ContrastiveObjective.siglip(inv_tau=inv_tau, bias=bias).config()


def causal_tower(model: nn.Module, context_length: int) -> str | None:
    """Which module (``"text"`` or ``""``) has the text tower's causal mask; None where
    padding may change features.
    """
    text = getattr(model, "text", None)
    tower: Any = text if isinstance(text, nn.Module) else model
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    mask: Any = getattr(tower, "attn_mask", None)
    positions: Any = getattr(tower, "positional_embedding", None)
    is_clips = (
        isinstance(mask, Tensor)
        and isinstance(positions, nn.Parameter)
        and pool == "argmax"
    )
    if (
        not is_clips
        or getattr(tower, "cls_emb", None) is not None
        or len(positions) != context_length
    ):
        return None
    causal = torch.full((context_length, context_length), -torch.inf).triu(1).to(mask)
    return ("" if tower is model else "text") if torch.equal(mask, causal) else None


def trimmed(tokens: Tensor) -> Tensor:
    """(n, L) tokens on the CPU without the columns that are padding in every row, up to
    a multiple of 8.
    """
    longest = int(tokens.argmax(1).max()) + 1 if len(tokens) else 1
    length = -(-longest // _STEP) * _STEP
    return tokens if length >= tokens.shape[1] else tokens[:, :length].contiguous()


def trimmed_tokens(tokenizer: Tokenize, texts: Sequence[str]) -> Tensor:
    return trimmed(tokenizer(list(texts)))


def encode_short(
    model: Any, tower: str, tokens: Tensor, *, new_mask: bool = False
) -> Tensor:
    """``model.encode_text`` with as many positions as the tokens have; torch.export
    needs a ``new_mask``.
    """
    module, length = model.get_submodule(tower), tokens.shape[1]
    prefix = ".".join(filter(None, ("model", tower)))
    mask = module.attn_mask[:length, :length]
    if new_mask:
        mask = (
            torch.full_like(module.attn_mask[0, 0], -torch.inf)
            .expand(length, length)
            .triu(1)
        )
    positions = module.positional_embedding[:length]
    shorter = {f"{prefix}.positional_embedding": positions, f"{prefix}.attn_mask": mask}
    text = nn.Module()  # which calls encode_text, as functional_call needs it
    text.model, text.forward = model, model.encode_text
    features: Tensor = functional_call(text, shorter, (tokens,))
    return features


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


def weights_digest(module: nn.Module, *values: Any) -> str:
    """A digest of a module's parameters and buffers and of JSON-able values: 32 hex
    digits, the same on all machines.
    """
    state = hashlib.blake2b(digest_size=16)
    for part in values:
        add_part(state, json.dumps(part, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        add_part(state, f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(
            memoryview(
                value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            )
        )
    return str(state.hexdigest())
