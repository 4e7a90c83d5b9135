"""The cases, as data: any two values of the things that matter together, and corners chosen by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from blockmerge.methods import METHODS as LISTED
from tests.every_pair import every_pair
from tests.pinned.inputs import Source


@dataclass(frozen=True)
class Case:
    """What is called (`merge`, `convert`, `dicts` or `live`) with which models and arguments.

    `output` among these is ``"file"`` or ``"folder"``, and a Source stands for the path of that model.
    """

    group: str
    name: str
    call: str
    sources: tuple[Source, ...]
    options: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.group.partition(' ')[0]}/{self.name}"


FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
OUTPUT_DTYPES = ("keep", "fp16", "bf16", "fp32", "fp8_e4m3fn", "fp8_e5m2")
# In an order of their own: what is paired with what depends on it, and so what was pinned.
METHODS = {
    name: LISTED[name]
    for name in (
        *("weighted_sum", "sigmoid", "inverse_sigmoid", "slerp", "cosine_a", "cosine_b", "tensor_sum"),
        *("tensor_sum_columns", "scale", "add_noise", "add_difference", "triple_sum", "sum_twice"),
        *("train_difference", "smooth_add_difference", "extract", "average", "dare", "ties", "model_stock"),
    )
}
assert METHODS.keys() == LISTED.keys()
MODELS = {name: method.models or 3 for name, method in METHODS.items()}
NUMBERS = {
    "average": {"ratios": (2, 1, 3)},
    "ties": {"density": 0.4},
    "dare": {"drop_rate": 0.3, "seed": 5},
    "add_noise": {"seed": 5},
    "extract": {"gamma": 1.7},
}
WITH_BETA = [name for name, method in METHODS.items() if "beta" in method.weights]
NAMINGS = {
    "ldm": ("file", "file", "file"),
    "folders": ("folder", "folder", "folder"),
    "folder+file": ("folder", "file", "file"),
    "file+folder": ("file", "folder", "folder"),
}
BY_BLOCK = "BASE=0.3,IN00=0,IN01-IN05=0.6,M00=skip,OUT00-OUT08=1"
WEIGHTS = (
    {"weights": 0.4},
    {"preset": "high_res"},
    {"weights": BY_BLOCK, "changes": "OUT05=0.25"},
    {"weights": 0.75, "changes": "BASE=0.2"},
    {"preset": "GRAD_V", "changes": "BASE=1"},
    {"weights": {"BASE": 0.7, "IN01": 0.5, "OUT04": 0.35, "M00": 1}},
)
BETAS = (
    {"weights_beta": 0.3},
    {"preset_beta": "low_res", "changes_beta": "BASE=0.4"},
    {"weights_beta": "IN00-M00=0.2,OUT03-OUT05=0.6,OUT08=skip"},
)
ADJUST = "1,-2,0.5,3,1,0.5,-0.5,2"
RULES = "OUT03-OUT05:attn:0.8, NOT BASE:norm:0, M00:NOT proj:1"
VAES = {
    "file": Source("d", form="vae", dtype="fp32"),
    "pt": Source("d", form="vae-pt"),
    "folder": Source("d", form="vae-folder", dtype="bf16"),
    "model": Source("d", extras=("full",)),
}
CARRIED = Source("c", form="folder", extras=("carried",))
TO_FOLDER = {"naming": "diffusers", "output": "folder"}
TO_FILE = {"naming": "ldm", "output": "file"}


def models(count: int, forms: tuple[str, ...] = ("file",) * 3, **same: Any) -> tuple[Source, ...]:
    """A and B, or A to C, each in a form of its own."""
    return tuple(
        Source(letter, form=form, **same) for letter, form in zip("abc"[:count], forms, strict=False)
    )


def of_method(method: str, at: int) -> dict[str, Any]:
    """The arguments of a method: numbers of its own, and different ones of the weights each time."""
    beta = BETAS[at % len(BETAS)] if method in WITH_BETA else {}
    return {"method": method, **NUMBERS.get(method, {}), **WEIGHTS[at % len(WEIGHTS)], **beta}


def as_a(naming: str) -> dict[str, str]:
    """The kind of output that the first model is."""
    return {"output": "folder" if naming.startswith("folder") else "file"}


# -- merges of files and folders -----------------------------------------------------------------------------


def every_method() -> Iterator[Case]:
    dtypes = {
        **{dtype: (dtype,) * 3 for dtype in ("fp16", "bf16", "fp32", "mixed")},
        "fp16+fp32": ("fp16", "fp32", "bf16"),
    }
    rows = every_pair(tuple(METHODS), tuple(NAMINGS), tuple(dtypes), FAMILIES)
    for at, (method, naming, dtype, family) in enumerate(rows):
        sources = tuple(
            replace(source, dtype=own)
            for source, own in zip(
                models(MODELS[method], NAMINGS[naming], family=family), dtypes[dtype], strict=False
            )
        )
        group = f"method {METHODS[method].locality}"
        name = f"{method}-{naming}-{dtype}-{family}"
        yield Case(group, name, "merge", sources, {**as_a(naming), **of_method(method, at)})


def outputs() -> Iterator[Case]:
    vaes = {**{word: word for word in ("auto", "a", "b", "blend")}, **VAES}
    methods = ("weighted_sum", "slerp", "tensor_sum", "add_difference", "dare")
    kinds = {"same": {}, "ldm": TO_FILE, "diffusers": TO_FOLDER}
    rows = every_pair(("file", "folder", "zip"), tuple(kinds), OUTPUT_DTYPES, tuple(vaes), methods)
    for at, (form, kind, dtype, vae, method) in enumerate(rows):
        sources = models(MODELS[method], (form, "file", "folder"), dtype=("fp16", "fp32", "mixed")[at % 3])
        options = {**as_a(form), **kinds[kind], "vae": vaes[vae], "dtype": dtype, **of_method(method, at)}
        yield Case("output", f"{form}-{kind}-{dtype}-{vae}-{method}", "merge", sources, options)


def unets_alone() -> Iterator[Case]:
    forms = ("unet", "diffusers-unet", "unet-folder", "file")
    for at, (a, b, family) in enumerate(every_pair(forms, forms, ("sd1", "sdxl"))):
        sources = (Source("a", family, form=a), Source("b", family, "bf16", b))
        options = {"output": "file", **of_method(("weighted_sum", "slerp", "tensor_sum_columns")[at % 3], at)}
        yield Case("bare", f"{a}-{b}-{family}", "merge", sources, options)
    for name, a, b, options in (
        ("to-folder", "unet", "diffusers-unet", TO_FOLDER),
        ("to-ldm", "diffusers-unet", "unet", TO_FILE),
        ("no-vae-to-take", "unet", "unet", {"output": "file", "vae": "b"}),
    ):
        yield Case("bare", name, "merge", models(2, (a, b)), {"weights": 0.4, **options})


def wider_first_convolutions() -> Iterator[Case]:
    methods = (
        *("weighted_sum", "slerp", "cosine_a", "tensor_sum", "tensor_sum_columns", "dare", "add_difference"),
        *("extract", "smooth_add_difference", "ties", "model_stock"),
    )
    rows = every_pair((949, 494, 844, 484), methods, tuple(NAMINGS), (False, True))
    for at, (channels, method, naming, treated) in enumerate(rows):
        family = ("sd1", "sdxl", "sd2")[at % 3]
        sources = with_channels(channels, models(MODELS[method], NAMINGS[naming], family=family))
        options = {**as_a(naming), **of_method(method, at)}
        options |= {"weights": 0.4, "changes": None, "preset": None}  # the first convolution is to be merged
        options |= {"clip": True, "adjust": ADJUST, "dtype": "fp32"} if treated else {}
        name = f"{channels}-{method}-{naming}-{family}{'-treated' if treated else ''}"
        yield Case("wide", name, "merge", sources, options)
    for channels in (8, 9):
        for form in ("file", "folder"):
            options = {"output": form, "method": "add_noise", "weights": 0.1, "seed": 3}
            sources = (Source(form=form, channels=channels),)
            yield Case("wide", f"{channels}-noise-{form}", "merge", sources, options)
    depth = Source("b", "sd2", channels=5, extras=("depth",))
    options = {"output": "file", "weights": 0.4}
    yield Case("wide", "depth", "merge", (Source("a", "sd2"), depth), options)
    yield Case("wide", "8-and-9", "merge", (Source(channels=8), Source("b", channels=9)), options)


def with_channels(channels: int, sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """The models with the input channels that the digits say, A's first."""
    pairs = zip(sources, str(channels), strict=False)
    return tuple(replace(source, channels=int(digit)) for source, digit in pairs)


# -- weights, rules, clip and adjust -------------------------------------------------------------------------


def treated() -> Iterator[Case]:
    methods = (
        "weighted_sum",
        "add_difference",
        "add_noise",
        "tensor_sum",
        "extract",
        "triple_sum",
        "sum_twice",
    )
    rules = {"none": "", "rules": RULES, "skipping": ":in_layers:skip"}
    given = {
        "flat": {"weights": 0.4},
        "zero": {"weights": 0},
        "one": {"weights": 1},
        "random": {"weights": "random(0.2,0.8)", "seed": 7},
        "beyond": {"weights": 1.5, "changes": "OUT04=-0.5"},
        "skip": {"weights": "BASE=skip,IN00-OUT08=0.6,IN01=skip"},
        "preset": {"preset": ["high_res@0.6", "GRAD_A@0.4"]},
        "list": {"weights": ",".join(["0.2", "0.7", "0.5", "1", "0"] * 5)},
    }
    rows = every_pair(tuple(given), methods, FAMILIES, tuple(rules), (False, True), ("", ADJUST))
    for at, (weights, method, family, rule, clip, adjust) in enumerate(rows):
        form = ("file", "folder")[at % 2]
        options = (
            of_method(method, 2 * at) | {"preset": None, "weights": None, "changes": None} | given[weights]
        )
        if weights == "list" and family == "sdxl":
            options["weights"] = ",".join(["0.2", "0.7", "0.5", "1"] * 5)
        options |= {
            "output": form,
            "rules": rules[rule],
            "adjust": adjust,
            "clip": clip and MODELS[method] > 1,
        }
        name = f"{weights}-{method}-{family}-{rule}{'-clip' if clip else ''}{'-adjust' if adjust else ''}"
        dtype = ("fp16", "bf16", "fp32")[at % 3]
        yield Case(
            "treated", name, "merge", models(MODELS[method], (form,) * 3, family=family, dtype=dtype), options
        )


def presets() -> Iterator[Case]:
    names = ("high_res", "low_res", "GRAD_V", "COSINE", "WRAP08", "MID12_50", "ALL_B", "R_SMOOTHSTEP*3")
    for preset, family, sdxl_map in every_pair(names, FAMILIES, (None, "name", "resolution")):
        options = {"output": "file", "preset": preset, "sdxl_map": sdxl_map}
        yield Case("preset", f"{preset}-{family}-{sdxl_map}", "merge", models(2, family=family), options)


# -- EMA copies, and what else is special about a model ------------------------------------------------------


def ema() -> Iterator[Case]:
    rows = every_pair(("drop", "keep", "use"), ("a", "b", "ab"), ("ldm", "diffusers"), ("keep", "fp32"))
    for at, (choice, who, naming, dtype) in enumerate(rows):
        sources = tuple(Source(letter, extras=("ema",) if letter in who else ()) for letter in "ab")
        options = {**(TO_FOLDER if naming == "diffusers" else TO_FILE), "ema": choice, "dtype": dtype}
        options |= of_method(("weighted_sum", "dare", "slerp")[at % 3], at)
        yield Case("special", f"ema-{choice}-{who}-{naming}-{dtype}", "merge", sources, options)


def special() -> Iterator[Case]:
    a, b, folder = Source(), Source("b"), Source("b", form="folder")
    a_sd2, folder_sd2 = Source("a", "sd2"), Source("b", "sd2", form="folder")

    def with_(*extras: str, of: Source = a) -> Source:
        return replace(of, extras=extras)

    less_sd2 = with_("less-text", of=a_sd2)
    for name, first, second, options in (
        ("ema-wide", with_("ema"), Source("b", channels=9, extras=("ema",)), {"ema": "keep"}),
        ("ema-only", with_("ema-only"), b, {}),
        ("leftovers", with_("leftovers"), with_("leftovers", of=b), {"dtype": "fp32"}),
        ("markers-a", with_("markers"), b, {"dtype": "bf16"}),
        ("markers-b", a, with_("markers", of=b), {}),
        ("markers-to-folder", with_("markers"), folder, TO_FOLDER),
        ("float-ids", with_("float-ids"), b, {"dtype": "fp32"}),
        ("broken-ids", with_("broken-ids"), b, {}),
        ("broken-ids-to-folder", with_("broken-ids"), b, TO_FOLDER),
        ("nai", with_("nai"), b, {}),
        ("nai-b", a, with_("nai", of=b), {}),
        ("no-vae-a", with_("no-vae"), b, {}),
        ("no-vae-b", folder, with_("no-vae", of=b), {"output": "folder"}),
        ("no-text-a", with_("no-text"), b, {"dtype": "fp32"}),
        ("no-text-folder", Source(form="folder", extras=("no-text",)), b, {"output": "folder"}),
        ("less-text-a", with_("less-text"), b, {}),
        ("less-text-b", a, with_("less-text", of=b), {}),
        ("less-text-ab", with_("less-text"), Source("b", dtype="fp32", extras=("less-text",)), {}),
        ("less-text-sd2", less_sd2, folder_sd2, {}),
        ("less-text-to-folder", less_sd2, folder_sd2, TO_FOLDER),
        ("ints-a", with_("ints"), b, {}),
        ("ints-b", a, with_("ints", of=b), {"dtype": "bf16"}),
        ("nan", a, with_("nan", of=b), {}),
        ("nan-allowed", a, with_("nan", of=b), {"allow_nonfinite": True}),
        ("metadata", with_("noted"), b, {}),
        ("metadata-of-b", a, with_("noted", of=b), {}),
        ("metadata-unet", Source(form="unet", extras=("noted",)), b, {}),
        ("metadata-other-family", Source("a", "sdxl", extras=("noted",)), Source("b", "sdxl"), {}),
        ("carried-a", replace(CARRIED, letter="a"), b, {"output": "folder"}),
        ("carried-b", a, replace(CARRIED, letter="b"), TO_FOLDER),
        ("carried-to-file", replace(CARRIED, letter="a"), folder, {}),
        ("configs", a, b, {**TO_FOLDER, "configs": CARRIED}),
        ("old-names", Source(form="bin", extras=("old-names",)), folder, {"output": "folder"}),
        ("old-names-sd2", Source("a", "sd2", form="folder", extras=("old-names",)), Source("b", "sd2"), {}),
        ("bin-shards", Source(form="bin"), Source("b", form="shards"), {"output": "folder"}),
        ("shards-bin", Source("a", "sdxl", form="shards"), Source("b", "sdxl", form="bin"), TO_FOLDER),
        ("variant", Source(dtype="fp32", form="fp16-variant"), b, {"output": "folder", "variant": "fp16"}),
        ("memory-opened", Source(form="memory"), Source("b", form="opened"), {}),
        ("opened-memory-to-folder", Source(form="opened"), Source("b", form="memory"), TO_FOLDER),
        ("legacy-zip", Source(form="legacy"), Source("b", form="zip"), {"vae": "blend"}),
        (
            "zip-legacy",
            Source("a", "sdxl", "fp32", "zip"),
            Source("b", "sdxl", form="legacy"),
            {"dtype": "fp16"},
        ),
        ("fp8", Source(dtype="fp8"), Source("b", dtype="fp8"), {}),
        ("fp8-and-fp16", Source(dtype="fp8"), b, {"vae": "blend"}),
        ("fp64", Source(dtype="fp64"), Source("b", dtype="fp64"), {}),
        ("fp64-and-fp16", a, Source("b", dtype="fp64"), {"vae": "blend"}),
        ("same-file", a, a, {}),
        ("families", a, Source("b", "sdxl"), {}),
    ):
        yield Case("special", name, "merge", (first, second), {"output": "file", "weights": 0.4, **options})


def whole() -> Iterator[Case]:
    """Enough of a model for several pieces of output and chunks of input."""
    for method, naming, family, dtype in (
        ("weighted_sum", "ldm", "sdxl", "fp16"),
        ("weighted_sum", "folder+file", "sd2", "fp32"),
        ("slerp", "ldm", "sd1", "fp32"),
        ("cosine_a", "folder+file", "sd1", "fp16"),
        ("tensor_sum", "folders", "sd2", "fp32"),
        ("tensor_sum_columns", "file+folder", "sd1", "fp16"),
        ("add_noise", "folders", "sdxl_refiner", "fp16"),
        ("dare", "file+folder", "sdxl", "fp16"),
        ("extract", "ldm", "sd2", "fp32"),
        ("ties", "folder+file", "sd1", "fp16"),
    ):
        sources = models(MODELS[method], NAMINGS[naming], family=family, dtype=dtype, extras=("full",))
        options = {**as_a(naming), **of_method(method, 1)}
        yield Case("whole", f"{method}-{naming}-{family}-{dtype}", "merge", sources, options)


# -- conversions ---------------------------------------------------------------------------------------------


def conversions_of_forms() -> Iterator[Case]:
    forms = (
        *("file", "folder", "zip", "legacy", "bin", "shards"),
        *("unet", "diffusers-unet", "unet-folder", "memory"),
    )
    rows = every_pair(forms, FAMILIES, ("ldm", "diffusers"), OUTPUT_DTYPES)
    for at, (form, family, naming, dtype) in enumerate(rows):
        sources = (Source("b", family, ("fp16", "mixed", "fp32", "bf16")[at % 4], form),)
        options = {**(TO_FOLDER if naming == "diffusers" else TO_FILE), "dtype": dtype}
        yield Case("convert forms", f"{form}-{family}-{naming}-{dtype}", "convert", sources, options)


def conversions_of_extras() -> Iterator[Case]:
    extras = ("ema", "ema-only", "leftovers", "markers", "float-ids")
    rows = every_pair(extras, ("ldm", "diffusers"), ("drop", "keep", "use"), (False, True))
    for at, (extra, naming, choice, prune) in enumerate(rows):
        has = {extra: None, "ema": None} if choice == "use" and extra != "ema-only" else {extra: None}
        sources = (Source(extras=tuple(has), form=("file", "zip")[at % 2]),)
        options = {**(TO_FOLDER if naming == "diffusers" else TO_FILE), "ema": choice, "prune": prune}
        name = f"{extra}-{naming}-{choice}{'-prune' if prune else ''}"
        yield Case("convert extras", name, "convert", sources, options)


def special_conversions() -> Iterator[Case]:
    own, full = replace(CARRIED, letter="a"), ("full",)
    for name, source, options in (
        ("as-it-is", Source(extras=("noted",)), {}),
        ("folder-as-it-is", own, {"output": "folder"}),
        ("folder-to-file", own, {}),
        ("pruned-folder", own, {"output": "folder", "prune": True}),
        ("unet-as-it-is", Source(form="diffusers-unet"), {}),
        ("configs", Source(), {**TO_FOLDER, "configs": CARRIED}),
        (
            "marked-configs",
            Source("a", "sdxl", extras=("markers",)),
            {**TO_FOLDER, "configs": replace(CARRIED, family="sdxl")},
        ),
        ("broken-ids", Source(extras=("broken-ids",)), {"dtype": "bf16"}),
        ("nai", Source(extras=("nai",)), TO_FOLDER),
        ("old-names", Source(form="folder", extras=("old-names",)), TO_FILE),
        ("variant", Source("a", "sd2", "fp32", "fp16-variant"), {**TO_FILE, "variant": "fp16"}),
        ("inpainting", Source(channels=9), TO_FOLDER),
        ("inpainting-back", Source(channels=9, form="folder"), TO_FILE),
        ("depth-pruned", Source("a", "sd2", channels=5, extras=("depth", "leftovers")), {"prune": True}),
        ("vae-file", Source(), {"vae": VAES["file"]}),
        ("vae-for-none", Source(extras=("no-vae",)), {"vae": VAES["pt"]}),
        ("vae-folder", Source(form="folder"), {"vae": VAES["folder"], "output": "folder"}),
        ("vae-to-folder", Source(extras=("no-vae",)), {"vae": VAES["model"], **TO_FOLDER}),
        ("fp8-to-fp32", Source(dtype="fp8"), {"dtype": "fp32"}),
        ("fp64-to-fp16", Source(dtype="fp64"), {"dtype": "fp16", **TO_FOLDER}),
        ("nan", Source(extras=("nan",)), {"dtype": "bf16"}),
        ("nan-allowed", Source(extras=("nan",)), {"dtype": "bf16", "allow_nonfinite": True}),
        ("sd1-whole", Source(extras=full), TO_FOLDER),
        ("sd2-whole", Source("a", "sd2", extras=full), {"dtype": "fp32", **TO_FOLDER}),
        ("sd2-whole-back", Source("a", "sd2", "fp32", "folder", extras=full), {"dtype": "fp16", **TO_FILE}),
        ("sdxl-whole-back", Source("a", "sdxl", form="folder", extras=full), TO_FILE),
    ):
        yield Case("convert extras", name, "convert", (source,), {"output": "file", **options})


# -- in memory -----------------------------------------------------------------------------------------------


def state_dicts() -> Iterator[Case]:
    namings = {"ldm": ("file",) * 3, "diffusers": ("folder",) * 3, "mixed": ("file", "folder", "file")}
    for at, (method, naming, dtype) in enumerate(
        every_pair(tuple(METHODS), tuple(namings), ("fp16", "fp32"))
    ):
        sources = models(MODELS[method], namings[naming], family=FAMILIES[at % 4], dtype=dtype)
        yield Case("dicts", f"{method}-{naming}-{dtype}", "dicts", sources, of_method(method, at))
    methods = ("weighted_sum", "slerp", "dare", "tensor_sum", "add_noise", "extract")
    rows = every_pair(("unet", "diffusers-unet", "folder"), methods, ("plain", "wide", "rules"))
    for at, (form, method, what) in enumerate(rows):
        sources = models(MODELS[method], (form, "file", "unet"), dtype=("fp16", "bf16", "mixed")[at % 3])
        sources = with_channels((944, 494)[at % 2], sources) if what == "wide" else sources
        options = of_method(method, at)
        options |= {"clip": len(sources) > 1, "adjust": ADJUST, "rules": RULES} if what == "rules" else {}
        yield Case("dicts", f"{form}-{method}-{what}", "dicts", sources, options)
    for vae in ("a", "b", "blend"):
        options = {"weights": 0.4, "vae": vae}
        yield Case("dicts", f"vae-{vae}", "dicts", models(2, ("file", "folder")), options)


def live() -> Iterator[Case]:
    forms = {
        "unet": ("unet", "file", "file"),
        "file": ("file", "folder", "unet"),
        "diffusers-unet": ("diffusers-unet", "unet", "file"),
    }
    applied = (
        [{"weights": 0.4}],
        [{"preset": "high_res"}, {"weights": {"OUT05": 0.7, "IN01": 0.2}, "keep": True}],
        [{"weights": BY_BLOCK}, {"changes": "OUT03-OUT05=-0.5", "keep": True}],
        [{"weights": 1}, {"weights": "random", "seed": 3}],
    )
    rows = every_pair(tuple(METHODS), tuple(forms), ("fp16", "bf16", "fp32"))
    for at, (method, form, dtype) in enumerate(rows):
        family = FAMILIES[at % 4]
        beta = {"weights_beta": "IN00-M00=0.3,OUT03-OUT08=0.6"} if method in WITH_BETA else {}
        first, *further = applied[at % 4]
        options = {"method": method, **NUMBERS.get(method, {}), "apply": [{**first, **beta}, *further]}
        options |= {"module": Source("d", family, dtype, form), "channels_last": at % 5 == 0}
        sources = models(MODELS[method], forms[form], family=family, dtype=dtype)
        yield Case("live", f"{method}-{form}-{dtype}", "live", sources, options)
    methods = ("weighted_sum", "slerp", "dare", "extract", "tensor_sum_columns", "ties")
    for at, (channels, method) in enumerate(every_pair((944, 494, 999), methods)):
        sources = with_channels(channels, models(MODELS[method], ("file", "unet", "file")))
        module = Source("d", form=("unet", "diffusers-unet")[at % 2], channels=9)
        options = {"method": method, **NUMBERS.get(method, {}), "module": module, "apply": [{"weights": 0.4}]}
        yield Case("live", f"{channels}-{method}", "live", sources, options)


def whole_where_configs_are_made(case: Case) -> Case:
    """No config makes a part of a model: where a folder gets new ones, the models are whole."""
    a, naming = case.sources[0], case.options.get("naming")
    is_folder = a.form in ("folder", "bin", "shards", "fp16-variant")
    is_wider = max(source.channels for source in case.sources) > a.channels
    is_made = naming == "diffusers" and not is_folder
    if case.call not in ("merge", "convert") or not (is_made or (is_folder and naming != "ldm" and is_wider)):
        return case
    options = {
        name: _full(value) if isinstance(value, Source) and value.form == "folder" else value
        for name, value in case.options.items()
    }
    return replace(case, sources=tuple(map(_full, case.sources)), options=options)


def _full(source: Source) -> Source:
    return source if "full" in source.extras else replace(source, extras=(*source.extras, "full"))


ALL = (
    *every_method(),
    *outputs(),
    *unets_alone(),
    *wider_first_convolutions(),
    *treated(),
    *presets(),
    *ema(),
    *special(),
    *whole(),
    *conversions_of_forms(),
    *conversions_of_extras(),
    *special_conversions(),
    *state_dicts(),
    *live(),
)
CASES = list(map(whole_where_configs_are_made, ALL))
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
assert len({case.id for case in CASES}) == len(CASES)
