"""DRO's parts: the hinge against its formula, the rollout against diffusers' own sampler, the buffer, the
choice of experts, and what the paper does not say of M = 1."""

import json
import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

import common
import dro
from dro import ReplayBuffer, dro_loss, rollout, top_experts


def test_the_hinge_by_hand():
    """max(-m, gap) + m of Eq. 15, on three pairs: far behind, exactly on the margin, far ahead."""
    err = torch.tensor([0.30, 0.10, 0.10, 0.05, 0.02, 0.05], requires_grad=True)
    ref_err = torch.tensor([0.20, 0.10, 0.20, 0.10, 0.02, 0.05])
    losses, gap = dro_loss(err, ref_err, margin=0.01)
    by_hand = torch.tensor([0.10 + 0.05, 0.0, -0.10])
    assert torch.allclose(gap, by_hand, atol=1e-7) and not gap.requires_grad
    assert torch.allclose(losses, by_hand.clamp(min=-0.01) + 0.01, atol=1e-7)
    losses.sum().backward()  # experts down, policy samples up, and nothing once the hinge is satisfied
    assert err.grad.tolist() == [1, 1, 0, -1, -1, 0]


def test_at_the_reference_the_loss_is_the_margin():
    err = torch.rand(8, generator=torch.Generator().manual_seed(0))
    losses, gap = dro_loss(err, err.clone(), 0.001)
    assert torch.equal(losses, torch.full((4,), 0.001)) and not gap.any()


def probe(x, t, row):
    """A network that is non-linear in x, and different for every time and sample."""
    return torch.tanh(1.3 * x + 0.2 * row) * 0.9 + 0.3 * torch.sin(x.flip(-1)) + t / 4000


@pytest.mark.parametrize("steps", [20, 10, 4])
def test_rollout_is_diffusers_dpm_solver(alpha_bar, steps):
    """Sample by sample, with the sample's own timesteps, up to its own stop."""
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    random = torch.Generator().manual_seed(steps)
    batch, apart = 12, 1000 // steps
    xT = torch.randn(batch, 4, 3, 3, generator=random)
    stop = torch.randint(steps, (batch,), generator=random)
    stop[:2] = torch.tensor([0, steps - 1])
    grid = torch.arange(steps - 1, -1, -1)[:, None] * apart
    timesteps = grid + torch.randint(apart, (batch,), generator=random)
    calls = torch.zeros(batch, dtype=torch.long)

    def eps_fn(x, t, rows):
        calls[rows] += 1
        return torch.stack([probe(x[i], int(t[i]), int(r)) for i, r in enumerate(rows)])

    xt, eps, t = rollout(eps_fn, xT, timesteps, stop, alpha_bar)
    assert torch.equal(calls, stop + 1) and torch.equal(t, timesteps[stop, torch.arange(batch)])
    config = DDPMScheduler.from_pretrained(TINY / "model", subfolder="scheduler").config
    for i in range(batch):
        scheduler = DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
            lower_order_final=False, final_sigmas_type="zero",
        )  # fmt: skip
        scheduler.set_timesteps(timesteps=timesteps[:, i].tolist())
        x = xT[i : i + 1]
        for k in range(int(stop[i]) + 1):
            e = probe(x, int(timesteps[k, i]), i)
            if k == stop[i]:
                assert torch.allclose(xt[i], x[0], atol=2e-5) and torch.allclose(eps[i], e[0], atol=2e-5)
            else:
                x = scheduler.step(e, scheduler.timesteps[k], x).prev_sample


def test_buffer():
    buffer, random = ReplayBuffer(5), torch.Generator().manual_seed(0)
    assert len(buffer) == 0
    for start in (0, 2, 4):  # 0 1 | 2 3 | 4 5: the oldest goes
        items = torch.arange(start, start + 2)
        buffer.push({"a": items, "b": items[:, None] * 10.0})
    assert len(buffer) == 5 and buffer.items["a"].tolist() == [1, 2, 3, 4, 5]
    drawn = buffer.sample(5, random)
    assert sorted(drawn["a"].tolist()) == [1, 2, 3, 4, 5]  # none twice
    assert torch.equal(drawn["b"][:, 0], drawn["a"] * 10.0)  # what belongs together stays together
    assert len(set(buffer.sample(3, random)["a"].tolist())) == 3
    many = torch.cat([buffer.sample(8, random)["a"] for _ in range(200)])  # more than it holds: with repeats
    assert set(many.tolist()) == {1, 2, 3, 4, 5} and many.bincount()[1:].min() > 200
    again = ReplayBuffer(5)
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.items["b"], buffer.items["b"])


def test_top_experts_counts_an_item_once_and_keeps_the_first_of_equals():
    nan = float("nan")
    scores = {
        "score_0": torch.tensor([5.0, 9.0, nan, 5.0]), "key_0": torch.tensor([1, 2, 3, 4]),
        "score_1": torch.tensor([9.0, 7.0, 1.0, 5.0]), "key_1": torch.tensor([2, 5, 6, 7]),
    }  # fmt: skip
    best = top_experts(scores, 4)
    assert best == [(0, 1, 9.0), (1, 1, 7.0), (0, 0, 5.0), (3, 0, 5.0)]  # (1, 0) is (0, 1) again
    assert [b[2] for b in top_experts(scores, 99)] == [9, 7, 5, 5, 5, 1]  # all there are, the broken one not


@pytest.fixture
def experts_run(make_set, rows, tmp_path):
    """experts_run("name", more flags) trains for 4 steps of 8 experts and returns the run's folder."""
    data = make_set(rows[:24])

    def run(name, *more):
        out = tmp_path / name
        dro.main([
            "--steps", "4", "--batch", "8", "--micro_batch", "4", "--warmup", "2", "--eval_prompts", "0",
            "--save_every", "2", "--experts", "12", "--data", data, "--out", str(out),
            "--cache", str(tmp_path / "cache"), *more,
        ])  # fmt: skip
        return out

    return run


def test_without_old_samples_the_policy_term_has_no_gradient(experts_run, log_of):
    """M = 1, no buffer: the policy's target is the trained UNet's own prediction. Old samples change that."""
    gated = log_of(experts_run("gated"))
    assert all(line["policy_share"] < 1e-5 for line in gated) and gated[0]["err_expert"] > 0.01
    for name, flags in {"refresh": ["--refresh_every", "4"], "buffer": ["--buffer", "16"]}.items():
        log = log_of(experts_run(name, *flags))
        assert log[0]["policy_share"] < 1e-5 and log[3]["policy_share"] > 1e-3, name


def test_the_gradient_itself(rows, make_set, experts_run):
    """The same of the weights' gradients, not of a logged number."""
    models = common.Models(dro.Config(model=str(TINY / "model")), torch.device("cpu"))
    cond = models.encode_prompts(["a red star on navy"] * 4)
    random = torch.Generator().manual_seed(0)
    x0, noise, xT = torch.randn(3, 4, 4, 8, 8, generator=random)
    t = torch.tensor([130, 420, 510, 860])
    levels, stop = torch.arange(19, -1, -1)[:, None] * 50 + t % 50, 19 - t // 50

    def norms(policy):
        def eps_fn(x, t, rows):
            return models.predict_eps(policy, x, t, common.take(cond, rows))

        with torch.no_grad():
            xp, ep, at = rollout(eps_fn, xT, levels, stop, models.alpha_bar)
        assert torch.equal(at, t)
        xe = common.add_noise(x0, noise, t, models.alpha_bar)
        result = []
        for x, target in ((xe, noise), (xp, ep)):
            models.unet.zero_grad()
            dro.denoising_error(models.predict(models.unet, x, t, cond), target).mean().backward()
            result.append(sum(p.grad.square().sum() for p in models.unet.parameters()).sqrt().item())
        return result[1] / result[0]

    old = common.reference_unet(models, dro.Config())
    assert norms(models.unet) < 1e-5
    with torch.no_grad():
        for p in models.unet.parameters():
            p.mul_(1 + 1e-2 * torch.randn(p.shape, generator=random))
    assert norms(models.unet) < 1e-5 and norms(old) > 1e-2


def test_experts_are_the_best_images_and_sft_reads_them(experts_run, rows, log_of, tmp_path, capsys):
    from datasets import load_dataset

    import dpo_baseline

    out = experts_run("run", "--steps", "1")
    chosen = load_dataset("parquet", data_files=str(out / "experts.parquet"), split="train")
    score = common.load_reward(TINY / "reward")
    everything = {}
    for row in rows[:24]:
        for name in common.PAIR:
            image, text = common.decode_image(row[name]), row["caption"]
            everything[text, row[name]] = score([image], [text]).item()
    best = sorted(everything.values(), reverse=True)[:12]
    assert chosen["score"] == pytest.approx(best, abs=1e-4)
    assert f"12 experts, scored {best[-1]:.4g} to {best[0]:.4g}" in capsys.readouterr().out
    assert all(everything[r["caption"], r["image"]] == pytest.approx(r["score"], abs=1e-4) for r in chosen)
    dpo_baseline.main([
        "--sft", "--data", str(out / "experts.parquet"), "--steps", "1", "--batch", "4", "--micro_batch", "4",
        "--eval_prompts", "0", "--out", str(tmp_path / "sft"), "--cache", "",
    ])  # fmt: skip
    assert len(log_of(tmp_path / "sft")) == 1
    # the same by a scores file, and by giving the experts themselves
    by_file = experts_run("file", "--steps", "1", "--scores", str(out / "scores.safetensors"))
    given = experts_run("given", "--steps", "1", "--data", str(out / "experts.parquet"))
    losses = [log_of(o)[0]["grad_norm"] for o in (out, by_file, given)]
    assert losses[0] == losses[1] == losses[2] and not (given / "experts.parquet").exists()


@pytest.mark.parametrize("flags", [[], ["--refresh_every", "3", "--buffer", "12", "--ema", "0.9"]])
def test_resume_with_buffer_policy_and_average(experts_run, log_of, flags):
    whole, cut = experts_run("whole", *flags), experts_run("cut", "--steps", "2", *flags)
    experts_run("cut", "--resume", *flags)
    a, b = (load_file(out / "unet" / "diffusion_pytorch_model.safetensors") for out in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)
    kept = {f.name for f in (whole / "checkpoint" / "4").iterdir()}
    names = {"policy.safetensors", "buffer-0.safetensors", "buffer-1.safetensors"}
    assert (names <= kept) == bool(flags)
    assert [x["loss"] for x in log_of(whole)] == [x["loss"] for x in log_of(cut)]
    if flags:  # what is written is the average, whose decay is short at first
        assert [line["ema_decay"] for line in log_of(whole)] == [1 / 10, 2 / 11, 3 / 12, 4 / 13]
        last = load_file(whole / "checkpoint" / "4" / "unet.safetensors")
        average = load_file(whole / "checkpoint" / "4" / "average.safetensors")
        assert any(not torch.equal(last[k], a[k]) for k in a)
        model = common.Models(dro.Config(model=str(TINY / "model")), torch.device("cpu")).unet
        order = [k for k, _ in model.named_parameters()]
        assert all(torch.equal(average[str(i)], a[k]) for i, k in enumerate(order))


@pytest.mark.parametrize("flags, words", [
    (["--rollout_steps", "30"], "--rollout_steps 30 does not divide"),
    (["--scores", str(TINY / "facts.json")], "no scores file"),
])  # fmt: skip
def test_bad_input(experts_run, flags, words):
    with pytest.raises(common.InputError, match=words):
        experts_run("bad", *flags)


def test_scores_of_a_larger_set_are_refused(experts_run, make_set, rows):
    """Of a set whose first rows are these: the keys that are met agree, the best images may lie beyond."""
    more = experts_run("more", "--steps", "1")
    few = make_set(rows[:3], "few.parquet")
    with pytest.raises(common.InputError, match="was made from other rows"):
        experts_run("few", "--data", few, "--scores", str(more / "scores.safetensors"))


def test_a_model_without_signal_at_its_last_timestep_is_refused(experts_run, tmp_path):
    """Zero terminal SNR: a rollout would divide by alpha = 0."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(common.InputError, match="no signal at its last timestep"):
        experts_run("bad", "--model", str(tmp_path / "model"))


def test_config_is_recorded(experts_run):
    out = experts_run("run", "--steps", "1", "--margin", "0.01")
    assert json.loads((out / "config.json").read_text())["margin"] == 0.01
