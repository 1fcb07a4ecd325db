"""A model as a repository of the Hugging Face hub: written to a folder, then sent in one commit."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cloob.errors import InputError, one_line, require
from cloob.export.card import Facts, write_card
from cloob.export.exported import Exported, Unsupported, usage_of
from cloob.export.transformers import export_transformers
from cloob.models.aligned.model import encoders_here
from cloob.models.encoder import DualEncoder
from cloob.models.folder import save_model
from cloob.models.runs import CONFIG_FILE

_MAY_BE_THERE = """
open_clip_config.json open_clip_model.safetensors towers.json aligned.json heads.safetensors spiece.model
config.json model.safetensors preprocessor_config.json processor_config.json tokenizer.json tokenizer_config.json
vocab.json merges.txt special_tokens_map.json modules.json sentence_bert_config.json config_sentence_transformers.json
1_Normalize/config.json objective.json
"""
"""What a push may have written; what this one does not write of that would contradict it, and goes."""


def write_repository(encoder: DualEncoder, folder: Path, name: str, facts: Facts, license: str) -> str | None:
    """Writes the files of a repository; returns why there are none of transformers among them, or None."""
    if here := encoders_here(encoder.config.settings):
        raise InputError(f"{encoder.name}: its encoder {here[0]} is on this machine alone; push that, and train on it")
    save_model(folder, encoder, encoder.objective_config)
    usage, library = usage_of("cloob"), "cloob"
    if encoder.config.kind == "open_clip":
        # open_clip looks for a tokenizer under the name of the repository.
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
            config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = name
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, allow_nan=False), encoding="utf-8")
        usage, library = f"{usage}\n{usage_of('open_clip')}", "open_clip"
    tags: tuple[str, ...] = (library, "clip")
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            theirs = export_transformers(encoder, Path(place))
            shutil.copytree(place, folder, dirs_exist_ok=True)
        without, notes, tags = None, theirs.notes, (*tags, *theirs.tags)
        usage += f"\nWith transformers:\n\n{theirs.usage}"
    except Unsupported as error:
        without = one_line(error).partition(": ")[2].rpartition("; ")[0]
        notes = (f"There are no files of transformers: {without}.",)
    write_card(folder, facts, Exported(library, "", usage, notes, tags), name, license)
    return without


def check_online(name: str) -> None:
    if require("huggingface_hub.constants", "export").HF_HUB_OFFLINE:
        raise InputError(f"{name}: HF_HUB_OFFLINE is set; unset it to push, or look at the files with --dry-run")


def list_files(folder: Path) -> list[tuple[str, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def send(folder: Path, name: str, *, private: bool) -> str:
    """Makes the repository where it is missing, and commits the folder to it; files of an earlier push go."""
    hub: Any = require("huggingface_hub", "export")
    interface = hub.HfApi(endpoint=require("huggingface_hub.constants", "export").ENDPOINT)
    earlier = set(_MAY_BE_THERE.split()) - {file for file, _ in list_files(folder)}
    try:
        address = interface.create_repo(name, private=private, exist_ok=True)
        if not private or interface.repo_info(name).private:
            more = {"commit_message": "Add the model", "delete_patterns": sorted(earlier)}
            interface.upload_folder(repo_id=name, folder_path=folder, **more)
            return str(address)
    except Exception as error:  # its errors, those of the library under it and xet's have no common class
        advice = "`hf auth login` or HF_TOKEN says who you are"
        raise InputError(f"{name}: {interface.endpoint} did not take it ({one_line(error)}); {advice}") from error
    raise InputError(f"{name}: is there already and is public; make it private first, or leave --private out")
