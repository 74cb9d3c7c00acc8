# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Loading models: every weight comes from the files, or one line says what does not; what the
pipelines, schedulers and VAEs may say; the parts' calls against the libraries' own."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from layouts import make_xl_model
from safetensors.torch import load_file, save_file

import common
from common import InputError, Models, load_pipeline, load_pretrained, load_unet, weights_hash

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with NumPy 2
MODEL_PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture
def model(tmp_path):
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(TINY / "model", tmp_path / "model"))


@pytest.fixture(scope="module")
def xl_model(tmp_path_factory):
    """A random pipeline in SDXL's layout: two text encoders, pooled embedding, six size numbers."""
    return Path(make_xl_model(tmp_path_factory.mktemp("xl") / "model"))


def config(model, **changes):
    """What Models reads of a run's configuration."""
    settings = {"variant": None, "revision": None, "vae": None, "unet": None}
    settings |= {"precision": "fp32", "compile": False, "lora": 0, "model": str(model)}
    return SimpleNamespace(**(settings | changes))


def rewrite(folder, change):
    """Replace the weights of a safetensors file by change(weights)."""
    file = next(folder.glob("*.safetensors"))
    save_file(change(load_file(file)), file, {"format": "pt"})


def edit(file, remove=(), **changes):
    """Change or remove keys of a JSON file."""
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in settings.items() if k not in remove}))


def message(function, *args, **kwargs):
    """The text of the InputError that a call raises, which has to be one line."""
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def first_matrix(weights):
    return next(name for name in sorted(weights) if weights[name].ndim > 1)


# ---------------------------------------------------------------------- weights that do not fit
def without_first(weights):
    del weights[first_matrix(weights)]
    return weights


def with_one_more(weights):
    return weights | {"other.weight": torch.zeros(2)}


def with_other_shape(weights):
    name = first_matrix(weights)
    return weights | {name: weights[name][:-1].contiguous()}


def with_nan(weights):
    name = first_matrix(weights)
    weights[name].view(-1)[0] = float("nan")
    return weights


def with_prefix(weights):
    return {f"model.{name}": value for name, value in weights.items()}


CHANGES = [
    (without_first, "missing: {first}"),
    (with_one_more, "unexpected: other.weight"),
    (with_other_shape, "of another shape: {first}"),
    (with_nan, "not finite: {first}"),
    (with_prefix, "unexpected: model."),
]


@pytest.mark.parametrize("part", MODEL_PARTS)
@pytest.mark.parametrize("change, expected", CHANGES, ids=lambda x: getattr(x, "__name__", ""))
def test_wrong_weights_are_named(model, part, change, expected):
    first = first_matrix(load_file(next((model / part).glob("*.safetensors"))))
    rewrite(model / part, change)
    line = message(load_pipeline, str(model))
    assert f"the {part} of {model}" in line and expected.format(first=first) in line
    assert change is not with_prefix or "missing: " in line


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_wrong_weights_of_xl_are_named(xl_model, part, tmp_path):
    folder = Path(shutil.copytree(xl_model, tmp_path / "xl"))
    rewrite(folder / part, without_first)
    assert f"the {part} of {folder}" in message(load_pipeline, str(folder))


@pytest.mark.parametrize("change, expected", CHANGES, ids=lambda x: getattr(x, "__name__", ""))
def test_wrong_weights_of_a_reward_are_named(tmp_path, change, expected):
    from transformers import CLIPModel

    folder = Path(shutil.copytree(TINY / "reward", tmp_path / "reward"))
    first = first_matrix(load_file(folder / "model.safetensors"))
    rewrite(folder, change)
    line = message(load_pretrained, CLIPModel, str(folder), "reward")
    assert f"the reward of {folder}" in line and expected.format(first=first) in line


def test_a_reward_without_text_half(tmp_path):
    from transformers import CLIPModel

    folder = Path(shutil.copytree(TINY / "reward", tmp_path / "reward"))
    rewrite(folder, lambda w: {k: v for k, v in w.items() if not k.startswith("text")})
    assert "missing: text_model." in message(load_pretrained, CLIPModel, str(folder), "reward")


@pytest.mark.parametrize("part", MODEL_PARTS)
@pytest.mark.parametrize("broken", ["pickle", "cut", "gone"])
def test_files_that_cannot_be_read(model, part, broken):
    file = next((model / part).glob("*.safetensors"))
    if broken == "pickle":
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    elif broken == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        shutil.rmtree(model / part)
    line = message(load_pipeline, str(model))
    assert f"the {part} of {model} cannot be loaded" in line
    assert broken != "pickle" or "only .safetensors files are read" in line


# ------------------------------------------------------- weights that are written otherwise
def test_old_names_of_the_text_encoder_load(model):
    """Files of before transformers 5 have a prefix, and position_ids as a weight."""
    positions = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    rewrite(
        model / "text_encoder",
        lambda w: {f"text_model.{name}": value for name, value in w.items()} | positions,
    )
    old, new = load_pipeline(str(model)), load_pipeline(str(TINY / "model"))
    assert same_weights(old.text_encoder, new.text_encoder)


def test_position_ids_of_a_reward_load(tmp_path):
    from transformers import CLIPModel

    folder = Path(shutil.copytree(TINY / "reward", tmp_path / "reward"))
    names = [f"{half}_model.embeddings.position_ids" for half in ("text", "vision")]
    rewrite(folder, lambda w: w | {name: torch.arange(16)[None] for name in names})
    loaded = load_pretrained(CLIPModel, str(folder), "reward")
    assert same_weights(loaded, load_pretrained(CLIPModel, str(TINY / "reward"), "reward"))


def test_old_names_of_the_vae_load(model):
    """Before diffusers 0.13 its attention layers were called otherwise."""
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    count = 0

    def rename(name):
        nonlocal count
        for new, old in new_to_old.items():
            if f".attentions.0.{new}." in name:
                count += 1
                return name.replace(new, old)
        return name

    rewrite(model / "vae", lambda w: {rename(name): value for name, value in w.items()})
    assert count == 2 * 2 * 4
    old, new = load_pipeline(str(model)), load_pipeline(str(TINY / "model"))
    assert same_weights(old.vae, new.vae)


def test_tied_weights_load(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    tied = GPT2LMHeadModel(GPT2Config(**sizes))
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert same_weights(load_pretrained(GPT2LMHeadModel, str(tmp_path), "model"), tied)


def test_shards_load(model):
    pipe = load_pipeline(str(model))
    shutil.rmtree(model / "unet")
    shutil.rmtree(model / "text_encoder")
    pipe.unet.save_pretrained(model / "unet", max_shard_size="200KB")
    pipe.text_encoder.save_pretrained(model / "text_encoder", max_shard_size="100KB")
    shards = sorted((model / "unet").glob("*.safetensors"))
    assert len(shards) > 1 and len(list((model / "text_encoder").glob("*.safetensors"))) > 1
    sharded = load_pipeline(str(model))
    assert same_weights(pipe.unet, sharded.unet)
    assert same_weights(pipe.text_encoder, sharded.text_encoder)
    weights = load_file(shards[0])
    lost = first_matrix(weights)
    del weights[lost]
    save_file(weights, shards[0], {"format": "pt"})  # the index still lists it
    assert lost in message(load_pipeline, str(model))
    assert not torch.are_deterministic_algorithms_enabled()
    shards[0].unlink()
    assert f"the unet of {model} cannot be loaded" in message(load_pipeline, str(model))


@pytest.mark.parametrize("part", MODEL_PARTS)
def test_an_fp16_variant_loads(model, part):
    for name in MODEL_PARTS:
        file = next((model / name).glob("*.safetensors"))
        half = {k: v.half() for k, v in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    pipe = load_pipeline(str(model), variant="fp16")
    for name in MODEL_PARTS:
        expected = load_file(next((TINY / "model" / name).glob("*.safetensors")))
        actual = getattr(pipe, name).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[k], v.half().float()) for k, v in expected.items())
    assert "no file named" in message(load_pipeline, str(model))
    next((model / part).glob("*.fp16.safetensors")).unlink()
    assert f"the {part} of" in message(load_pipeline, str(model), variant="fp16")


def test_accelerate_is_not_asked_for(model):
    """A process in which the package (and peft, which imports it) is not there."""

    code = (
        "import sys; sys.modules.update(accelerate=None, peft=None)\n"
        f"sys.path.insert(0, {str(Path(common.__file__).parent)!r})\n"
        f"import common; common.load_pipeline({str(model)!r}); print('loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "loaded", done.stderr


# -------------------------------------------------------------------------------- tokenizers
@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"], ["vocab"], ["merges"]])
def test_a_tokenizer_without_its_files(model, kept):
    """transformers 5 makes a tokenizer of special tokens alone, and says nothing."""
    folder = model / "tokenizer"
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()
    if "vocab" in kept:
        (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    if "merges" in kept:
        (folder / "merges.txt").write_text("\n".join(" ".join(m) for m in bpe["merges"]))
    assert f"the tokenizer of {model}" in message(load_pipeline, str(model))


def test_a_tokenizer_of_two_files_loads(model):
    folder = model / "tokenizer"
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in bpe["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    actual, expected = (load_pipeline(str(m)).tokenizer for m in (model, TINY / "model"))
    texts = ["a red star on navy", "unknown wörds, 12!"]
    assert actual(texts).input_ids == expected(texts).input_ids


def test_a_tokenizer_larger_than_its_text_encoder(model):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(model / "tokenizer")
    assert "has 615 tokens, the text encoder 614" in message(load_pipeline, str(model))


@pytest.mark.parametrize("only_own", [True, False])
def test_code_of_a_tokenizer_is_never_run(model, only_own, monkeypatch, tmp_path):
    """Neither run nor asked about: stdin is a user who answers yes."""
    from transformers import AutoTokenizer

    ran = tmp_path / "ran"
    (model / "tokenizer" / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    settings = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    if only_own:
        settings["tokenizer_class"] = "Own"
    edit(model / "tokenizer" / "tokenizer_config.json", **settings)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    pipe = load_pipeline(str(model))  # names the class itself
    expected = load_pipeline(str(TINY / "model")).tokenizer
    assert pipe.tokenizer("a red star").input_ids == expected("a red star").input_ids
    try:
        auto = load_pretrained(AutoTokenizer, str(model / "tokenizer"), "tokenizer")
        assert auto("a red star").input_ids == expected("a red star").input_ids
    except InputError as error:
        assert "\n" not in str(error)
    assert not ran.exists() and sys.stdin.tell() == 0


# --------------------------------------------------------- pipelines: which parts they may have
@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("unet", ["unet", "MyUNet"], "its unet is unet.MyUNet, not diffusers.UNet2DConditionModel"),
        ("text_encoder", ["my_package", "CLIPTextModel"], "its text_encoder is my_package."),
        ("text_encoder", ["transformers", "T5EncoderModel"], "transformers.T5EncoderModel"),
        ("tokenizer", ["tokenizer", "Own"], "its tokenizer is tokenizer.Own"),
        ("vae", ["diffusers", "AutoencoderTiny"], "its vae is diffusers.AutoencoderTiny"),
        ("vae", [None, None], "its vae is absent, not diffusers.AutoencoderKL"),
        ("scheduler", ["scheduler", "MyScheduler"], "its scheduler is scheduler.MyScheduler"),
        ("scheduler", ["diffusers", "AutoencoderKL"], "its scheduler is diffusers.AutoencoderKL"),
        ("controlnet", ["controlnet", "Own"], "its controlnet is controlnet.Own, not absent"),
        ("_class_name", "FluxPipeline", "is a FluxPipeline, not Stable Diffusion 1.x, 2.x or XL"),
        ("_class_name", ["pipeline", "Own"], "not Stable Diffusion 1.x, 2.x or XL"),
    ],
)
def test_other_components_are_refused(model, name, value, expected):
    edit(model / "model_index.json", **{name: value})
    assert expected in message(load_pipeline, str(model))


def test_what_is_left_out_is_not_looked_at(model):
    edit(
        model / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["image_encoder", "Own"],
        tokenizer=["transformers", "CLIPTokenizerFast"],
        requires_safety_checker=True,
    )
    pipe = load_pipeline(str(model))
    assert pipe.safety_checker is None and pipe.image_encoder is None
    pipe("a star", num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize("name", ["nowhere", "nowhere/at/all", str(TINY / "reward")])
def test_no_pipeline(name):
    expected = f"--model {name} is no diffusers pipeline (no model_index.json)"
    assert message(load_pipeline, name).startswith(expected)


def test_a_loaded_pipeline_is_the_stock_one(model, xl_model):
    """The same images as from_pretrained gives, bit for bit."""
    from diffusers import DiffusionPipeline

    for folder in (model, xl_model):
        images = []
        stock = DiffusionPipeline.from_pretrained(
            folder, low_cpu_mem_usage=False, safety_checker=None
        )
        for pipe in (load_pipeline(str(folder)), stock.to(torch.float32)):
            pipe.set_progress_bar_config(disable=True)
            latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            kwargs = {"latents": latents, "num_inference_steps": 3, "output_type": "pt"}
            images.append(pipe("a red star on navy", **kwargs).images)
        assert type(pipe) is type(stock) and torch.equal(*images)
    assert load_pipeline(str(xl_model)).watermark is None


# ----------------------------------------------------------------------------------- schedulers
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETA_SCHEDULERS = [
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
]


def set_scheduler(model, name, **settings):
    edit(model / "model_index.json", scheduler=["diffusers", name])
    text = json.dumps({"_class_name": name, **settings})
    (model / "scheduler" / "scheduler_config.json").write_text(text)


@pytest.mark.parametrize("name", BETA_SCHEDULERS)
def test_schedulers_of_betas_are_accepted(model, name):
    set_scheduler(model, name, num_train_timesteps=1000, **SD_BETAS)
    models = Models(config(model), "cpu")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    assert models.alpha_bar.dtype == torch.float32 and models.prediction == "epsilon"
    assert torch.allclose(models.alpha_bar.double(), expected, rtol=1e-4)
    if name != "LMSDiscreteScheduler":  # without scipy DDPM stands in
        assert type(models.pipe.scheduler).__name__ == name


REFUSED = [
    ("EDMDPMSolverMultistepScheduler", {"sigma_max": 80.0}, "has no beta schedule"),
    ("EDMEulerScheduler", SD_BETAS, "has no plain beta schedule"),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "has no beta schedule"),
    ("FlowMatchEulerDiscreteScheduler", SD_BETAS, "has no plain beta schedule"),
    ("LCMScheduler", {}, "has no beta schedule"),
    ("DDIMScheduler", {"beta_start": 0.00085}, "has no beta schedule"),
    ("CogVideoXDDIMScheduler", SD_BETAS, "has no plain beta schedule"),
    ("UniPCMultistepScheduler", SD_BETAS | {"use_flow_sigmas": True}, "has no beta schedule"),
    ("EulerDiscreteScheduler", SD_BETAS | {"timestep_type": "continuous"}, "no beta schedule"),
    ("DDIMScheduler", SD_BETAS | {"beta_schedule": "own"}, "own"),
    ("DDIMScheduler", SD_BETAS | {"prediction_type": "sample"}, "predicts sample"),
    ("UniPCMultistepScheduler", SD_BETAS | {"prediction_type": "flow_prediction"}, "predicts flow"),
    ("NoSuchScheduler", SD_BETAS, "NoSuchScheduler"),
]


@pytest.mark.parametrize("name, settings, expected", REFUSED)
def test_other_schedulers_are_refused(model, name, settings, expected):
    set_scheduler(model, name, **settings)
    line = message(load_pipeline, str(model))
    assert expected in line and str(model) in line and "scheduler" in line


def test_the_class_in_the_scheduler_file_counts(model):
    name = "FlowMatchHeunDiscreteScheduler"
    edit(model / "scheduler" / "scheduler_config.json", _class_name=name)
    assert name in message(load_pipeline, str(model))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr_is_respected(model, name):
    """alpha_bar of arXiv 2305.08891, Algorithm 1, in double precision."""
    settings = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    set_scheduler(model, name, **SD_BETAS, **settings)
    models = Models(config(model), "cpu")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    assert models.alpha_bar[-1] == 0 and models.prediction == "v_prediction"
    assert torch.allclose(models.alpha_bar.double(), root**2, rtol=1e-3, atol=1e-8)


def test_trained_betas_are_respected(model):
    betas = torch.linspace(0.001, 0.01, 100).tolist()
    set_scheduler(model, "DDIMScheduler", trained_betas=betas, num_train_timesteps=100)
    expected = torch.cumprod(1 - torch.tensor(betas), 0)
    assert torch.allclose(Models(config(model), "cpu").alpha_bar, expected)


# -------------------------------------------------------------------- other VAEs, UNets, encoders
def test_vae_statistics_are_refused(model):
    edit(model / "vae" / "config.json", latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    assert "latents_mean or latents_std" in message(load_pipeline, str(model))
    own = TINY / "model"
    line = message(load_pipeline, str(own), vae=str(model / "vae"))
    assert f"--vae {model / 'vae'}" in line


def test_a_vae_without_scaling_factor_has_the_librarys(model):
    edit(model / "vae" / "config.json", remove=["scaling_factor"])
    assert load_pipeline(str(model)).vae.config.scaling_factor == 0.18215


def test_a_vae_of_another_class_is_refused(tmp_path):
    from diffusers import AutoencoderTiny

    channels = (16, 16, 16, 16)
    vae = AutoencoderTiny(encoder_block_out_channels=channels, decoder_block_out_channels=channels)
    vae.save_pretrained(tmp_path)
    line = message(load_pipeline, str(TINY / "model"), vae=str(tmp_path))
    assert "its class is AutoencoderTiny, not AutoencoderKL" in line and str(tmp_path) in line


def test_an_attention_mask_is_refused(model):
    edit(model / "text_encoder" / "config.json", use_attention_mask=True)
    assert "wants an attention mask" in message(load_pipeline, str(model))


def save_unet(folder, **changes):
    """A random UNet of the tiny model's sizes but for the changes."""
    from diffusers import UNet2DConditionModel

    settings = UNet2DConditionModel.load_config(TINY / "model", subfolder="unet") | changes
    UNet2DConditionModel.from_config(settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"in_channels": 9}, "its in_channels is 9, not 4"),
        ({"out_channels": 8}, "its out_channels is 8, not 4"),
        ({"cross_attention_dim": 96}, "its cross_attention_dim is 96, not 64"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 64,
            },
            "its addition_embed_type is text_time, not None",
        ),
    ],
)
def test_a_unet_that_does_not_fit(tmp_path, changes, expected):
    path = save_unet(tmp_path / "unet", **changes)
    own = load_pipeline(str(TINY / "model")).unet
    expected = f"--unet {path} does not fit --model: {expected}"
    assert message(load_unet, path, own) == expected
    assert message(load_pipeline, str(TINY / "model"), unet=path) == expected


def test_sample_size_matters_beside_another_unet_alone(tmp_path):
    """eval.py compares images of one size; training asks for --resolution."""
    path = save_unet(tmp_path / "unet", sample_size=12)
    own = load_pipeline(str(TINY / "model")).unet
    assert "its sample_size is 12, not 8" in message(load_unet, path, own)
    assert load_pipeline(str(TINY / "model"), unet=path).unet.config.sample_size == 12


def test_where_a_unet_may_lie(tmp_path):
    save_unet(tmp_path / "run" / "unet")
    own = load_pipeline(str(TINY / "model")).unet
    run, inside = (load_unet(path, own) for path in (tmp_path / "run", tmp_path / "run" / "unet"))
    assert same_weights(run, inside) and not same_weights(run, own)
    for path in ("nowhere", "runs/sft/unet", str(tmp_path / "gone")):
        assert message(load_unet, path, own) == f"--unet {path} does not exist"
    assert "no file named" in message(load_unet, str(TINY / "prompts"), own)


# ------------------------------------------------------------------------------------- weights_hash
def test_weights_hash_of_models(model, tmp_path):
    pipe, again = load_pipeline(str(model)), load_pipeline(str(TINY / "model"))
    for name, part in pipe.components.items():
        if part is not None:
            assert weights_hash(part) == weights_hash(getattr(again, name)), name
    before = weights_hash(pipe.unet)
    with torch.no_grad():
        bits = pipe.unet.conv_out.bias.view(torch.int32)
        bits[0] ^= 1  # the last bit of one weight
    assert weights_hash(pipe.unet) != before
    assert weights_hash(again.vae) != weights_hash(again.vae.half())


def test_weights_hash_of_schedulers_tokenizers_and_processors():
    from diffusers import DDIMScheduler, DDPMScheduler
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPProcessor

    assert weights_hash(DDIMScheduler()) == weights_hash(DDIMScheduler())
    others = [DDIMScheduler(beta_end=0.03), DDPMScheduler()]
    assert len({weights_hash(s) for s in (DDIMScheduler(), *others)}) == 3

    tokenizer = AutoTokenizer.from_pretrained(TINY / "reward")
    before = weights_hash(tokenizer)
    tokenizer(["a star"], padding="max_length", max_length=9, truncation=True)
    assert weights_hash(tokenizer) == before  # use does not change it
    tokenizer.model_max_length = 7
    shorter = weights_hash(tokenizer)
    tokenizer.add_tokens(["new"])
    assert len({before, shorter, weights_hash(tokenizer)}) == 3

    processor = CLIPImageProcessor.from_pretrained(TINY / "reward")
    before = weights_hash(processor)
    assert before == weights_hash(CLIPImageProcessor.from_pretrained(TINY / "reward"))
    both = CLIPProcessor(processor, AutoTokenizer.from_pretrained(TINY / "reward"))
    together = weights_hash(both)
    processor.image_mean = [0.0, 0.0, 0.0]
    assert weights_hash(processor) != before and weights_hash(both) != together


def test_weights_hash_of_a_pipeline(xl_model, tmp_path):
    pipe, again = load_pipeline(str(xl_model)), load_pipeline(str(xl_model))
    assert weights_hash(pipe) == weights_hash(again)
    again.register_to_config(force_zeros_for_empty_prompt=False)
    assert weights_hash(pipe) != weights_hash(again)
    again = load_pipeline(str(xl_model))
    with torch.no_grad():
        again.unet.conv_out.bias += 1
    assert weights_hash(pipe) != weights_hash(again)
    assert weights_hash(pipe, without=["unet"]) == weights_hash(again, without=["unet"])


# ------------------------------------------------------------------------------------------- Models
TEXTS = ["a red star on navy", "", "a blue ring on cream " * 9]


def embed(folder, which, texts):
    """The libraries alone: (all hidden states, output) of one of a pipeline's text encoders."""
    import transformers

    kind = "CLIPTextModelWithProjection" if which else "CLIPTextModel"
    encoder = getattr(transformers, kind).from_pretrained(folder, subfolder="text_encoder" + which)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, subfolder="tokenizer" + which)
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(texts, max_length=tokenizer.model_max_length, **padded).input_ids
    with torch.no_grad():
        return encoder(ids, output_hidden_states=True)


def test_prompts_of_sd_are_the_encoders_own():
    cond = Models(config(TINY / "model"), "cpu").encode_prompts(TEXTS)
    expected = embed(TINY / "model", "", TEXTS).last_hidden_state
    assert cond.keys() == {"encoder_hidden_states"}
    assert torch.equal(cond["encoder_hidden_states"], expected)


@pytest.mark.parametrize("zeros", [True, False])
def test_prompts_of_xl_are_the_encoders_own(xl_model, zeros, tmp_path):
    folder = Path(shutil.copytree(xl_model, tmp_path / "xl"))
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    cond = Models(config(folder), "cpu").encode_prompts(TEXTS)
    first, second = embed(folder, "", TEXTS), embed(folder, "_2", TEXTS)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    pooled = second.text_embeds
    if zeros:  # what the pipeline guides with where there is no prompt
        hidden[1] = 0
        pooled[1] = 0
    assert torch.equal(cond["encoder_hidden_states"], hidden)
    assert torch.equal(cond["text_embeds"], pooled)
    stock = Models(config(folder), "cpu").pipe
    guidance = stock.encode_prompt(TEXTS[0], device="cpu", do_classifier_free_guidance=True)
    assert torch.allclose(guidance[1][0], cond["encoder_hidden_states"][1], atol=1e-6)
    assert torch.allclose(guidance[3][0], cond["text_embeds"][1], atol=1e-6)


def test_images_are_the_vaes_mode(model):
    edit(model / "vae" / "config.json", shift_factor=0.25, scaling_factor=2.0)
    models = Models(config(model), "cpu")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = models.encode_images(pixels)
    with torch.no_grad():
        mean = models.vae.encode(pixels).latent_dist.mean
    assert torch.equal(latents, (mean - 0.25) * 2) and latents.dtype == torch.float32
    assert latents.shape[1:] == models.latent_shape(64) == (4, 8, 8)
    models.free_encoders()
    assert torch.equal(models.encode_images(pixels), latents)


def test_dtypes_of_the_parts(xl_model, tmp_path):
    sd = Models(config(TINY / "model", precision="bf16"), "cpu")
    assert {sd.vae.dtype, sd.encoders[0].dtype} == {torch.bfloat16}
    xl = Models(config(xl_model, precision="bf16"), "cpu")
    assert xl.vae.dtype == torch.float32  # it would overflow, its config says
    assert {encoder.dtype for encoder in xl.encoders} == {torch.bfloat16}
    fixed = Path(shutil.copytree(TINY / "model" / "vae", tmp_path / "vae"))
    edit(fixed / "config.json", force_upcast=False)
    assert Models(config(xl_model, precision="bf16", vae=str(fixed)), "cpu").vae.dtype == sd.dtype
    for models in (sd, xl):
        assert models.unet.dtype == torch.float32
        assert all(p.requires_grad for p in models.unet.parameters())
        frozen = (models.vae, *models.encoders)
        assert not any(p.requires_grad for part in frozen for p in part.parameters())
        pixels = torch.zeros(1, 3, 64, 64)
        assert models.encode_images(pixels).dtype == torch.float32
    assert "--precision half" in message(Models, config(xl_model, precision="half"), "cpu")


def xl_condition(models, count):
    cond = models.encode_prompts(["a red star on navy"] * count)
    return cond | {"time_ids": torch.tensor([[90.0, 120, 0, 10, 64, 64]] * count)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predictions(xl_model, precision):
    for folder in (TINY / "model", xl_model):
        models = Models(config(folder, precision=precision), "cpu")
        frozen = common.frozen_copy(models, config(folder))
        assert not any(p.requires_grad for p in frozen.parameters())
        xt = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([3, 500, 999])
        cond = models.encode_prompts(TEXTS) if folder == TINY / "model" else xl_condition(models, 3)
        out = models.predict(models.unet, xt, t, cond)
        assert out.dtype == torch.float32 and out.shape == xt.shape and models.calls == 3
        with torch.no_grad():
            assert torch.equal(models.predict(frozen, xt, t, cond), out)
        if precision == "fp32":
            added = {k: v for k, v in cond.items() if k != "encoder_hidden_states"}
            hidden = cond["encoder_hidden_states"]
            assert torch.equal(out, models.unet(xt, t, hidden, added_cond_kwargs=added).sample)
        out.sum().backward()
        assert all(p.grad is not None for p in models.unet.parameters())
        one = common.index_condition(cond, torch.tensor([1]))
        alone = models.predict(models.unet, xt[1:2], t[1:2], one)
        assert torch.allclose(alone, out[1:2], atol=1e-5 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_refreshed_copy_computes_what_the_trained_unet_does(precision):
    models = Models(config(TINY / "model", precision=precision), "cpu")
    frozen = common.frozen_copy(models, config(TINY / "model"))
    with torch.no_grad():
        for weight in models.unet.parameters():
            weight += 0.01
    xt = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = xt, torch.tensor([10, 900]), models.encode_prompts(TEXTS[:2])
    with torch.no_grad():
        expected = models.predict(models.unet, *inputs)
        assert not torch.equal(models.predict(frozen, *inputs), expected)
        common.copy_weights(models.unet, frozen)
        assert torch.equal(models.predict(frozen, *inputs), expected)


def test_v_prediction_is_turned_into_noise(model):
    """A network that answers v has no error, and predicts eps; v is diffusers' get_velocity."""
    from diffusers import DDPMScheduler

    edit(model / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    models = Models(config(model), "cpu")
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 500, 999])
    v = models.target(x0, eps, t)
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    assert torch.allclose(v, scheduler.get_velocity(x0, eps, t), atol=1e-6)
    xt = scheduler.add_noise(x0, eps, t)
    cond = {"encoder_hidden_states": None}
    found = models.predict_eps(lambda *a, **k: SimpleNamespace(sample=v), xt, t, cond)
    assert torch.allclose(found, eps, atol=1e-5)
