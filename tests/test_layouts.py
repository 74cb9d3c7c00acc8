"""The other pipelines: v-prediction (Stable Diffusion 2.x) and SDXL's layout, with small random weights."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import common
import dpo_baseline
import dro
import smpo


@pytest.fixture
def v_model(tmp_path):
    """The tiny world's pipeline, its scheduler saying that the UNet predicts v."""
    folder = shutil.copytree(TINY / "model", tmp_path / "v")
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(config | {"prediction_type": "v_prediction"})
    )
    return str(folder)


@pytest.fixture
def xl_model(tmp_path):
    """A random SDXL pipeline: two text encoders, pooled embedding, six size numbers, zeros for an empty
    prompt."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "model", subfolder="tokenizer")
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
        **ids,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        transformer_layers_per_block=(1, 2),
    )
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(TINY / "model", subfolder="vae", low_cpu_mem_usage=False),
        unet=unet,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=DDIMScheduler.from_pretrained(TINY / "model", subfolder="scheduler"),
    ).save_pretrained(tmp_path / "xl")
    return str(tmp_path / "xl")


def load(model, **more):
    return common.Models(smpo.Config(model=model, **more), torch.device("cpu"))


def test_v_prediction_is_turned_into_noise(v_model):
    """A network that answers v = sqrt(ab) eps - sqrt(1 - ab) x0 has no error, and predicts eps."""
    models = load(v_model)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 500, 999])
    v = models.target(x0, eps, t)
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(v_model, subfolder="scheduler")
    assert torch.allclose(v, scheduler.get_velocity(x0, eps, t), atol=1e-6)
    xt = common.add_noise(x0, eps, t, models.alpha_bar)
    found = models.predict_eps(
        lambda *a, **k: SimpleNamespace(sample=v), xt, t, {"encoder_hidden_states": None}
    )
    assert torch.allclose(found, eps, atol=1e-5)


def test_xl_conditions_are_the_pipelines_own(xl_model):
    from diffusers import StableDiffusionXLPipeline

    models = load(xl_model)
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_model, low_cpu_mem_usage=False).to(torch.float32)
    texts = ["a red star on navy", "a blue ring on cream"]
    hidden, none, pooled, none_pooled = pipeline.encode_prompt(texts, do_classifier_free_guidance=True)
    ours, empty = models.encode_prompts(texts), models.encode_prompts(["", ""])
    assert torch.allclose(ours["encoder_hidden_states"], hidden, atol=1e-5)
    assert torch.allclose(ours["text_embeds"], pooled, atol=1e-5)
    assert torch.equal(empty["encoder_hidden_states"], none) and torch.equal(
        empty["text_embeds"], none_pooled
    )
    row = {
        "image": torch.zeros(1, 2, 3, 64, 64),
        "caption": ["a red star on navy"],
        "size": torch.tensor([[[90.0, 120, 0, 10, 64, 64], [64, 64, 0, 0, 64, 64]]]),
    }
    x0, cond = models.encode(row)
    assert x0.shape == (2, 4, 8, 8) and cond["time_ids"].tolist() == row["size"][0].tolist()


METHODS = {
    "smpo": (smpo, []), "dpo": (dpo_baseline, []), "sft": (dpo_baseline, ["--sft", "1"]),
    "dro": (dro, ["--experts", "8", "--refresh_every", "2", "--buffer", "8"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["v_model", "xl_model"])
@pytest.mark.parametrize("method, cache", [("smpo", True), ("smpo", False), ("dpo", False), ("sft", True),
                                           ("dro", True), ("dro", False)])  # fmt: skip
def test_training(layout, method, cache, request, make_set, rows, tmp_path, log_of):
    """A few steps, saved and read back, then the stock pipeline samples with the new UNet."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    model, out = request.getfixturevalue(layout), tmp_path / "out"
    flags = ["--model", model, "--data", make_set(rows[:12]), "--out", str(out), "--eval_prompts", "0"]
    flags += ["--cache", str(tmp_path / "cache") if cache else "", "--flip", "1", "--caption_dropout", "0.5"]
    script, more = METHODS[method]
    script.main([*flags, *more, "--steps", "2", "--batch", "4", "--micro_batch", "2"])
    log, margin = log_of(out), {"dro": "gap", "sft": "loss"}.get(method, "margin")
    assert len(log) == 2 and log[1][margin] != 0 and (method == "sft" or log[0][margin] == 0)
    pipeline = DiffusionPipeline.from_pretrained(model, low_cpu_mem_usage=False).to(torch.float32)
    pipeline.unet = UNet2DConditionModel.from_pretrained(out / "unet", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    assert (
        pipeline("a red star on navy", num_inference_steps=2, output_type="latent").images[0].isfinite().all()
    )


def test_compiled_unets_train_the_same(xl_model, make_set, rows, tmp_path, monkeypatch, log_of):
    """torch.compile around trained UNet, reference and old policy, with resumes, the last of them without it;
    without its code generator, which takes minutes and is torch's own affair."""
    compiled = []

    def compile(module, *, real=torch.compile):
        compiled.append(module)
        return real(module, backend="eager")

    monkeypatch.setattr(torch, "compile", compile)
    script, more = METHODS["dro"]
    flags = ["--model", xl_model, "--data", make_set(rows[:12]), "--eval_prompts", "0", "--batch", "4", *more]
    flags += ["--micro_batch", "4", "--warmup", "0", "--cache", str(tmp_path / "cache"), "--ema", "0.5"]
    flags += ["--rollout_steps", "5"]
    for name, steps, on in (("plain", 4, 0), ("compiled", 2, 1), ("compiled", 3, 1), ("compiled", 4, 0)):
        out = ["--out", str(tmp_path / name), "--steps", str(steps), "--compile", str(on)]
        script.main([*flags, *out, *(["--resume"] if steps > 2 else [])])
    assert len(compiled) == 6  # three UNets, twice
    plain, other = (log_of(tmp_path / name) for name in ("plain", "compiled"))
    assert len(other) == 4 and other[0]["gap"] == 0
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in plain], rel=1e-4)
    file = "unet/diffusion_pytorch_model.safetensors"
    a, b = (load_file(tmp_path / name / file) for name in ("plain", "compiled"))
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
