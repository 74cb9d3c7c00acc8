# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""DRO's parts: the rollout against diffusers' own sampler, the buffer, the choice of experts; what
it means that a policy without old samples has no gradient; whole runs and their resume."""

import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import common
import dpo_baseline
import dro
import eval as evaluation


# ------------------------------------------------------------------------------- rollout
def probe(x, t, idx):
    """A network that is not linear in x, and different for every timestep and image."""
    idx = idx.view(-1, 1, 1, 1)
    t = t.view(-1, 1, 1, 1)
    return torch.tanh(1.3 * x + 0.2 * idx) * 0.9 + 0.3 * torch.sin(x.flip(-1)) + t / 4000


def sample_with_diffusers(xT, timesteps, stop, i):
    """(x_t, eps) of image i (1, C, h, w) at its stop, by diffusers' DPM-Solver++(2M) in double."""
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    config = DDPMScheduler.from_pretrained(TINY / "model", subfolder="scheduler").config
    scheduler = DPMSolverMultistepScheduler.from_config(
        config,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=False,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=timesteps[:, i].tolist())
    x = xT[i : i + 1].double()
    for k in range(int(stop[i])):
        eps = probe(x, timesteps[k, i], torch.tensor([i]))
        x = scheduler.step(eps, scheduler.timesteps[k], x).prev_sample
    return x, probe(x, timesteps[stop[i], i], torch.tensor([i]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize("steps", [20, 10, 4, 1])
def test_rollout_is_diffusers_dpm_solver(alpha_bar, steps):
    """Image by image, with the image's own timesteps, up to its own stop.

    Tolerance: a step multiplies x by up to 3 and adds roundings of 2^-24 = 6e-8 of numbers up to
    10; with up to 20 steps, each of which carries on the errors before at a factor near 1
    (diffusers' tables are in fp32 too), this is 20 * 3 * 10 * 6e-8 = 4e-5."""
    random = torch.Generator().manual_seed(steps)
    T = len(alpha_bar)
    xT = torch.randn(12, 4, 3, 3, generator=random)
    t = torch.randint(T, (12,), generator=random)
    t[:2] = torch.tensor([0, T - 1])  # the last step of a trajectory, and the first
    timesteps, stop = dro.trajectory(t, T, steps)
    xt, eps, t_end = dro.rollout(probe, xT, timesteps, stop, alpha_bar)
    assert torch.equal(t_end, t)
    for i in range(12):
        expected_xt, expected_eps = sample_with_diffusers(xT, timesteps, stop, i)
        assert torch.allclose(xt[i], expected_xt[0].float(), atol=4e-5)
        assert torch.allclose(eps[i], expected_eps[0].float(), atol=4e-5)


def test_rollout_calls_the_network_no_more_than_needed(alpha_bar):
    """stop + 1 times for each image, at its own timesteps in their order. An image with an earlier
    stop joins later, so that the last call is made with the whole batch: eps at the stop comes from
    one call of the trained UNet's batch size, and is its answer to the bit."""
    stop = torch.tensor([0, 4, 2, 4, 1])
    timesteps = torch.arange(4, -1, -1)[:, None] * 200 + torch.tensor([0, 10, 20, 30, 199])
    calls = []
    seen = [[] for _ in stop]

    def eps_fn(x, t, idx):
        eps = probe(x, t, idx)
        calls.append((x.clone(), idx, eps))
        for i, unet_t in zip(idx.tolist(), t.tolist()):
            seen[i].append(unet_t)
        return eps

    xT = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    xt, eps, t_end = dro.rollout(eps_fn, xT, timesteps, stop, alpha_bar)
    for i, last in enumerate(stop.tolist()):
        assert seen[i] == timesteps[: last + 1, i].tolist()
        assert t_end[i] == timesteps[last, i]
    assert [len(idx) for _, idx, _ in calls] == [2, 2, 3, 4, 5]
    last_x, last_idx, last_eps = calls[-1]
    assert last_idx.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(last_eps, eps)
    assert torch.equal(last_x, xt)


def test_rollout_leaves_its_input_alone(alpha_bar):
    xT = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    before = xT.clone()
    timesteps, stop = dro.trajectory(torch.tensor([130, 420, 999]), 1000, 10)
    dro.rollout(probe, xT, timesteps, stop, alpha_bar)
    assert torch.equal(xT, before)


@pytest.mark.parametrize("steps", [20, 4])
def test_a_trajectory_meets_every_timestep(steps):
    T = 1000
    t = torch.arange(T)
    timesteps, stop = dro.trajectory(t, T, steps)
    assert timesteps.shape == (steps, T)
    assert torch.equal(timesteps[stop, t], t)
    assert (timesteps.diff(dim=0) == -(T // steps)).all()
    assert timesteps.min() == 0
    assert timesteps.max() == T - 1
    # Step k is wanted as often as any other: the mean of stop + 1 is (steps + 1) / 2.
    assert (stop + 1).float().mean() == (steps + 1) / 2


def test_start_noise_is_a_function_of_the_sample():
    """Not of the batch that it is in, nor of a stream."""
    together = dro.start_noise(0, torch.tensor([3, 7, 5]), (4, 8, 8))
    alone = dro.start_noise(0, torch.tensor([7]), (4, 8, 8))
    other_seed = dro.start_noise(1, torch.tensor([7]), (4, 8, 8))
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(alone, other_seed)
    # 256 numbers: their mean has a standard deviation of 1/16, here within 4 of them
    assert together.mean(dim=(1, 2, 3)).abs().max() < 4 / 16


# ------------------------------------------------------------------------------- buffer
def filled_buffer():
    """Holds 1 to 5 as "a" and ten times that as "b": 0 has had to go."""
    buffer = dro.ReplayBuffer(5)
    assert len(buffer) == 0
    for start in (0, 2, 4):
        items = torch.arange(start, start + 2)
        buffer.push({"a": items, "b": items[:, None] * 10.0})
    return buffer


def test_the_oldest_leave_the_buffer():
    buffer = filled_buffer()
    assert len(buffer) == 5
    assert buffer.state_dict()["a"].tolist() == [1, 2, 3, 4, 5]


def test_no_item_is_drawn_twice_while_there_are_enough():
    buffer = filled_buffer()
    random = torch.Generator().manual_seed(0)
    drawn = buffer.sample(5, random)
    assert sorted(drawn["a"].tolist()) == [1, 2, 3, 4, 5]
    assert torch.equal(drawn["b"][:, 0], drawn["a"] * 10.0)  # what belongs together stays together
    assert len(set(buffer.sample(3, random)["a"].tolist())) == 3


def test_every_item_is_drawn_as_often():
    """3 of 5 and 8 of 5, 200 times: an item is expected 120 and 320 times, with a standard
    deviation of sqrt(200 * 0.6 * 0.4) = 7 and sqrt(1600 * 0.2 * 0.8) = 16. Within 5 of them."""
    buffer = filled_buffer()
    random = torch.Generator().manual_seed(0)
    for n, expected, deviation in ((3, 120, 7), (8, 320, 16)):
        drawn = torch.cat([buffer.sample(n, random)["a"] for _ in range(200)])
        counts = Counter(drawn.tolist())
        assert set(counts) == {1, 2, 3, 4, 5}
        assert all(abs(count - expected) < 5 * deviation for count in counts.values())


def test_a_buffer_is_restored():
    buffer = filled_buffer()
    other = dro.ReplayBuffer(5)
    other.load_state_dict(buffer.state_dict())
    for name, values in buffer.state_dict().items():
        assert torch.equal(other.state_dict()[name], values)
    a = buffer.sample(4, torch.Generator().manual_seed(1))
    b = other.sample(4, torch.Generator().manual_seed(1))
    assert torch.equal(a["a"], b["a"])


# ------------------------------------------------------------------------------- experts
def test_top_experts_counts_an_item_once_and_keeps_the_first_of_equals():
    nan = float("nan")
    scores = {
        "score_0": torch.tensor([5.0, 9.0, nan, 5.0]),
        "score_1": torch.tensor([9.0, 7.0, 1.0, 5.0]),
        "key_0": torch.tensor([1, 2, 3, 4]),
        "key_1": torch.tensor([2, 5, 6, 7]),
    }
    # Row 0's image 1 and row 1's image 0 are the same item. The equals 5.0 stand in rows 0 and 3.
    assert dro.top_experts(scores, 4) == [(0, 1, 9.0), (1, 1, 7.0), (0, 0, 5.0), (3, 0, 5.0)]
    everything = dro.top_experts(scores, 99)
    assert [score for _, _, score in everything] == [9, 7, 5, 5, 5, 1]  # without the broken image


@pytest.fixture
def run(make_set, rows, tmp_path):
    """run("name", more flags) trains for 4 steps of 8 of 12 experts. Returns the run's folder."""
    data = make_set(rows[:24])
    flags = "--steps 4 --batch 8 --micro_batch 4 --warmup 2 --eval_prompts 0 --save_every 2"
    flags += f" --experts 12 --data {data} --cache {tmp_path / 'cache'}"

    def train(name, *more):
        dro.main([*flags.split(), "--out", str(tmp_path / name), *more])
        return tmp_path / name

    return train


def test_experts_are_the_best_images(run, rows, capsys):
    from datasets import load_dataset

    out = run("run", "--steps", "1")
    experts = load_dataset("parquet", data_files=str(out / "experts.parquet"), split="train")
    score = evaluation.load_reward(str(TINY / "reward"))
    expected = {}
    for row in rows[:24]:
        for name in common.PAIR_COLUMNS:
            image = common.decode_image(row[name])
            expected[row["caption"], row[name]] = score([image], [row["caption"]]).item()
    best = sorted(expected.values(), reverse=True)[:12]
    # Scores are near 20, and batches of other sizes round a CLIP's 10 layers by a few 1e-6 each.
    assert experts["score"] == pytest.approx(best, abs=1e-3)
    for row in experts:
        assert expected[row["caption"], row["image"]] == pytest.approx(row["score"], abs=1e-3)
    assert f"12 experts, scored {best[-1]:.4g} to {best[0]:.4g}" in capsys.readouterr().out


@pytest.fixture
def score_set(tmp_path):
    """score_set(data) writes the tiny reward model's scores of a pair set; returns the path."""

    def score(data):
        cfg = dro.Config(data=data, cache=str(tmp_path / "cache"), reward=str(TINY / "reward"))
        table = common.RowTable(cfg, common.DistInfo(), common.PAIR_COLUMNS)
        scores = evaluation.pair_scores(cfg, table, common.DistInfo())
        evaluation.write_scores(tmp_path / "scores.safetensors", scores, "tiny", "points", data)
        return str(tmp_path / "scores.safetensors")

    return score


def test_experts_by_a_scores_file_and_given_ones_are_the_same(
    run, score_set, make_set, rows, log_of
):
    chosen = run("chosen", "--steps", "1")
    scores = score_set(make_set(rows[:24]))
    by_file = run("file", "--steps", "1", "--scores", scores)
    given = run("given", "--steps", "1", "--data", str(chosen / "experts.parquet"))
    first_step = [log_of(out)[0]["grad_norm"] for out in (chosen, by_file, given)]
    assert first_step[0] == first_step[1] == first_step[2]
    assert (by_file / "experts.parquet").read_bytes() == (chosen / "experts.parquet").read_bytes()
    assert not (given / "experts.parquet").exists()


def test_sft_reads_the_experts(run, log_of, tmp_path):
    experts = run("run", "--steps", "1") / "experts.parquet"
    flags = "--sft --steps 1 --batch 4 --micro_batch 4 --eval_prompts 0".split()
    paths = ["--out", str(tmp_path / "sft"), "--cache", str(tmp_path / "cache")]
    dpo_baseline.main([*flags, *paths, "--data", str(experts)])
    assert len(log_of(tmp_path / "sft")) == 1


# --------------------------------------------------- what a policy without old samples means
OLD_SAMPLES = {"fresh": [], "old policy": ["--refresh_every", "4"], "buffer": ["--buffer", "16"]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", OLD_SAMPLES)
def test_only_old_samples_have_a_gradient(kind, precision, run, log_of):
    """At step 0 the policy is the trained UNet, and gap, error and gradient of its samples are 0:
    the policy's own answer comes from a batch of the same kind, so nearly to the bit. From step 1
    on that holds for fresh samples alone, for which it is exact: they are left out."""
    log = log_of(run("run", *OLD_SAMPLES[kind], "--precision", precision))
    assert log[0]["gap"] == 0
    assert log[1]["gap"] != 0
    assert log[0]["err_expert"] > 0.01
    if kind == "fresh":
        assert all(line["policy_share"] == 0 for line in log)
        assert all(line["err_policy"] == 0 for line in log)
    else:
        # Kernels may round otherwise for the 8 images of this pass than for the rollout's 4: some
        # 30 layers by 2^-24 (bf16: 2^-9) of predictions near 1, which gives an error's root of up
        # to 2e-6 (bf16: 0.01, added like a random walk). The experts' is 0.17 here.
        nearly_zero = {"fp32": 1e-4, "bf16": 0.06}[precision]
        assert log[0]["policy_share"] < nearly_zero
        assert log[3]["policy_share"] > nearly_zero


def load_experts(out, more=()):
    """What dro.py trains with, made from its parts: config, models, samples, on a run's experts."""
    flags = ["--data", str(out / "experts.parquet"), "--out", str(out.parent / "parts")]
    flags += ["--cache", str(out.parent / "cache"), "--steps", "4", "--batch", "8", *more]
    cfg = common.parse(dro.Config, dro.PRESETS, [*flags, "--micro_batch", "4"])
    dist_info = common.DistInfo()
    models = common.Models(cfg, dist_info.device)
    table = common.RowTable(cfg, dist_info, common.IMAGE_COLUMNS)
    everything = torch.ones(len(table.labels), dtype=torch.bool)
    first_side = torch.zeros(len(table.labels), 1, dtype=torch.long)
    samples = common.SampleStream(cfg, dist_info, models, table, everything, first_side)
    return cfg, models, samples


def full_pass(cfg, models, samples, ref, numbers):
    """The losses of some samples with the trained UNet run on experts and policy samples alike."""
    batch = samples.batch(numbers)
    t = batch["t"]
    timesteps, stop = dro.trajectory(t, len(models.alpha_bar), cfg.rollout_steps)
    xT = dro.start_noise(cfg.seed, batch["index"], samples.latent_shape)

    def predict_eps(x, unet_t, idx):
        cond = common.index_condition(batch["cond"], idx)
        return models.predict_eps(models.unet, x, unet_t, cond)

    with torch.no_grad():
        x_policy, eps_policy, t_end = dro.rollout(
            predict_eps, xT, timesteps, stop, models.alpha_bar
        )
    assert torch.equal(t_end, t)
    x_expert = common.add_noise(batch["x0"], batch["noise"], t, models.alpha_bar)
    xt = torch.cat([x_expert, x_policy])
    target = torch.cat([batch["noise"], eps_policy])
    cond = {name: torch.cat([value, value]) for name, value in batch["cond"].items()}
    with torch.no_grad():
        ref_err = dro.denoising_error(models.predict(ref, xt, t.repeat(2), cond), target)
    err = dro.denoising_error(models.predict(models.unet, xt, t.repeat(2), cond), target)
    losses, _ = dro.dro_loss(err, ref_err, cfg.margin)
    return losses


def test_leaving_the_policy_samples_out_changes_nothing(run, log_of):
    """With M = 1 and no buffer the trained UNet is not run on the policy samples. Loss and gradient
    norm are those of the pass over both, to 6 digits, also at a step where the weights have moved
    away from the reference. (Not to the last bit: that pass has another batch size.)"""
    out = run("run", "--refresh_every", "1", "--lr", "1e-3", "--clip", "0")
    log = log_of(out)
    cfg, models, samples = load_experts(out)
    ref = common.reference_unet(models, cfg)
    checkpoint = common.read_checkpoint(common.find_checkpoints(out)[-1])
    assert checkpoint["step"] == 4

    def loss_and_norm(step):
        models.unet.zero_grad()
        total = 0.0
        for start in (8 * step, 8 * step + 4):
            loss = full_pass(cfg, models, samples, ref, range(start, start + 4)).mean() / 2
            loss.backward()
            total += loss.item()
        squares = [p.grad.square().sum() for p in models.unet.parameters()]
        return total, torch.stack(squares).sum().sqrt().item()

    assert loss_and_norm(0) == pytest.approx((log[0]["loss"], log[0]["grad_norm"]), rel=1e-6)

    # Later: a run that goes on from the checkpoint, for one step more.
    with torch.no_grad():
        for weight, value in zip(models.unet.parameters(), checkpoint["weights"]):
            weight.copy_(value)
    more = run(
        "run", "--refresh_every", "1", "--lr", "1e-3", "--clip", "0", "--steps", "5", "--resume"
    )
    cfg, fresh_models, samples = load_experts(out, ["--steps", "5"])
    line = log_of(more)[4]
    assert loss_and_norm(4) == pytest.approx((line["loss"], line["grad_norm"]), rel=1e-6)
    assert line["gap"] != 0


def policy_gradient(models, policy, cond):
    """The gradient norm of the policy samples' error, relative to that of the experts' error."""
    random = torch.Generator().manual_seed(0)
    x0, noise, xT = torch.randn(3, 4, 4, 8, 8, generator=random)
    t = torch.tensor([130, 420, 510, 860])
    timesteps, stop = dro.trajectory(t, len(models.alpha_bar), 20)

    def predict_eps(x, unet_t, idx):
        return models.predict_eps(policy, x, unet_t, common.index_condition(cond, idx))

    with torch.no_grad():
        x_policy, eps_policy, _ = dro.rollout(predict_eps, xT, timesteps, stop, models.alpha_bar)
    x_expert = common.add_noise(x0, noise, t, models.alpha_bar)
    norms = []
    for x, target in ((x_expert, noise), (x_policy, eps_policy)):
        models.unet.zero_grad()
        dro.denoising_error(models.predict(models.unet, x, t, cond), target).mean().backward()
        squares = [p.grad.square().sum() for p in models.unet.parameters()]
        norms.append(torch.stack(squares).sum().sqrt().item())
    return norms[1] / norms[0]


def test_the_gradient_itself():
    """The same of the weights' gradients, not of a logged number. The rollout's last call has the
    whole batch, so the trained UNet answers as the policy did to the bit: the gradient is 0."""
    cfg = dro.Config(model=str(TINY / "model"))
    models = common.Models(cfg, torch.device("cpu"))
    cond = models.encode_prompts(["a red star on navy"] * 4)
    old = common.policy_unet(models, cfg)
    assert policy_gradient(models, models.unet, cond) == 0
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in models.unet.parameters():
            p.mul_(1 + 1e-2 * torch.randn(p.shape, generator=random))
    assert policy_gradient(models, models.unet, cond) == 0
    assert policy_gradient(models, old, cond) > 1e-2
    common.copy_weights(models.unet, old)
    assert policy_gradient(models, old, cond) == 0


@pytest.mark.parametrize("kind", OLD_SAMPLES)
def test_unet_calls_a_row(kind, run, log_of):
    """The rollout's stop + 1, the reference on both, the trained UNet on both or on the expert."""
    out = run("run", *OLD_SAMPLES[kind])
    cfg, models, samples = load_experts(out)
    trained = 1 if kind == "fresh" else 2
    for line in log_of(out):
        t = samples.batch(range(8 * line["step"], 8 * line["step"] + 8))["t"]
        _, stop = dro.trajectory(t, len(models.alpha_bar), cfg.rollout_steps)
        expected = (stop + 1).float().mean().item() + 2 + trained
        assert line["unet_calls"] == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------------- whole runs
FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("flags", [[], ["--refresh_every", "3", "--buffer", "12", "--ema", "0.9"]])
def test_resume(flags, run, log_of):
    """Four steps in one go, and in two goes, give the same weights to the bit. M = 3 does not
    divide the 2 steps of the first go, so the policy's copy has to come from the checkpoint."""
    whole = run("whole", *flags)
    run("cut", "--steps", "2", *flags)
    cut = run("cut", "--resume", *flags)
    assert [line["loss"] for line in log_of(whole)] == [line["loss"] for line in log_of(cut)]
    expected = load_file(whole / FILE)
    actual = load_file(cut / FILE)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    extra = common.read_checkpoint(common.find_checkpoints(cut)[-1])["extra"]
    assert set(extra) == ({"policy", "buffer-0", "buffer-1"} if flags else set())


def test_what_is_written_is_the_ema(run, log_of):
    """Its decay is min(--ema, (1 + n) / (10 + n)): at first there is little to average."""
    out = run("run", "--ema", "0.15")
    decays = [line["ema_decay"] for line in log_of(out)]
    assert decays == pytest.approx([1 / 10, 0.15, 0.15, 0.15], rel=1e-12)
    state = common.read_checkpoint(common.find_checkpoints(out)[-1])
    models = common.Models(dro.Config(model=str(TINY / "model")), torch.device("cpu"))
    names = [name for name, _ in models.unet.named_parameters()]
    written = load_file(out / FILE)
    for name, ema, trained in zip(names, state["ema_weights"], state["weights"]):
        assert torch.equal(written[name], ema)
        assert written[name].shape == trained.shape
    assert any(not torch.equal(*pair) for pair in zip(state["ema_weights"], state["weights"]))


# ------------------------------------------------------------------------------- bad input
BAD_INPUT = [
    (["--rollout_steps", "30"], "--rollout_steps 30 does not divide"),
    (["--buffer", "4"], "--buffer 4 holds less than"),
    (["--scores", str(TINY / "facts.json")], "facts.json"),
]


@pytest.mark.parametrize("flags, words", BAD_INPUT)
def test_bad_input(run, flags, words):
    with pytest.raises(common.InputError, match=words):
        run("bad", *flags)


def test_scores_of_a_larger_set_are_refused(run, score_set, make_set, rows):
    """Even if its first rows are the same: the best images may lie beyond."""
    scores = score_set(make_set(rows[:6], "six.parquet"))
    few = make_set(rows[:3], "few.parquet")
    with pytest.raises(common.InputError, match="6 rows, --data .* has 3"):
        run("few", "--data", few, "--scores", scores)


def test_scores_of_other_images_are_refused(run, score_set, make_set, rows):
    scores = score_set(make_set(rows[:6], "six.parquet"))
    other = make_set(rows[24:30], "other.parquet")
    with pytest.raises(common.InputError, match="row 0 is not the one that was scored"):
        run("other", "--data", other, "--scores", scores)


def test_a_model_without_signal_at_its_last_timestep_is_refused(run, tmp_path):
    """Zero terminal SNR: a rollout would divide by alpha = 0."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}
    file.write_text(json.dumps(settings))
    with pytest.raises(common.InputError, match="no signal at its last timestep"):
        run("bad", "--model", str(tmp_path / "model"))
