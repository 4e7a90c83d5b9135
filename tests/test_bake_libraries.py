"""What is baked does what the libraries do that define LoRAs: peft, lycoris-lora, and diffusers' pipelines, whose
text encoders and U-Nets give the same with a LoRA baked in as with it loaded.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import blockmerge
from blockmerge import CheckpointError
from blockmerge.demo import make_state_dicts
from tests.adapter_names import modules
from tests.other_names import in_diffusers
from tests.test_bake import SDXL, UNET, model_of
from tests.test_live import diffusers_unet, output_of

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": (SDXL["linear"], "mid_block.attentions.0.proj_in", lambda: nn.Linear(32, 32)),
    "1x1": (SDXL["1x1"], "down_blocks.1.resnets.0.conv_shortcut", lambda: nn.Conv2d(8, 16, 1)),
    "3x3": (SDXL["3x3"], "down_blocks.1.resnets.0.conv1", lambda: nn.Conv2d(8, 16, 3, padding=1)),
}
INPUTS = {"linear": (5, 32), "1x1": (2, 8, 6, 6), "3x3": (2, 8, 6, 6)}


@pytest.fixture(scope="module")
def model():
    return model_of("sdxl", SDXL.values(), dtype=torch.float32)


def layer_of(tensors, name):
    """A layer with its weight and bias in a model."""
    place, _, make = LAYERS[name]
    layer = make()
    layer.weight.data, layer.bias.data = tensors[place.weight].clone(), tensors[place.bias].clone()
    return layer


def output(layer, name):
    x = torch.randn(INPUTS[name], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return layer(x)


def randomise(parameters, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def baked(model, lora, path, strength=1.0):
    blockmerge.bake(model, [(lora, strength)], output=path / "out.safetensors", overwrite=True)
    return load_file(path / "out.safetensors")


def assert_close(found, wanted):
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4), (found - wanted).abs().max()


# -- peft ----------------------------------------------------------------------------------------------------


def with_names(layers):
    """A module that has layers under names with dots."""
    root = nn.Module()
    for name, layer in layers.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        at.add_module(last, layer)
    return root


PEFT = {
    "lora": {},
    "rank and alpha by name": {
        "rank_pattern": {"conv1": 5},
        "alpha_pattern": {"conv_shortcut": 7, "attentions.0.proj_in": 1},
    },
    "rslora": {"use_rslora": True},
    "a bias": {"lora_bias": True},
    "dora": {"use_dora": True},
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # of its own biases
@pytest.mark.parametrize("case", PEFT)
def test_peft(model, tmp_path, case):
    names = {name: dotted for name, (_, dotted, _) in LAYERS.items()}
    root = with_names({dotted: layer_of(model, name) for name, dotted in names.items()})
    config = LoraConfig(r=3, lora_alpha=2, target_modules=list(names.values()), **PEFT[case])
    wrapped = get_peft_model(root, config).eval()
    factors = {name: one for name, one in wrapped.named_parameters() if "lora_" in name}
    randomise(one for name, one in factors.items() if "magnitude" not in name)
    for name, one in factors.items():
        if "magnitude" in name:
            one.data = one.data * 1.3 + 0.1
    wrapped.save_pretrained(tmp_path)
    out = baked(model, tmp_path / "adapter_model.safetensors", tmp_path)
    for name, dotted in names.items():
        assert_close(output(layer_of(out, name), name), output(root.get_submodule(dotted), name))


def test_other_methods_of_peft_are_refused_by_name(model, tmp_path):
    root = with_names({LAYERS["linear"][1]: layer_of(model, "linear")})
    get_peft_model(root, LoHaConfig(r=2, target_modules=["proj_in"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="LOHA"):
        baked(model, tmp_path / "adapter_model.safetensors", tmp_path)


# -- lycoris -------------------------------------------------------------------------------------------------

LYCORIS = {
    "locon": (LoConModule, {}),
    "locon rs": (LoConModule, {"rs_lora": True}),
    "locon tucker": (LoConModule, {"use_tucker": True}),
    "loha": (LohaModule, {}),
    "loha tucker": (LohaModule, {"use_tucker": True}),
    "lokr": (LokrModule, {"factor": 2}),
    "lokr both": (LokrModule, {"factor": 4, "lora_dim": 1, "decompose_both": True}),
    "lokr whole": (LokrModule, {"full_matrix": True}),
    "lokr tucker": (LokrModule, {"factor": 2, "use_tucker": True}),
    "dora": (LoConModule, {"weight_decompose": True}),
    "dora by inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "dora of loha": (LohaModule, {"weight_decompose": True}),
    "dora of lokr": (LokrModule, {"weight_decompose": True, "factor": 2}),
    "full": (FullModule, {}),
    "glora": (GLoRAModule, {}),
    "ia3": (IA3Module, {}),
    "ia3 on input": (IA3Module, {"train_on_input": True}),
    "oft": (DiagOFTModule, {"rescaled": True}),
    "oft with a limit": (DiagOFTModule, {"constraint": 0.01}),
    "boft": (ButterflyOFTModule, {}),
}


@pytest.mark.parametrize("case", LYCORIS)
@pytest.mark.parametrize("name", LAYERS)
def test_lycoris(model, tmp_path, name, case):
    kind, options = LYCORIS[case]
    place, _, _ = LAYERS[name]
    module = kind(place.module, layer_of(model, name), 1.0, **{"lora_dim": 2, "alpha": 1.5, **options}).eval()
    if kind is FullModule:
        module.apply_to()  # its weight is the layer's then
    trained = {name: one for name, one in module.named_parameters() if not name.startswith("org_module")}
    randomise(trained.values())
    if options.get("weight_decompose"):
        module.dora_scale.data = module.dora_scale.data.abs() + 0.5
    lora = {f"{place.module}.{part}": one.detach().clone() for part, one in module.state_dict().items()}
    out = baked(model, lora, tmp_path)
    assert_close(output(layer_of(out, name), name), output(module, name))


@pytest.mark.parametrize("layer", [nn.GroupNorm(4, 16), nn.LayerNorm(16)])
def test_norms_of_lycoris(model, tmp_path, layer):
    stem = f"{UNET}input_blocks.4.0.in_layers.0"
    layer.weight.data, layer.bias.data = torch.randn(16), torch.randn(16)
    module = NormModule("x", layer, 1.0).eval()
    randomise([module.w_norm, module.b_norm])
    name = "lora_unet_down_blocks_1_resnets_0_norm1"
    lora = {f"{name}.{part}": one.detach() for part, one in module.state_dict().items()}
    own = {**model, f"{stem}.weight": layer.weight.detach(), f"{stem}.bias": layer.bias.detach()}
    x = torch.randn(2, 16, 5, 16)
    with torch.no_grad():
        wanted = module(x)
        out = baked(own, lora, tmp_path)
        layer.weight.data, layer.bias.data = out[f"{stem}.weight"], out[f"{stem}.bias"]
        assert_close(layer(x), wanted)


# -- diffusers -----------------------------------------------------------------------------------------------


def text_encoder(tensors, component):
    """A text encoder with the weights of a thin model under diffusers' names."""
    own = {name.partition("/")[2]: one for name, one in tensors.items() if name.startswith(f"{component}/")}
    width = own["text_model.final_layer_norm.weight"].shape[0]
    is_second = component == "text_encoder_2"
    config = CLIPTextConfig(
        vocab_size=len(own["text_model.embeddings.token_embedding.weight"]),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=32 if is_second else 12,
        num_attention_heads=4,
        hidden_act="gelu" if is_second else "quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
    )
    encoder = (CLIPTextModelWithProjection if is_second else CLIPTextModel)(config).eval()
    wanted = encoder.state_dict()
    if not any(name.startswith("text_model.") for name in wanted):  # as transformers 5 has it
        own = {name.removeprefix("text_model."): one for name, one in own.items()}
    encoder.load_state_dict({name: own[name] for name in wanted})
    return encoder


def pipeline(family, tensors):
    found = in_diffusers(tensors, family)
    parts = {
        "unet": diffusers_unet(family, tensors).eval(),
        "text_encoder": text_encoder(found, "text_encoder"),
    }
    nothing = dict.fromkeys(("vae", "tokenizer", "scheduler", "feature_extractor"))
    if family == "sd1":
        return StableDiffusionPipeline(**parts, **nothing, safety_checker=None, requires_safety_checker=False)
    parts["text_encoder_2"] = text_encoder(found, "text_encoder_2")
    return StableDiffusionXLPipeline(**parts, **nothing, tokenizer_2=None)


def outputs_of(family, pipe):
    """What the U-Net and the text encoders give."""
    words = torch.randint(3, 1000, (2, 77), generator=torch.Generator().manual_seed(0))
    found = {"unet": output_of(family, pipe.unet)}
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(pipe, name, None) is not None:
                given = getattr(pipe, name)(words, output_hidden_states=True)
                found |= {f"{name} {number}": one for number, one in enumerate(given.hidden_states)}
                found[f"{name} pooled"] = given[0] if name == "text_encoder_2" else given.pooler_output
    return found


def lora_for(family, program, tensors):
    """A LoRA of random values, with the modules that a program's LoRA has."""
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for name, said in modules(family, program).items():
        rows, inputs, *kernel = tensors[said.ldm].shape
        rows = rows // 3 if said.rows else rows
        up, down = (rows, 2, *[1] * len(kernel)), (2, inputs, *kernel)
        lora[f"{name}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.15
        lora[f"{name}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.15
        lora[f"{name}.alpha"] = torch.tensor(1.5)
    return lora


@pytest.mark.parametrize(
    ("family", "program", "strength"), [("sd1", "sd15-kohya-locon", -0.5), ("sdxl", "sdxl-kohya", 0.7)]
)
def test_pipelines(tmp_path, family, program, strength):
    tensors = make_state_dicts(family)[0]
    save_file(lora_for(family, program, tensors), tmp_path / "lora.safetensors")
    pipe = pipeline(family, tensors)
    before = outputs_of(family, pipe)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="x")
    pipe.set_adapters("x", strength)
    wanted = outputs_of(family, pipe)
    out = baked(tensors, tmp_path / "lora.safetensors", tmp_path, strength)
    found = outputs_of(family, pipeline(family, out))
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert_close(one, wanted[name])
        if not name.endswith(" 0"):  # what is looked up
            assert (one - before[name]).abs().max() > 1e-2, name
    again = baked(tensors, saved_by_diffusers(pipe, tmp_path), tmp_path, strength)
    for name, one in out.items():
        assert torch.allclose(again[name], one, atol=1e-6), name


def saved_by_diffusers(pipe, path):
    """The pipeline's LoRA in diffusers' own spelling, with the alphas in its metadata."""
    parts = {
        name: getattr(pipe, name)
        for name in ("unet", "text_encoder", "text_encoder_2")
        if getattr(pipe, name, None) is not None
    }
    layers = {
        f"{name}_lora_layers": get_peft_model_state_dict(one, adapter_name="x") for name, one in parts.items()
    }
    pipe.save_lora_weights(
        path,
        **layers,
        **{f"{name}_lora_adapter_metadata": one.peft_config["x"].to_dict() for name, one in parts.items()},
    )
    return path / "pytorch_lora_weights.safetensors"
