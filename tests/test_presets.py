# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""The sd15 and sdxl presets against the published recipes, as a command line resolves them.

Sources: [C] the authors' released launchers and code, [P] the papers' text, "ours" where neither
fits.
"""

import pytest

import common
import dpo_baseline
import dro
import smpo

# PickScore's unit is exp(logit_scale) * cosine with a logit scale of 100. The released SmPO
# normalises the raw cosines by these two literals [C].
RELEASED_MIN_COSINE = 0.11543526500463486
RELEASED_MAX_COSINE = 0.28201571106910706

SMPO = {
    "steps": 200,  # [C] max_train_steps
    "batch": 1024,  # [C] 8 GPUs x 1 pair x 128 accumulated
    "lr": 1e-8 * 1024,  # [C] learning_rate 1e-8 with scale_lr, which multiplies by the batch
    "warmup": 100,  # [C]
    "gamma": 10.0,  # [C] the literal 10 in the loss
    "inversion": "release",  # [C] under diffusers 0.20, which it pins
    "renoise": 1,  # [C] one second prediction a step
    "flip": True,  # [C] RandomHorizontalFlip
    "caption_dropout": 0.2,  # [C] proportion_empty_prompts
    "reward": "yuvalkirstain/PickScore_v1",  # [C]
    "scores": None,
    "reward_min": 100 * RELEASED_MIN_COSINE,  # [C]
    "reward_max": 100 * RELEASED_MAX_COSINE,  # [C]
    "sd15": {
        "beta": 2000.0,  # [C] beta_dpo
        "inversion_steps": 5,  # [C] set_timesteps(5)
        "optimizer": "adamw",  # [C]
        "weight_decay": 0.01,  # [C]
    },
    "sdxl": {
        "beta": 5000.0,  # [C]
        "inversion_steps": 10,  # [C] set_timesteps(10)
        "optimizer": "adafactor",  # [C] with --sdxl; the lr is used unscaled
    },
}

DPO = {
    "steps": 2000,  # [P, C]
    "batch": 2048,  # [P, C]
    # [C]; the paper's text has (2000 / beta) 2.048e-8, a thousandth of this
    "lr": 1e-8 * 2048,
    "beta": 5000.0,  # [C]; the paper's text has 2000 for SD1.5
    "sft": False,
    "scores": None,
    "flip": True,  # [C]
    "caption_dropout": 0.2,  # [C]
    "sd15": {
        "warmup": 500,  # [P] 25 %, [C]
        "optimizer": "adamw",  # [P, C]
        "weight_decay": 0.01,  # [C]
    },
    "sdxl": {
        "warmup": 200,  # [C]
        "optimizer": "adafactor",  # [P, C]
    },
}

DRO = {
    "steps": 1600,  # [C]
    "batch": 256,  # [C] experts an update
    "lr": 1e-5,  # ours: [C] has 1e-4 on pure bf16 weights, where most updates are lost
    "warmup": 0,  # [C] constant
    "margin": 0.001,  # [C]
    "refresh_every": 1,  # [C] M
    "buffer": 0,  # [P] mentions none, [C] has one that never replays at its defaults
    "ema": 0.9999,  # [C] nominal
    "experts": 500,  # [P] the 500 best images
    "rollout_steps": 20,  # [P, C] DPM-Solver++(2M)
    "flip": True,  # [C]
    "caption_dropout": 0.2,  # [C]
    "scores": None,
    "sd15": {
        "optimizer": "adamw",  # [C]
        "weight_decay": 0.01,  # AdamW's default
    },
    "sdxl": {},  # there is no published recipe
}

BOTH = {
    "unet": None,  # start and reference: the model's own, unless another is given
    "lora": 0,  # all weights are trained
    "eval_prompts": 0,  # no final evaluation
    "sd15": {"resolution": 512},
    "sdxl": {"resolution": 1024},
}

METHODS = {"smpo": (smpo, SMPO), "dpo": (dpo_baseline, DPO), "dro": (dro, DRO)}


def resolve(script, preset, *flags):
    argv = ["--preset", preset, "--model", "MODEL", "--data", "DATA", *flags]
    return common.parse(script.Config, script.PRESETS, argv)


def recipe_of(table, preset):
    shared = {name: value for name, value in table.items() if name not in ("sd15", "sdxl")}
    return shared | table[preset]


@pytest.mark.parametrize("preset", ["sd15", "sdxl"])
@pytest.mark.parametrize("method", METHODS)
def test_the_preset_is_the_published_recipe(method, preset):
    script, table = METHODS[method]
    config = resolve(script, preset)
    for name, value in {**recipe_of(BOTH, preset), **recipe_of(table, preset)}.items():
        actual = getattr(config, name)
        if isinstance(value, float):
            assert actual == pytest.approx(value, rel=1e-9), name
        else:
            assert actual == value, name
            assert type(actual) is type(value), name
    assert (config.model, config.data) == ("MODEL", "DATA")
    assert config.batch % config.micro_batch == 0  # one GPU can run it


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_sets_only_what_the_config_has(method):
    script, _ = METHODS[method]
    assert set(script.PRESETS) == {"tiny", "sd15", "sdxl"}
    fields = set(script.Config.__dataclass_fields__)
    for preset, values in script.PRESETS.items():
        assert set(values) <= fields, preset


@pytest.mark.parametrize("method", METHODS)
def test_a_flag_overrides_the_preset(method):
    script, _ = METHODS[method]
    config = resolve(script, "sd15", "--steps", "7", "--lr", "3e-4", "--flip", "False")
    assert (config.steps, config.lr, config.flip) == (7, 3e-4, False)
    assert config.batch == resolve(script, "sd15").batch


def test_an_unknown_preset_is_an_error():
    with pytest.raises(common.InputError, match="sd3"):
        resolve(smpo, "sd3")


def test_the_method_is_the_default_of_smpo():
    """Someone who passes all flags by hand gets the published method too."""
    config = smpo.Config()
    assert (config.inversion, config.renoise, config.gamma) == ("release", 1, 10.0)


def released_range(*flags):
    """(reward_min, reward_max) with which smpo.py starts, None where the data decide."""
    config = resolve(smpo, "sd15", *flags)
    smpo.forget_released_range(config)
    return config.reward_min, config.reward_max


def test_the_released_range_is_pickscores_alone():
    """The two literals are cosines of PickScore. Another reward is given the data's own range."""
    expected = pytest.approx((11.543526500463486, 28.201571106910706), rel=1e-12)
    assert released_range() == expected
    assert released_range("--reward", "some/other-reward") == (None, None)
    assert released_range("--scores", "scores.safetensors") == (None, None)


def test_a_range_that_is_given_stays():
    given = ("--reward_min", "3", "--reward_max", "5")
    assert released_range(*given) == (3, 5)
    assert released_range(*given, "--reward", "some/other-reward") == (3, 5)
    assert released_range(*given, "--scores", "scores.safetensors") == (3, 5)
