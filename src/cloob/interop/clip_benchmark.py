"""CLIP_benchmark evaluates our checkpoints: the model type ``cloob``, registered by importing this module.

    python -m cloob.interop.clip_benchmark eval --model runs/demo/cloob --dataset wds/flags --dataset_root data/flags

is CLIP_benchmark's command line with the model type there; all options are its own (1.6). Where they are left out and
no other model type is asked for, ``--model_type`` is ``cloob``, ``--pretrained`` ``cloob`` (a mere label here), and
``--output`` a name without the path of the model, which its own default would take for a folder. ``--model`` is what
:func:`cloob.load_model` takes, except ``hf-hub:`` and ``NAME/TAG``, which its type ``open_clip`` reads as well.

Images reach the model as raw pixels, a quarter of the bytes that its workers hand over otherwise; the model normalises
them. The results are those of ``--model_type open_clip --model local-dir:…`` on the same folder.

CLIP_benchmark 1.6.2 needs ``requests``, which it does not declare, and numpy < 2.4 (later ones make its ``accuracy``
fail with a TypeError): an environment of its own serves it best.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cloob.errors import InputError, command_line, require
from cloob.models.encoder import DualEncoder
from cloob.models.load import load_model

MODEL_TYPE = "cloob"


def load_cloob(
    model_name: str, pretrained: str | None = None, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[DualEncoder, Any, Any]:
    """Loads a model as CLIP_benchmark's ``load_clip`` wants it.

    Args:
        model_name: What :func:`cloob.load_model` takes.
        pretrained: Without effect; CLIP_benchmark writes it into its results.
        cache_dir: Without effect.
        device: Where the model goes.

    Returns:
        ``(model, transform, tokenizer)``: the model in evaluation mode; the transform makes uint8 (3, H, W) of an
        image; the tokenizer int64 (n, L) of n texts.

    Raises:
        InputError: As :func:`cloob.load_model`.
    """
    encoder = load_model(model_name, device=device)
    return encoder, encoder.preprocess, encoder.tokenizer


def register() -> None:
    """Makes ``cloob`` a model type of CLIP_benchmark; doing so again changes nothing.

    Raises:
        InputError: CLIP_benchmark is not installed.
    """
    models = require("clip_benchmark.models", "clip-benchmark")
    models.TYPE2FUNC[MODEL_TYPE] = load_cloob
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)  # the very list that its command line offers


def with_defaults(words: Sequence[str]) -> list[str]:
    """The words of a command line of CLIP_benchmark, with what they leave out filled in, unless for other types."""
    words = list(words)
    if not words or words[0] != "eval" or {"-h", "--help"} & set(words):
        return words
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    label = "cloob"
    types = _values(words, "--model_type")
    if "--pretrained_model" in given or (types and types != [MODEL_TYPE]):
        return words
    if "--model" in given and "--output" not in given:
        models = _values(words, "--model")
        if len(models) > 1:
            raise InputError(f"--output: name the results of {len(models)} models yourself, with {{model}} in the name")
        if models:
            label = Path(models[0]).name
    defaults = {
        "--model_type": MODEL_TYPE,
        "--pretrained": "cloob",
        "--output": "{dataset}_" + label + "_{language}_{task}.json",
    }
    for option, value in defaults.items():
        if option not in given:
            words += [option, value]
    return words


def main(words: Sequence[str]) -> None:
    """CLIP_benchmark's command line, where ``--model_type cloob`` is known and the default."""
    cli = require("clip_benchmark.cli", "clip-benchmark")
    sys.argv = ["clip_benchmark", *with_defaults(words)]
    cli.main()


def _values(words: Sequence[str], option: str) -> list[str]:
    """What follows an option, up to the next one."""
    for place, word in enumerate(words):
        if word.startswith(f"{option}="):
            return [word.partition("=")[2]]
        if word == option:
            values = []
            for value in words[place + 1 :]:
                if value.startswith("--"):
                    break
                values.append(value)
            return values
    return []


with command_line(__name__):
    register()
    if __name__ == "__main__":
        main(sys.argv[1:])
