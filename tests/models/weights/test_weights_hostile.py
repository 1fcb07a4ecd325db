"""Every hostile file is refused with one line, without running anything and within its memory; the controls load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MARKERS = "cloob-was-here-*"
LOADS = {"mljku_mixed_prefix.pt", "ck_float64.pkl"}
MORE_MEMORY = ("zip_bomb", "zip_size_lie", "npz_", "pickle_billion", "pickle_deep", "config_", "st_deep")
SAYS = {
    "ck_missing_key.pkl": ["text_encoder/proj/w is missing"],
    "ck_extra_key.pkl": ["layer_1", "is unknown"],
    "ck_nan.pkl": ["NaN"],
    "ck_wrong_shape.pkl": ["(4, 5)", "(4, 4)"],
    "ck_int_dtype.pkl": ["int64"],
    "ck_embeddings_too_small.pkl": ["(2, 2)", "(16, 4)"],
    "ck_big_endian.pkl": ["big-endian"],
    "ck_fortran_order.pkl": ["Fortran"],
    "st_nan.safetensors": ["visual.proj", "NaN"],
    "st_inf.safetensors": ["ln_final.weight", "infinite"],
    "st_missing_key.safetensors": ["text_projection is missing"],
    "st_extra_key.safetensors": ["is unknown"],
    "st_wrong_shape.safetensors": ["(8, 9)", "(8, 8)"],
    "st_transposed.safetensors": ["text_projection has shape"],
    "st_wrong_dtype_int.safetensors": ["visual.proj", "int64"],
    "st_broadcastable.safetensors": ["ln_final.bias", "(1,)", "(8,)"],
    "st_duplicate_keys_same_bytes.safetensors": ["twice"],
    "mljku_config_traversal.pt": ["model_config_file", "passwd"],
    "mljku_prefix_collision.pt": ["two values", "logit_inv_tau"],
    "mljku_inv_tau_inf.pt": ["logit_inv_tau"],
    "mljku_state_dict_is_list.pt": ["state_dict"],
    "config_duplicate_keys_crowsonkb.json": ["d_embed", "twice"],
    "config_duplicate_keys_open_clip.json": ["embed_dim", "twice"],
    "config_layers_1e9.json": ["n_layers"],
    "config_nan.json": ["NaN"],
    "config_zero_heads.json": ["n_heads"],
    "config_heads_do_not_divide.json": ["n_heads"],
    "config_negative_patch.json": ["patch_size"],
    "config_zero_std.json": ["std"],
    "zip_bad_crc.pt": ["damaged"],
    "zip_duplicate_member.pt": ["two records have one name"],
    "hf_remote_code": ["auto_map"],
    "hf_index_traversal": ["index.json"],
    "torch_jit_setstate_writes_file.pt": ["its modules are not"],
}


def prepare(hostile: Path, place: Path) -> dict[str, str]:
    """Each hostile file where only its own fault stands between it and a model: its source by its name."""
    base = hostile / "base"
    sources: dict[str, str] = {}
    for path in sorted(hostile.iterdir()):
        if path.name in ("base", "hub_repo", "README.md"):
            continue
        home = place / path.name.replace(".", "_")
        home.mkdir()
        if path.is_dir():
            shutil.copytree(path, home, dirs_exist_ok=True)
            if not (home / "config.json").exists():
                shutil.copy(hostile.parent / "hf_clip" / "vit_gelu" / "config.json", home)
            sources[path.name] = str(home)
        elif path.suffix == ".safetensors" or path.name.endswith("open_clip.json"):
            is_config = path.suffix == ".json"
            shutil.copy(path if is_config else base / "open_clip_config.json", home / "open_clip_config.json")
            weights = base / "open_clip_model.safetensors" if is_config else path
            shutil.copy(weights, home / "open_clip_model.safetensors")
            sources[path.name] = str(home)
        elif path.suffix == ".json":
            shutil.copy(path, home / "config.json")
            shutil.copy(base / "crowsonkb_micro.pkl", home)
            sources[path.name] = str(home / "crowsonkb_micro.pkl")
        else:
            shutil.copy(path, home)
            shutil.copy(base / "crowsonkb_micro.json", home / "config.json")
            shutil.copy(base / "micro.json", home)
            sources[path.name] = str(home / path.name)
    return sources


@pytest.fixture(scope="module")
def outcomes(shared_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process made of every file, by the file's name."""
    hostile, place = shared_weights / "hostile", tmp_path_factory.mktemp("hostile")
    for marker in Path("/tmp").glob(MARKERS):
        marker.unlink()
    warm = place / "warm"
    warm.mkdir()
    shutil.copy(hostile / "base" / "open_clip_config.json", warm)
    shutil.copy(hostile / "base" / "open_clip_model.safetensors", warm)
    shutil.copy(hostile / "base" / "mljku_micro.pt", place / "warm.pt")
    shutil.copy(hostile / "base" / "micro.json", place / "micro.json")
    shutil.copy(hostile / "base" / "crowsonkb_micro.pkl", place / "warm.pkl")
    shutil.copy(hostile / "base" / "crowsonkb_micro.json", place / "config.json")
    sources = prepare(hostile, place)
    cases = [[str(place / name), 64, 1 << 20] for name in ("warm", "warm.pt", "warm.pkl")]
    for name, source in sources.items():
        size = Path(source).stat().st_size if Path(source).is_file() else 1 << 20
        cases.append([source, 64 if name.startswith(MORE_MEMORY) else 16, size])
    worker = Path(__file__).with_name("hostile_worker.py")
    done = subprocess.run(
        [sys.executable, worker], input=json.dumps(cases), capture_output=True, text=True, cwd=hostile, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    controls = {name: told[str(place / name)] for name in ("warm", "warm.pt", "warm.pkl")}
    return controls | {name: told[source] for name, source in sources.items()}


def test_the_controls_load(outcomes: dict[str, dict[str, Any]]) -> None:
    for name in ("warm", "warm.pt", "warm.pkl", *LOADS):
        assert outcomes[name]["outcome"] == "loaded", outcomes[name]


def test_every_other_file_is_refused_in_one_line(outcomes: dict[str, dict[str, Any]]) -> None:
    rest = {name: told for name, told in outcomes.items() if name not in LOADS and not name.startswith("warm")}
    assert len(rest) > 100
    wrong = {name: told for name, told in rest.items() if told["outcome"] != "refused" or "\n" in told["said"]}
    assert not wrong
    assert max(len(told["said"]) for told in rest.values()) < 900


def test_nothing_in_them_was_run(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes
    assert not list(Path("/tmp").glob(MARKERS))


def test_the_line_names_the_fault(outcomes: dict[str, dict[str, Any]]) -> None:
    wrong = {
        name: outcomes[name]["said"]
        for name, parts in SAYS.items()
        if not all(p in outcomes[name]["said"] for p in parts)
    }
    assert not wrong
