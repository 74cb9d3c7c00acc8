# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""Pipelines other than the tiny world's, made for the tests: v-prediction, and SDXL's layout."""

import json
import shutil
from pathlib import Path

import torch
from conftest import TINY


def make_v_model(folder):
    """The tiny pipeline, its scheduler saying that the UNet predicts v, as in SD 2.x."""
    folder = Path(shutil.copytree(TINY / "model", folder))
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text()) | {"prediction_type": "v_prediction"}
    file.write_text(json.dumps(settings))
    return str(folder)


def make_xl_model(folder):
    """A small random SDXL pipeline: two text encoders, a pooled embedding and six numbers about the
    image's size as further conditions, zeros in place of an empty prompt."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    tokenizer = CLIPTokenizer.from_pretrained(TINY / "model", subfolder="tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL.from_pretrained(TINY / "model", subfolder="vae", low_cpu_mem_usage=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
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
            vae=vae,
            unet=unet,
            text_encoder=CLIPTextModel(text),
            text_encoder_2=CLIPTextModelWithProjection(text),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=DDIMScheduler.from_pretrained(TINY / "model", subfolder="scheduler"),
        ).save_pretrained(folder)
    return str(folder)
