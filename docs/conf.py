"""The site: Sphinx with furo and myst; API pages come from the docstrings, read without
importing the package.

``make docs`` builds it with warnings as errors. A nightly test runs the tutorials and
compares what they print.
"""

import ast
import tomllib
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src" / "cloob"
_INIT = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))

project = "cloob"
author = "The cloob developers"
copyright = "2026, the cloob developers"
release = version = next(
    node.value.value  # type: ignore[attr-defined]
    for node in _INIT.body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
)

extensions = ["myst_parser", "autoapi.extension", "sphinx_copybutton"]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]
# ref.python: more than one attribute is named as a built-in type, such as `bytes`.
suppress_warnings = ["autoapi.python_import_resolution", "ref.python"]
if not (
    HERE.parent / "benchmarks" / "frozen" / "records.jsonl.gz"
).is_file():  # an sdist has no records to link to
    suppress_warnings.append("myst.xref_missing")

nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

# --- API pages: of the modules that modules.txt lists ---

autoapi_dirs = [str(SOURCE)]
# What no page shows is not read.
autoapi_ignore = [
    f"*/cloob/{folder}/*"
    for folder in ("commands", "evaluation/report", "models/weights")
]
autoapi_root = "api"
autoapi_add_toctree_entry = False
autoapi_template_dir = "_templates/autoapi"
autoapi_options = ["members", "show-inheritance", "imported-members"]

API = set((HERE / "modules.txt").read_text(encoding="utf-8").split())
FACES = {
    "cloob.functional",
    "cloob.objective",
}  # pages that also show what their modules import and name in `__all__`


def imported_names(module: str) -> dict[str, str]:
    """Where a module imports the names of its ``__all__`` from, by the names that they
    have in it.
    """
    path = SOURCE.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    named = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and "__all__" in ast.unparse(node)
    )
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    homes = {
        alias.name: f"{node.module}.{alias.name}"
        for node in imports
        for alias in node.names
    }
    return {
        f"{module}.{name}": homes[name]
        for name in ast.literal_eval(named)
        if name in homes
    }


# Other names of what is documented: `cloob.load_model` is that of `cloob.models.load`.
HOMES = imported_names("cloob") | {
    home: name for face in FACES for name, home in imported_names(face).items()
}

HOMES |= {"cloob.evaluation.embed.Reader": "cloob.data.batch.Reader"}
HOMES |= dict.fromkeys(
    ("Encoder", "cloob.evaluation.embed.Encoder"), "cloob.models.encoder.DualEncoder"
)


def skip_member(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool:
    """Whether a module has no page, or a name is left out of its module's page."""
    if what in ("module", "package"):
        return obj.id not in API
    return skip or (obj.imported and obj.id.rpartition(".")[0] not in FACES)


def google_style(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Napoleon, but for an attribute's docstring, of which it reads ``words: more
    words`` as a type.
    """
    if what not in ("attribute", "property", "data"):
        lines[:] = GoogleDocstring(
            lines, Config(), app, what, name, obj, options
        ).lines()  # type: ignore[arg-type]


def at_home(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Resolves a reference by another name of what is documented."""
    home = HOMES.get(node.get("reftarget"))
    if node.get("refdomain") != "py" or home is None:
        return None
    return env.domains["py"].resolve_xref(
        env, node["refdoc"], app.builder, "obj", home, node, content
    )


def setup(app: Any) -> None:
    """Connects the choice of API pages, their docstrings and their links."""
    app.connect("autoapi-skip-member", skip_member)
    app.connect("autodoc-process-docstring", google_style)
    app.connect("missing-reference", at_home)


# Strict (`-n`) about names of this package. Those of others need their inventories, and
# a network; aliases of types and type variables have no entry of their own.
_OTHERS = (
    "abc torch numpy np PIL collections contextlib pathlib typing types argparse"
    " open_clip sentence_transformers sklearn transformers"
)
nitpick_ignore_regex = [
    (r"py:.*", rf"({'|'.join(_OTHERS.split())})\..*"),
    (
        r"py:.*",
        r"(cloob\.[\w.]+\.)?(Contrast|Parts?|Precision|Scale|Reason|Backend|\w*Name|LoadModel|ContextFactory)",
    ),
    (
        r"py:.*",
        r"(cloob\.[\w.]+\.)?(Merged|Shown|Standardise|PlainEncoder|Tokenize|Fingerprint|AnyHead|Module|[A-Z])",
    ),
    (
        r"py:.*",
        r"(cloob\.[\w.]+\.)?(GivenPairs|GivenOptimizer|ModelFiles|Float32|Encodings?|Transformer|Side|Part|MakeOptimizer|Metrics|Groups|Targets|OnEpoch|Stop|Heads|Kind|Size|Where|Given|Decisions|LeftOut|HeadObjective|Encoder|Reader|Form|Item|Trained|CustomParts|Transform|settings\.\w+|Ge|Interval|Pixels|Decay|Count|Share|AtLeastOne|Positive|NotNegative|ObjectiveSettings|Settings)|hashlib\..*|pyarrow\..*",
    ),
    (
        r"py:.*",
        r"(cloob\.[\w.]+\.)?_[\w.]+|cuda|callable|optional|(u?int|float|bool)\d*",
    ),
    (
        r"py:.*",
        r"cloob\.(search|models\.encoding)\b.*|retrieval|ModelChanged|UpdateOptions|ChosenModel|(subject|report|backends|batch)\.\w+",
    ),
    (
        r"py:.*",
        r"(all|math.isfinite|at_least|DECAY|NAMED|POSITIVE|RANGE|SHARE|Annotated|Rule|_DEVICE)\b.*",
    ),  # fields
    # Classes and modules that have no page: who reads the signature finds them in the
    # source.
    (
        r"py:.*",
        r"cloob\.(cache|scales|models\.(runs|aligned|weights\.keymap)|evaluation\.(report|results)|data\.vectors)\b.*",
    ),
]

# --- HTML ---

html_theme = "furo"
html_title = f"cloob {release}"
_URLS = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))
_URLS = _URLS["project"].get("urls", {})
html_theme_options = {}
if "Repository" in _URLS:
    html_theme_options = {
        "source_repository": _URLS["Repository"],
        "source_branch": "main",
        "source_directory": "docs/",
    }
html_static_path = ["_static"]
html_css_files = ["cloob.css"]
html_js_files = ["versions.js"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/versions.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
