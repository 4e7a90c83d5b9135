"""What a user asks for beyond a method: numbers, beta, rules, adjust, clip, mixtures, chance, methods of
their own; memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.cli.main import run
from tests import oracle
from tests.big import write_big
from tests.conftest import FAMILIES
from tests.refusals import assert_refused
from tests.small_models import in_diffusers, small_model

U = "model.diffusion_model."
FIRST, PROJ = f"{U}input_blocks.0.0.weight", f"{U}input_blocks.1.1.proj_in.weight"


@pytest.fixture
def models(tmp_path):
    """Five small models and their files, a.safetensors to e.safetensors."""
    found = [small_model(seed=seed) for seed in range(5)]
    for letter, model in zip("abcde", found, strict=True):
        save_file(model, tmp_path / f"{letter}.safetensors")
    return found


def command(capsys, folder, monkeypatch, text):
    """Run `blockmerge TEXT` in a folder, and give back the result's tensors, the JSON and the recipe."""
    monkeypatch.chdir(folder)
    assert run([*text.split(), "-o", "out.safetensors", "--json", "--overwrite"]) == 0, (
        capsys.readouterr().err
    )
    result = json.loads(capsys.readouterr().out)
    with safe_open("out.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["blockmerge.recipe"])
    return load_file("out.safetensors"), result, recipe


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(oracle.bits(one[name]), oracle.bits(other[name])) for name in one
    )


def step_off(out, exact, *models):
    """The largest error, in steps of the output at the size of the largest input."""
    size = torch.stack([exact.abs(), *(model.double().abs() for model in models)]).amax(0)
    return ((out.double() - exact).abs() / oracle.step_at(size, out.dtype)).max()


A, B, C = "a.safetensors", "b.safetensors", "c.safetensors"


@pytest.mark.parametrize(
    ("text", "python"),
    [
        (f"{A} {B} {C} -m triple_sum -w 0.3 --weights-beta IN00-M00=0.2",
         {"method": "triple_sum", "weights": 0.3, "weights_beta": "IN00-M00=0.2"}),
        (f"{A} {B} {C} -m sum_twice -p high_res --preset-beta low_res --set-beta BASE=0.25,OUT11=1",
         {"method": "sum_twice", "preset": "high_res", "preset_beta": "low_res", "changes_beta": "BASE=0.25,OUT11=1"}),
        (f"{A} {B} {C} -m extract -w 0.5 --gamma 2.5", {"method": "extract", "weights": 0.5, "gamma": 2.5}),
        (f"{A} {B} {C} d.safetensors e.safetensors -m average --ratios 2,1,1,1,1", {"method": "average", "ratios": [2, 1, 1, 1, 1]}),
        (f"{A} {B} {C} d.safetensors -m ties -w 0.8 --density 0.5", {"method": "ties", "weights": 0.8, "density": 0.5}),
        (f"{A} {B} -m dare -w 1 --drop-rate 0.9 --seed 7", {"method": "dare", "weights": 1, "drop_rate": 0.9, "seed": 7}),
        (f"{A} -m add_noise -w 0.1 --seed 7", {"method": "add_noise", "weights": 0.1, "seed": 7}),
        (f"{A} {B} -w random(0.2,0.8) --seed 11", {"weights": "random(0.2,0.8)", "seed": 11}),
        (f"{A} {B} {C} -m add_difference -w 1 --clip --adjust 1,2,3,4,5,6,7,8 --rules OUT11::0.25,IN01:attn1:skip",
         {"method": "add_difference", "weights": 1, "clip": True, "adjust": "1,2,3,4,5,6,7,8", "rules": "OUT11::0.25,IN01:attn1:skip"}),
        (f"{A} {B} -w 0.5 --set M00=skip", {"weights": 0.5, "changes": "M00=skip"}),
    ],
)  # fmt: skip
def test_the_command_python_and_a_repetition_from_the_metadata_agree(
    models, capsys, tmp_path, monkeypatch, text, python
):
    out, result, recipe = command(capsys, tmp_path, monkeypatch, text)
    count = len(result["models"])
    blockmerge.merge(
        *[f"{letter}.safetensors" for letter in "abcde"[:count]], output="python.safetensors", **python
    )
    assert same(out, load_file("python.safetensors"))
    assert same(out, blockmerge.merge_state_dicts(*models[:count], **python))
    again = {
        key: recipe[key]
        for key in ("method", "weights", "rules", "adjust", "clip", "vae", "dtype", "allow_nonfinite")
    }
    if recipe["weights_beta"] is not None:
        again["weights_beta"] = recipe["weights_beta"]
    blockmerge.merge(*recipe["models"], output="again.safetensors", **again, **recipe["numbers"])
    assert same(out, load_file("again.safetensors"))
    with safe_open("again.safetensors", "pt") as file:
        assert json.loads(file.metadata()["blockmerge.recipe"]) == {**recipe, "preset": None, "asked": {}}
    assert result["method"] == recipe["method"] == python.get("method", "weighted_sum")
    assert (result["weights"], result["weights_beta"]) == (recipe["weights"], recipe["weights_beta"])
    assert (result["weights_beta"] is not None) == (
        result["method"] in ("triple_sum", "sum_twice", "extract")
    )
    tensors = result["tensors"]
    assert sum(
        tensors[key] for key in ("computed", "from_a", "from_b", "from_c", "from_others", "from_vae")
    ) == len(out)


def test_copies_of_c_are_counted(models, capsys, tmp_path, monkeypatch):
    out, result, _ = command(
        capsys, tmp_path, monkeypatch, f"{A} {B} {C} -m triple_sum -w IN01=1 --weights-beta OUT11=1"
    )
    for name, tensor in out.items():
        assert torch.equal(tensor, models[{"IN01": 1, "OUT11": 2}.get(oracle.block(name, "sd1"), 0)][name])
    of_c = [name for name in out if oracle.block(name, "sd1") == "OUT11"]
    assert result["tensors"]["from_c"] == len(of_c) > 0
    assert result["tensors"]["computed"] == 0
    assert result["weights_beta"]["OUT11"] == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{A} {B} -m add_difference -w 1", "add_difference merges 3 models; 2 given"),
        (f"{A} {B} {C} -w 1", "weighted_sum merges 2 models; 3 given"),
        (f"{A} {B} -m model_stock -w 1", "model_stock merges 3 models or more; 2 given"),
        (f"{A} -m average", "one model given; merging takes two"),
        (f"{A} {B} -m wieghted_sum -w 1", "unknown method 'wieghted_sum'; did you mean 'weighted_sum'? ('blockmerge methods' lists them)"),
        (f"{A} {B} -w 1 --weights-beta 0.5", "weighted_sum takes no 'beta'"),
        (f"{A} {B} -w 1 --set-beta IN01=1", "weighted_sum takes no 'beta'"),
        (f"{A} {B} -w 1 --gamma 2", "unknown argument 'gamma': weighted_sum has no such number"),
        (f"{A} {B} {C} -m extract -w 1 --gamma=-1", "extract needs a number of at least 0 as gamma: found -1"),
        (f"{A} {B} {C} -m extract -w 1 --gamma nan", "extract needs a number of at least 0 as gamma: found nan"),
        (f"{A} {B} -m dare -w 1 --drop-rate 1", "dare needs a number from 0 to below 1 as drop_rate: found 1"),
        (f"{A} {B} -m ties -w 1 --density 1.5", "ties needs a number from 0 to 1 as density: found 1.5"),
        (f"{A} {B} {C} -m average --ratios 2,1", "average: ratios are numbers, one for each model, whose sum is not 0; 2 numbers for 3 models"),
        (f"{A} {B} -m average --ratios 1e308,1e308", "whose sum is not 0; the sum of [1e+308, 1e+308] is too large"),
        (f"{A} {B} -m average --ratios 1,inf", "whose sum is not 0; [1.0, inf] are not all finite"),
        (f"{A} {B} -m average --ratios 1,-1", "whose sum is not 0; the sum of [1.0, -1.0] is 0"),
        (f"{A} {B} -m average --ratios 1,x", "whose sum is not 0; 'x' is not a number"),
        (f"{A} {B} {C} -m triple_sum -w 1 --weights-beta IN12=1", ["--weights-beta", "IN12"]),
        (f"{A} {B} {C} -m triple_sum -w 1 --preset-beta nothing", "nothing"),
        (f"{A} {B} {C} -m triple_sum -w 1 --preset-beta high_res --weights-beta 1", ["both a preset and weights are given for beta"]),
        (f"{A} {B} -w 1 --rules OUT03:attn", ["element rule 1", ">>OUT03:attn<<"]),
        (f"{A} {B} -w 1 --rules OUT03:attn:much", ["element rule 1", ">>much<<"]),
        (f"{A} {B} -w 1 --rules OUT12::1", ["element rule 1", ">>OUT12<<"]),
        (f"{A} {B} -w 1 --adjust 1,2,x", ["adjust '1,2,x'", "OUT2 is 'x'"]),
        (f"{A} {B} -w 1 --adjust 1,2,3,4,5,6,7,8,9", "9 numbers given; there are eight"),
        (f"{A} -m scale -w 0.5 --clip", "scale merges 1 model: there is no B to clip to"),
        (f"{A} {B} -w 1 --number limit", "cannot read --number 'limit': write NAME=VALUE"),
        (f"{A} {B} -w 1 --number limit=2", "unknown argument 'limit': weighted_sum has no such number"),
        (f"{A} {B} -p high_res@x", "high_res@x"),
    ],
)  # fmt: skip
def test_what_is_refused(models, capsys, tmp_path, text, says):
    assert_refused(capsys, tmp_path, *text.split(), "-o", "out.safetensors", says=says)


# -- rules, adjust, clip -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_element_rules_take_ldm_names_whatever_the_naming(family, naming):
    a, b = (small_model(family, torch.float32, seed) for seed in range(2))
    rules = "IN00-IN05:in_layers:0.25, NOT IN01 BASE:norm:1, M00:proj:skip, OUT00-OUT11:NOT out_layers:-0.5, BASE:in_proj:0.75".replace(
        "OUT11", "OUT08" if family == "sdxl" else "OUT11"
    )
    wanted = {}
    for name in a:
        block, weight = oracle.block(name, family), 0.5
        if block in ("IN00", "IN01", "IN02", "IN03", "IN04", "IN05") and "in_layers" in name:
            weight = 0.25
        if block not in ("IN01", "BASE") and "norm" in name:
            weight = 1
        if block == "M00" and "proj" in name:
            weight = 0
        if block.startswith("OUT") and "out_layers" not in name:
            weight = -0.5
        if block == "BASE" and "in_proj" in name:
            weight = 0.75
        wanted[name] = ((1 - weight) * a[name].double() + weight * b[name].double()).float()
    if naming == "diffusers":
        a, b, wanted = (in_diffusers(tensors, family) for tensors in (a, b, wanted))
    merged = blockmerge.merge_state_dicts(a, b, weights=0.5, rules=rules, vae="blend")
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-6), name


def adjusted(name, values, numbers, family):
    """SuperMerger's fineman, as methods.md has it."""
    into, out, out2, contrast, *colours = numbers
    rows = {
        "sd1": [[-1, 1 / 3, 2 / 3], [1, 1, 0], [0, -1, -1], [1, 0, 1]],
        "sdxl": [[0, 0, 1], [1, 0, 0], [-1, -1, 0], [-1, 1, 0]],
    }
    shift = [
        contrast,
        *(
            torch.tensor(colours, dtype=torch.float64) @ torch.tensor(rows[family], dtype=torch.float64)
        ).tolist(),
    ]
    factor = {
        "input_blocks.0.0.weight": 1 - 0.01 * into, "input_blocks.0.0.bias": 1 + 0.02 * into, "out.0.weight": 1 - 0.01 * out,
        "out.0.bias": 1 + 0.02 * out, "out.2.weight": 1 - 0.01 * out2,
    }.get(name.removeprefix(U), 1)  # fmt: skip
    return values * factor + (
        0.02 * torch.tensor(shift, dtype=torch.float64) if name == f"{U}out.2.bias" else 0
    )


@settings(max_examples=12)
@given(
    numbers=st.lists(st.floats(-5, 5).map(lambda number: round(number, 3)), min_size=8, max_size=8),
    family=st.sampled_from(["sd1", "sdxl"]),
    weight=st.sampled_from([0, 0.3, 1]),
    channels=st.sampled_from([(4, 4), (9, 4), (4, 9)]),
    dtypes=st.sampled_from(
        [("float16", "float16"), ("float16", "float32"), ("float32", "float32"), ("bfloat16", "float16")]
    ),
)
def test_adjust_is_its_definition_and_rounds_once(
    tmp_path_factory, numbers, family, weight, channels, dtypes
):
    if family == "sdxl":
        channels = (4, 4)
    folder = tmp_path_factory.getbasetemp()
    a, b = (small_model(family, getattr(torch, dtype), seed) for seed, dtype in enumerate(dtypes))
    for model, width in ((a, channels[0]), (b, channels[1])):
        if width > 4:
            model[FIRST] = torch.cat(
                [model[FIRST], torch.full((8, width - 4, 3, 3), 0.7, dtype=model[FIRST].dtype)], dim=1
            )
    given = {"weights": weight, "vae": "blend", "adjust": ",".join(map(str, numbers))}
    blockmerge.merge(a, b, output=folder / "out.safetensors", overwrite=True, **given)
    out = load_file(folder / "out.safetensors")
    assert same(out, blockmerge.merge_state_dicts(a, b, **given))
    for name, tensor in out.items():
        ours, theirs = a[name].double(), b[name].double()
        if ours.shape != theirs.shape:
            extra = max(ours, theirs, key=lambda one: one.shape[1])[:, 4:]
            ours, theirs = (torch.cat([one[:, :4], extra], dim=1) for one in (ours, theirs))
            exact = torch.cat([(1 - weight) * ours[:, :4] + weight * theirs[:, :4], extra], dim=1)
        else:
            exact = (1 - weight) * ours + weight * theirs
        exact = adjusted(name, exact, numbers, family)
        if tensor.dtype == torch.float32:
            assert step_off(tensor, exact, ours, theirs) <= 1, name
        else:  # the nearest there is, up to the error of float32
            near = exact.to(tensor.dtype).double()
            error = 4e-7 * torch.stack([exact.abs(), ours.abs(), theirs.abs()]).amax(0)
            assert ((tensor.double() - exact).abs() <= (near - exact).abs() + error + 1e-9).all(), name


def test_adjust_needs_four_output_channels(models, capsys, tmp_path):
    for letter, model in zip("ab", models, strict=False):
        save_file({**model, f"{U}out.2.bias": torch.zeros(8)}, tmp_path / f"{letter}.safetensors")
    says = [f"{U}out.2.bias (shape [8]: adjust sets the colours of 4 channels)"]
    assert_refused(
        capsys, tmp_path, A, B, "-w", "0.5", "--adjust", "0,0,0,1", "-o", "out.safetensors", says=says
    )


@pytest.mark.parametrize(
    ("method", "weights", "beta"),
    [
        ("add_difference", 1.5, {}),
        ("slerp", 1.5, {}),
        ("average", 0.8, {}),
        ("triple_sum", 0, {"weights_beta": 1}),
    ],
)
def test_clip_limits_to_what_lies_between_a_and_b(models, tmp_path, method, weights, beta):
    some = models[: blockmerge.methods.METHODS[method].models or 4]
    given = {"method": method, "weights": weights, "vae": "blend", **beta}
    free = blockmerge.merge_state_dicts(*some, **given)
    blockmerge.merge(*some, output=tmp_path / "out.safetensors", clip=True, **given)
    out = load_file(tmp_path / "out.safetensors")
    assert same(out, blockmerge.merge_state_dicts(*some, clip=True, **given))
    for name, tensor in out.items():
        low, high = (
            torch.minimum(models[0][name], models[1][name]),
            torch.maximum(models[0][name], models[1][name]),
        )
        assert torch.equal(tensor, free[name].clamp(low, high)), name
    assert not same(out, free)


# -- mixtures and chance -------------------------------------------------------------------------------------


def test_presets_add_up(models, capsys, tmp_path, monkeypatch):
    out, result, _ = command(capsys, tmp_path, monkeypatch, f"{A} {B} -p high_res@0.6 -p GRAD_A@0.4")
    one, other = (blockmerge.load_preset(name) for name in ("high_res", "GRAD_A"))
    weights = {block: 0.6 * one[block] + 0.4 * other[block] for block in oracle.SD}
    assert result["weights"] == pytest.approx(weights)
    for name, tensor in out.items():
        if not name.startswith("first_stage_model."):
            weight = weights[oracle.block(name, "sd1")]
            ours, theirs = models[0][name].double(), models[1][name].double()
            assert step_off(tensor, (1 - weight) * ours + weight * theirs, ours, theirs) <= 1
    assert result["preset"] == "high_res@0.6+GRAD_A@0.4"


def test_chance_follows_from_the_seed(models, capsys, tmp_path, monkeypatch):
    for text in ("-w random", "-m dare -w 0.5", "-m add_noise -w 0.5"):
        files = A if "noise" in text else f"{A} {B}"
        first, other, again = (
            command(capsys, tmp_path, monkeypatch, f"{files} {text} --seed {seed}") for seed in (1, 2, 1)
        )
        assert same(first[0], again[0])
        assert not same(first[0], other[0])
        assert first[2] == again[2] != other[2]


# -- methods of one's own ------------------------------------------------------------------------------------

SOURCE = """
import blockmerge

SEEN = set()

def mix(a, b, alpha, share):
    SEEN.add(tuple(a.shape))
    return a + alpha * share * (b - a)

@blockmerge.merge_method()
def element(a, b, *, alpha, share=1.0):
    assert a.dim() == 1
    return mix(a, b, alpha, share)

@blockmerge.merge_method(locality="row")
def row(a, b, *, alpha, share=1.0):
    return mix(a, b, alpha, share)

@blockmerge.merge_method(locality="tensor")
def tensor(a, b, *, alpha, share=1.0, seed=0):
    return mix(a, b, alpha, share)

@blockmerge.merge_method()
def shapeless(a, b, *, alpha):
    return a[:1]

@blockmerge.merge_method(locality="tensor")
def raising(a, b, *, alpha):
    raise OSError("no such luck")

@blockmerge.merge_method()
def dividing(a, b, *, alpha):
    return a / 0
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    name = f"own_of_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("locality", ["element", "row", "tensor"])
def test_a_method_of_ones_own_merges_files(models, own, capsys, tmp_path, monkeypatch, locality):
    text = f"{A} {B} -m {own}:{locality} --number share=0.5 -w 0.6 --vae blend"
    out, result, recipe = command(capsys, tmp_path, monkeypatch, text)
    assert result["method"] == f"{own}:{locality}"
    assert recipe["numbers"]["share"] == 0.5
    for name, tensor in out.items():
        ours, theirs = models[0][name].double(), models[1][name].double()
        assert step_off(tensor, ours + 0.3 * (theirs - ours), ours, theirs) <= 1, name
    function = getattr(__import__(own), locality)
    given = {"weights": 0.6, "share": 0.5, "vae": "blend"}
    assert same(out, blockmerge.merge_state_dicts(*models[:2], method=function, **given))
    seen = __import__(own).SEEN
    seen.clear()
    other = [in_diffusers(model, "sd1") for model in models[:2]]
    assert same(in_diffusers(out, "sd1"), blockmerge.merge_state_dicts(*other, method=function, **given))
    if locality == "tensor":
        assert seen <= {tuple(tensor.shape) for tensor in out.values()}
        assert "seed" in recipe["numbers"]
    __import__("sys").modules.pop(own)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "shapeless -w 0.5",
            [
                "shapeless returned shape [1] for tensors of shape [",
                "must return a tensor of the shape it gets (at ",
            ],
        ),
        ("raising -w 0.5", "raising failed: OSError: no such luck (at "),
        (
            "dividing -w 0.5",
            [
                "would hold NaN or infinity",
                "dividing makes NaN of finite values, or some too large for F16) and ",
            ],
        ),
        ("element -w 0.5 --number share=much", "element needs a number as share: found much"),
        (
            "element -w 0.5 --number shore=1",
            ["unknown argument 'shore': ", "element has no such number; did you mean 'share'?"],
        ),
        ("element", "how much of B?"),
        ("missing -w 0.5", "has no 'missing'"),
    ],
)
def test_methods_of_ones_own_that_fail_leave_nothing(models, own, capsys, tmp_path, monkeypatch, text, says):
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    assert_refused(capsys, tmp_path, A, B, "-o", "out.safetensors", "-m", *f"{own}:{text}".split(), says=says)


A_METHOD = "a method is a name, a function decorated with @blockmerge.merge_method() or a Method"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"rules": 5},
            "rules are a text, as in 'OUT03-OUT05:attn2:0.5', a list of such texts, or ElementRules; int given",
        ),
        ({"adjust": 1}, "adjust is eight numbers, as in '0,0,0,1' or [0, 0, 0, 1], or an Adjust; int given"),
        ({"clip": "yes"}, "clip is True or False; str given"),
        ({"wide": 1}, "unknown argument 'wide': weighted_sum has no such number"),
        (
            {"methd": "ties"},
            "unknown argument 'methd': weighted_sum has no such number; did you mean 'method'?",
        ),
        (
            {"method": "ties", "densty": 1},
            "unknown argument 'densty': ties has no such number; did you mean 'density'?",
        ),
        ({"method": None}, f"{A_METHOD}; NoneType given"),
        ({"method": {"x": 1}}, f"{A_METHOD}; dict given"),
        ({"method": "ties", "density": True}, "ties needs a number from 0 to 1 as density: found True"),
        (
            {"method": "average", "ratios": [True, 1]},
            "average: ratios are numbers, one for each model, whose sum is not 0; 'True' is not a number",
        ),
        ({"method": "nosuch"}, "unknown method 'nosuch' ('blockmerge methods' lists them)"),
    ],
)
def test_arguments_that_are_wrong_are_named(models, tmp_path, given, says):
    for merge, output in (
        (blockmerge.merge_state_dicts, {}),
        (blockmerge.merge, {"output": tmp_path / "out.safetensors"}),
    ):
        with pytest.raises(blockmerge.RecipeError) as caught:
            merge(*models[:2], weights=0.5, **given, **output)
        assert str(caught.value) == says


def test_flags_are_no_texts(models, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"kept")
    with pytest.raises(blockmerge.RecipeError, match=r"^overwrite is True or False; str given$"):
        blockmerge.merge(*models[:2], weights=0.5, output=output, overwrite="no")
    assert output.read_bytes() == b"kept"
    with pytest.raises(blockmerge.RecipeError, match=r"^check_finite is True or False; str given$"):
        blockmerge.merge_state_dicts(*models[:2], weights=0.5, check_finite="no")


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory(tmp_path, monkeypatch):
    """However large a tensor is, for methods that cut it; a few times the tensor, for those that do not."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from harness import peak_memory

    size = 96  # megabytes of the one large tensor
    for letter, value in (("a", b"\x00\x3c"), ("b", b"\x00\x40"), ("c", b"\x00\x38")):
        write_big(tmp_path / f"{letter}.safetensors", value, size)
    files = [tmp_path / f"{letter}.safetensors" for letter in "abc"]
    code = "blockmerge.merge(*sys.argv[2:], output=sys.argv[2] + '.out.safetensors', overwrite=True, weights=0.5, method=sys.argv[1], threads=2)"
    more = {}
    for method, count in (("add_difference", 3), ("extract", 3), ("slerp", 2)):
        loaded, peak = peak_memory(code, method, *files[:count])
        more[method] = peak - loaded
    assert more["add_difference"] < 60, more
    assert more["extract"] < 90, more
    assert size < more["slerp"] < 3 * size + 60, more
