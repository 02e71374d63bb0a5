"""Would the tests notice? One fault of one line at a time, in a copy of the tree; the named tests must fail.

Not collected by default, for its name is not test_*.py. An hour of two cores for all, or a sample:

    pytest -m slow tests/mutants.py
    python tests/mutants.py --sample 25 --seed 1
"""

# ruff: noqa: E501  (the table of faults quotes lines whole)

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
D3PO, SAMPLE, SFT, SCORER, COMMON, MODEL = "train_d3po sample train_sft train_scorer common model".split()

# file, old text (once in the file), new text, test files
# fmt: off
FAULTS: list[tuple[str, str, str, str]] = [
    # what three blind lists of 2026-11-30 got past the tests of their files
    ("train_d3po", "log.add(step, **metrics", "log.add(n, **metrics", "train_d3po"),
    ("sample", "stride = self.num_train // num_steps", "stride = round(self.num_train / num_steps)", "sample"),
    ("common", "signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))", "signal.signal(signal.SIGTERM, signal.default_int_handler)", "common"),
    ("common", "    return os.path.abspath(a) == os.path.abspath(b)", "    return os.path.realpath(a) == os.path.realpath(b)", "common"),
    ("common", "return type(value) in (int, hint) and abs(value) < 1e9", "return type(value) in (int, float) and abs(value) < 1e9", "model"),
    ("common", "file.metadata() or {}", "file.metadata()", "common"),
    ("common", "if wrong := [*report[\"missing_keys\"], *broken]:", "if wrong := [*report[\"unexpected_keys\"], *broken]:", "sdxl"),
    ("common", "    state = state.get(\"state_dict\", state)\n", "", "matcher"),
    ("common", "return [what.func, what.args, what.keywords]", "return [what.func, what.args]", "common"),
    ("common", "norm = torch.nn.utils.clip_grad_norm_(parameters, clip)", "norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)", "common"),
    ("cache", "f\"{re.escape(link.name)}-[0-9a-f]{{8}}\"", "f\"{link.name}-[0-9a-f]{{8}}\"", "common"),
    ("cache", "                    elif path.name != \".lock\":\n", "                    else:\n", "common"),
    ("cache", "if k not in (*without, \"out\", \"device\")}", "if k not in (*without, \"out\")}", "common"),
    ("model", "            layer.to_out[0] = LoRALinear(layer.to_out[0], rank)\n", "", "model"),
    ("sample", "@torch.no_grad()\ndef sample(", "def sample(", "sample"),
    ("evaluate", "contrastive_reward(scorer, reference, x)", "contrastive_reward(scorer, x[:, 0], x)", "evaluate"),
    ("grid", "scale = math.ceil(side / size)", "scale = max(1, side // size)", "evaluate"),
    ("theory", "jacobians += [max_error(found, J), max_error(found.T, J)]", "jacobians += [max_error(found, found.T)]", "theory"),
    ("theory", "failed, refuted = sum(not c.passed for c in done),", "failed, refuted = sum(not c.passed for c in done if isinstance(c, Holds)),", "theory"),
    ("runs/theory_extra", "contrast > torch.maximum(*(", "contrast > torch.minimum(*(", "theory"),
    ("train_sft", "freeze(cfg.attention_only, model.cfg.is_sdxl and bf16,", "freeze(cfg.attention_only, bf16,", "train_sft"),
    ("train_sft", "sources = [by_name[source] for source in cfg.data]", "sources = list(by_name.values())", "train_sft"),
    ("evaluate", "low, high = bootstrap_interval(values)", "low, high = bootstrap_interval(values.flatten())", "evaluate"),
    ("evaluate", "if cfg.against and Path(path).resolve() == Path(cfg.against).resolve():", "if cfg.against and path == cfg.against:", "evaluate"),
    ("evaluate", " or name.startswith(\"truth, \"):", ":", "evaluate"),
    ("matcher", "KF.SIFTFeature(500, True, **how)", "KF.SIFTFeature(500, False, **how)", "matcher"),
    ("matcher", "torch.bincount(pairs[\"batch_indexes\"], minlength=len(views))", "torch.bincount(pairs[\"batch_indexes\"])", "matcher"),
    ("theory", "for run in checks for check in run(seed)", "for run in checks for check in run(0)", "theory"),
    ("theory", "SystemExit(cli(main, Config, __doc__) > 0)", "SystemExit(cli(main, Config, __doc__) > 1)", "theory"),
    # Eq. (2) and its weights
    (D3PO, "loss = -F.logsigmoid(margin).mean()", "loss = F.logsigmoid(margin).mean()", D3PO),
    (D3PO, "margin = beta * (log_ratio_w - log_ratio_l)", "margin = beta * (log_ratio_l - log_ratio_w)", D3PO),
    (D3PO, "margin = beta * (", "margin = (", D3PO),
    (D3PO, "(margin.sign() + 1).mean().item() / 2", "(1 - margin.sign()).mean().item() / 2", D3PO),
    (D3PO, "(margin.sign() + 1).mean().item() / 2", "(margin > 0).float().mean().item()", D3PO),
    (D3PO, '"log_ratio_w": log_ratio_w.mean()', '"log_ratio_w": log_ratio_l.mean()', D3PO),
    (D3PO, "loss_d3po + cfg.kl * cfg.beta_dpo * kl.mean()", "loss_d3po + cfg.kl * kl.mean()", D3PO),
    (D3PO, "loss_d3po + cfg.kl * cfg.beta_dpo", "loss_d3po - cfg.kl * cfg.beta_dpo", D3PO),
    (D3PO, "(cfg.lambda_simple * loss_simple).backward()", "loss_simple.backward()", D3PO),
    (D3PO, "d3po_loss(ratio[b, w], ratio[b, l], cfg.beta_dpo)", "d3po_loss(ratio[b, w], ratio[b, l], 1.0)", D3PO),
    (D3PO, "d3po_loss(ratio[b, w], ratio[b, l]", "d3po_loss(ratio[b, l], ratio[b, w]", D3PO),
    # batches, rates, seeds
    (D3PO, "g = keyed_generator(cfg.seed, 6, n)", "g = keyed_generator(cfg.seed, 6, 0)", D3PO),
    (D3PO, "g = keyed_generator(cfg.seed, 6, n)", "g = keyed_generator(0, 6, n)", D3PO),
    (D3PO, "parameters, 1 - step / cfg.steps, step)", "parameters, 1.0, step)", D3PO),
    (D3PO, "cfg.batch_objects, cfg.seed, n, device)", "cfg.batch_objects, cfg.seed, 0, device)", D3PO),
    (D3PO, "torch.stack([chosen, torch.randint(J,", "torch.stack([chosen, 0 * torch.randint(J,", D3PO),
    (D3PO, "usable[torch.randint(len(usable)", "torch.arange(len(wins))[torch.randint(len(usable)", D3PO),
    # candidates
    (D3PO, "key_seed(cfg.seed, 8, round, int(i)) for i in group", "key_seed(cfg.seed, 8, 0, int(i)) for i in group", D3PO),
    (D3PO, "key_seed(cfg.seed, 8, round, int(i)) for i in group", "key_seed(cfg.seed, round, int(i)) for i in group", D3PO),
    (D3PO, "key_seed(cfg.seed, 8, round, int(i)) for i in group", "key_seed(0, 8, round, int(i)) for i in group", D3PO),
    (D3PO, "key_seed(cfg.seed, 8, round, int(i)) for i in group", "key_seed(cfg.seed, 8, round, 0) for i in group", D3PO),
    ("candidates", "for p in parts])[order] for name", "for p in parts]) for name", D3PO),
    ("candidates", "states[:, calls + 1]", "states[:, calls]", D3PO),
    ("candidates", "own = range(cfg.num_steps)\n", "own = range(1)\n", D3PO),
    ("candidates", "len(NOISE_SCALES), range(0)", "len(NOISE_SCALES), range(cfg.num_steps)", D3PO),
    ("candidates", "own = trained = range(call, call + 1)", "own, trained = range(call, cfg.num_steps), range(call, call + 1)", D3PO),
    ("sample", "g * (call in own)", "g * (call not in own)", "sample train_d3po"),
    (D3PO, "calls = torch.randint(first, last + 1", "calls = torch.randint(first, first + 1", D3PO),
    (D3PO, '"policy": digest(policy),', '"policy": str(policy),', D3PO),
    (D3PO, "(images * 255).round().to(torch.uint8)\n            save", "(images * 255).to(torch.uint8)\n            save", D3PO),
    # preferences
    ("feedback", "cfg) + colours(ref", "cfg) - colours(ref", D3PO),
    ("feedback", "metrics.colours(images, ref)", "metrics.colours(images, images[0, 0])", D3PO),
    ("metrics", "in (views[:, 1:], ref.expand", "in (views, ref.expand", "metrics"),
    ("metrics", "1 - (values - own[:, None]).abs()", "1 - (values - own[:, None])", "metrics"),
    ("metrics", "z.flatten(-2).sort(-1).values for", "z.flatten(-2) for", "metrics"),
    ("feedback", "rewards[:, :, None] > rewards[:, None]", "rewards[:, :, None] < rewards[:, None]", D3PO),
    ("feedback", "rewards[:, :, None] > rewards[:, None]", "rewards[:, :, None] >= rewards[:, None]", D3PO),
    ("feedback", "rewards = rewards.gather(1, compared)", "rewards = rewards[:, : compared.shape[1]]", D3PO),
    ("feedback", "[rewards.argmax(1), rewards.argmin(1)]", "[rewards.argmin(1), rewards.argmax(1)]", D3PO),
    ("candidates", 'part["x0"][b, chosen]', 'part["x0"][:, :2]', D3PO),
    ("candidates", "[b, :, chosen].transpose(1, 2)", "[:, :, : chosen.shape[1]]", D3PO),
    (D3PO, "psnr = kept[\"psnr\"].gather(1, compared)", "psnr = kept[\"psnr\"]", D3PO),
    (D3PO, "rewards[i], psnr[i] = rate(", "rewards[len(references) - 1 - i], psnr[i] = rate(", D3PO),
    ("feedback", "images[:, :, 0] - images[:, :, 1:].mean(2)", "images[:, :, 2] - images[:, :, 1:].mean(2)", D3PO),
    ("feedback", "return -torch.arange(len(images)).float()", "return torch.arange(len(images)).float()", D3PO),
    ("feedback", "keyed_generator(cfg.seed, key)", "keyed_generator(0, key)", D3PO),
    ("feedback", "- 0.32 * larger", "+ 0.32 * larger", D3PO),
    ("metrics", "silhouettes(views[:, 1:]).float()", "silhouettes(views).float()", "train_d3po evaluate metrics"),
    (D3PO, '"code": [digest(feedback), ', '"code": [', D3PO),
    (D3PO, '"code": code("candidates", "model", "sample")', '"code": 0', D3PO),
    (D3PO, '"code": [ours, *map(', '"code": [*map(', D3PO),
    (D3PO, 'if feedback.__module__ != "feedback"', "if False", D3PO),
    (D3PO, "torch.full((len(references), G), torch.nan)", "torch.zeros((len(references), G))", D3PO),
    ("candidates", "if not torch.equal(reference.sort().values", "if False and not torch.equal(reference.sort().values", D3PO),
    (D3PO, 'made_by["scorer"] = digest(Path(cfg.scorer))\n', 'made_by["scorer"] = cfg.scorer\n', D3PO),
    (D3PO, "rewards.isfinite().logical_not()", "(rewards > 0).logical_and(rewards < 0)", D3PO),
    # log-ratios
    (D3PO, "t, s = (z.repeat_interleave(batch.x_t.shape[1], 0) for", "t, s = (z.repeat(batch.x_t.shape[1]) for", D3PO),
    (D3PO, "*(z.repeat_interleave(G, 0) for z in (t, noise))", "*(z.repeat(G, *z.shape[1:] and [1] * 4) for z in (t, noise))", D3PO),
    (SAMPLE, "t[:: len(t) // len(y)]", "t[: len(y)]", "sample train_d3po"),
    (D3PO, "kl_divergence(mean, pre, var).view(B, G).mean(1)", "kl_divergence(mean, pre, var).view(B, G).sum(1)", D3PO),
    (D3PO, "ratio = (weight * ((x0 - old) ** 2 - (x0 - theta) ** 2))", "ratio = (weight * ((x0 - theta) ** 2 - (x0 - old) ** 2))", D3PO),
    (D3PO, "else 1) / (2 * (1 - ab))", "else 1) / (1 - ab)", D3PO),
    (D3PO, "keyed_generator(seed, 11, step)", "keyed_generator(seed, 11)", D3PO),
    (D3PO, "== getattr(type(self), name)", "!= getattr(type(self), name)", D3PO),
    (D3PO, "frozen = policy if equal", "frozen = policy if not equal", D3PO),
    (D3PO, "loftr_model(cfg.matcher", "(lambda *_: 0)(cfg.matcher", D3PO),
    (SCORER, "right.double().sum(1) - bad", "right.double().sum(1) + bad", SCORER),
    (D3PO, '"noised" if papers else "branch"', '"branch" if papers else "noised"', D3PO),
    (D3PO, "round * cfg.steps + step", "step", D3PO),
    (D3PO, "drawn.flatten(0, 1).unique(dim=0)", "drawn[0]", D3PO),
    (D3PO, "range(round * cfg.steps, (round + 1) * cfg.steps)", "range(cfg.steps)", D3PO),
    (D3PO, "cfg.num_candidates != (G := len(NOISE_SCALES))", "cfg.num_candidates < (G := len(NOISE_SCALES))", D3PO),
    (D3PO, 'chosen = suits if self.candidates == "auto" else', "chosen = suits if True else", D3PO),
    ("common", "return sorted(map(str, what))", "return str(what)", COMMON),
    ("evaluate", 'digest(Path(cfg.model)) if model else ""', '""', "evaluate"),
    (D3PO, '(ab if schedule.prediction == "epsilon" else 1)', "1", D3PO),
    ("candidates", "trained = trained[:1]", "pass", D3PO),
    (D3PO, "yours = (d3po_loss, step_", "yours = (step_", D3PO),
    (D3PO, "old = predict(pre)", "old = predict(policy)", D3PO),
    (D3PO, "means[part[:, 0], part[:, 1]] = mean", "means[part[:, 0], part[:, 1] * 0] = mean", D3PO),
    ("candidates", "rollouts.x0[chosen], times[:, 0], times[:, 1]", "rollouts.x0[chosen], times[:, 1], times[:, 1]", D3PO),
    (D3PO, "frozen = copy.deepcopy(frozen)", "frozen = (frozen)", D3PO),
    (D3PO, "ratio.abs().max()) * cfg.beta_dpo > 1e-3", "ratio.abs().max()) * cfg.beta_dpo > 1e9", D3PO),
    (D3PO, 'pre if cfg.anchor == "pre" else policy', "pre", D3PO),
    (D3PO, "policy, how = load(model, device, half=bf16)", "policy, how = load(cfg.model, device, half=bf16)", D3PO),
    (D3PO, "before_after(before, after, truth", "before_after(after, before, truth", D3PO),
    # the sampler
    (SAMPLE, "return ((mean_theta - mean_pre) * (action - (", "return ((mean_pre - mean_theta) * (action - (", SAMPLE),
    (SAMPLE, "(action - (mean_theta + mean_pre) / 2) / var)", "(action - mean_pre) / var)", SAMPLE),
    (SAMPLE, "(mean_theta - mean_pre) ** 2 / (2 * var)", "-((mean_theta - mean_pre) ** 2) / (2 * var)", SAMPLE),
    (SAMPLE, "(mean_theta - mean_pre) ** 2 / (2 * var)", "(mean_theta - mean_pre) ** 2 / var", SAMPLE),
    (SAMPLE, "-0.5 * ((x - mean) ** 2 / var + (2 *", "-0.5 * ((x - mean) ** 2 / var + (1 *", SAMPLE),
    (SAMPLE, "var = (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)\n    #", "var = (1 - ab_t / ab_s)\n    #", SAMPLE),
    (SAMPLE, "ab.sqrt() * x_t - (1 - ab).sqrt() * prediction", "ab.sqrt() * x_t + (1 - ab).sqrt() * prediction", SAMPLE),
    (SAMPLE, "(alpha_bar + shift**2 * (1 - alpha_bar))", "(alpha_bar + shift * (1 - alpha_bar))", SAMPLE),
    (SAMPLE, "times = [1 + stride * k", "times = [stride * k", SAMPLE),
    (SAMPLE, "if not 2 <= num_steps <= 500", "if not 1 <= num_steps <= 500", SAMPLE),
    (SAMPLE, "(ab * cfg.ref_scale**2 + 1 - ab).sqrt()", "1", "sample train_sft model"),
    (SAMPLE, "forward_noise(schedule, cfg.ref_scale * y, t, noise)", "forward_noise(schedule, y, t, noise)", "sample train_sft model"),
    (SAMPLE, "draw(y.shape[1:], [(seed, 1) for seed in seeds])", "draw(y.shape[1:], [(seed, 0) for seed in seeds])", SAMPLE),
    (SAMPLE, "draw((len(VIEWS), *y.shape[1:]), [", "torch.zeros(5, *y.shape[1:]) + draw((1, *y.shape[1:]), [", SAMPLE),
    (SAMPLE, "(seed, 3, call, g *", "(seed, 3, 0, g *", SAMPLE),
    (SAMPLE, "g * (call in own)", "0", "sample train_d3po"),
    (SAMPLE, "if call in own and len(x) < B * G", "if len(x) < B * G", "sample"),
    (COMMON, 'option.name == "data" and v in', "v in", COMMON),
    (SAMPLE, "keys = [(seed, 2, round(1000 * a))", "keys = [(seed, 2)", SAMPLE),
    (SAMPLE, "policy_mean(model, schedule, x, seen,", "policy_mean(model, schedule, x, y,", SAMPLE),
    ("candidates", "ref, seeds, cfg.num_steps", "ref, seeds[:1] * len(ref), cfg.num_steps", D3PO),
    (SAMPLE, "for seed in seeds for g in range(len(mean) // B)", "for g in range(len(mean) // B) for seed in seeds", SAMPLE),
    (SAMPLE, "[*noise_scales] * B", "sorted([*noise_scales] * B)", D3PO),
    ("candidates", "x_t = x_t[:, :, :1]", "x_t = action[:, :, :1]", D3PO),
    (SAMPLE, "[key_seed(seed, i + j) for j in range(len(part))]", "[key_seed(seed, j) for j in range(len(part))]", SAMPLE),
    (SAMPLE, "(torch.cat(images) * 255).round() / 255", "torch.cat(images)", SAMPLE),
    # stage 1
    (SFT, "error = (prediction - noise) ** 2", "error = (prediction - latents) ** 2", SFT),
    (SFT, "(prediction - latents) ** 2 / (1 - ab)", "(prediction - latents) ** 2 / ab", SFT),
    (SFT, "(ab.sqrt() * noise - (1 - ab).sqrt() * latents)", "(ab.sqrt() * latents - (1 - ab).sqrt() * noise)", SFT),
    (SFT, "ema[name].lerp_(value, 1 - d)", "ema[name].lerp_(value, d)", SFT),
    (SFT, "model.load_state_dict(ema, strict=False)\n", "pass\n", SFT),
    (SFT, "model.train().load_state_dict(weights, strict=False)", "model.train()", SFT),
    (SFT, "g = keyed_generator(seed, step)\n    chosen", "g = keyed_generator(seed)\n    chosen", SFT),
    (SFT, "rate = min(1, (step + 1) / cfg.warmup) *", "rate =", SFT),
    (SFT, "relative_views(views, int(torch.randint(NUM_SIDES, (), generator=g)))", "relative_views(views, 0 * int(torch.randint(NUM_SIDES, (), generator=g)))", SFT),
    (SFT, "replace(preset, cross_view=cfg.cross_view", "replace(preset, cross_view=True", SFT),
    (SFT, "(step * batch_size + k) % len(sources)", "0", SFT),
    (SFT, "(step * batch_size + k) % len(sources)", "k % len(sources)", SFT),
    (SFT, "views = augment(views, g) if augmented else views", "views = views", SFT),
    (SFT, '("wrong", y.roll(1, 0))', '("wrong", y)', SFT),
    (SFT, "y.roll(1, 0)", "y.roll(1)", SFT),
    # stage 2
    (SCORER, "((f_true - 1) ** 2).mean() + (f_fake**2).mean()", "(f_true**2).mean() + ((f_fake - 1) ** 2).mean()", SCORER),
    (SCORER, "(every[~own] ** 2).mean()", "(every[own] ** 2).mean()", SCORER),
    (SCORER, "consistency_loss(every[own], scorer", "consistency_loss(every[~own], scorer", SCORER),
    (SCORER, "(loss + cfg.mismatch * mismatch).backward()", "loss.backward()", SCORER),
    (SCORER, "make_batch(cfg, truth[:n], fake[:n], step)", "make_batch(cfg, truth[n:], fake[n:], step)", SCORER),
    (SCORER, "make_batch(cfg, truth[:n], fake[:n], step)", "make_batch(cfg, truth[:n], fake[:n], 0)", SCORER),
    (SCORER, "evaluate(scorer, truth[n:], fake[n:])", "evaluate(scorer, truth[:n], fake[:n])", SCORER),
    (SCORER, "order = MIRRORED_ORDER + [views - 1 + m", "order = list(range(5)) + [views - 1 + m", SCORER),
    (SCORER, "images = images[:, order].flip(-1)", "images = images[:, order]", SCORER),
    (SCORER, "return float((ranks[:n].double().sum() - n * (n + 1) / 2)", "return float((ranks[:n].double().sum() - n * (n - 1) / 2)", SCORER),
    (SCORER, "margin = right.double().sum(1) - bad.double().sum(1)", "margin = bad.double().sum(1) - right.double().sum(1)", SCORER),
    (SCORER, "key_seed(cfg.seed, 9, i + j) for j", "key_seed(cfg.seed, i + j) for j", SCORER),
    ("scorer", "return scorer.score(ref, views)[:, 1:].sum(dim=1)", "return scorer.score(ref, views).sum(dim=1)", "scorer"),
    ("scorer", "f = f + ((e_ref @ self.W) * e_views).sum(-1)", "f = f + ((e_views @ self.W) * e_ref).sum(-1)", "scorer"),
    ("scorer", "(images - self.mean) / self.std", "(images - self.mean)", "scorer"),
    # the network
    (MODEL, "if size:  # equal projections", "if not size:  # equal projections", MODEL),
    (MODEL, "self.position[labels]", "self.position[labels % NUM_VIEWS]", MODEL),
    (MODEL, "t[:: B // n]", "t[:n]", MODEL),
    (MODEL, '"n ... -> (n g) ..."', '"n ... -> (g n) ..."', MODEL),
    (MODEL, "torch.meshgrid(-centre, centre", "torch.meshgrid(centre, centre", MODEL),
    (MODEL, "(self.to_k, placed), (self.to_v, x)", "(self.to_k, x), (self.to_v, x)", MODEL),
    (MODEL, "V = V if self.cross_view else 1", "V = 1", MODEL),
    (MODEL, "V = V if self.cross_view else 1", "", MODEL),
    (MODEL, "attention(q_ref, k_ref, v_ref)", "attention(q_ref, k_ref, k_ref)", MODEL),
    (MODEL, "nn.init.zeros_(self.unet.class_embedding.weight)", "pass", "model sdxl"),
    (MODEL, "* B + [NUM_VIEWS] * n, device", "* B + [0] * n, device", MODEL),
    (MODEL, "if axes[0].sum() < 0]", "if axes[0].sum() > 0]", MODEL),
    (MODEL, "axes[:, 0] = axes[:, 0].abs()", "axes[:, 0] = axes[:, 0]", MODEL),
    (MODEL, "return output if self.cfg.is_sdxl else unmirrored(output, self.cfg.patch)", "return output", MODEL),
    (MODEL, "x_t = unmirrored(x_t, self.cfg.patch)", "pass", MODEL),
    (MODEL, "unet.conv_norm_out = None", "pass", MODEL),
    ("muon", "g.norm() + 1e-7", "1.0 + 1e-7", SFT),
    (MODEL, "self.exact.float() + (self.up @ self.down)", "self.exact.float() - (self.up @ self.down)", MODEL),
    (MODEL, 'return mean * self.vae.config["scaling_factor"]', "return mean", "sdxl"),
    (MODEL, "F.pixel_unshuffle(images * 2 - 1", "F.pixel_unshuffle(images", MODEL),
    (MODEL, "p.requires_grad_(id(p) in trained)", "p.requires_grad_(True)", MODEL),
    # data
    ("data", ".roll(-r, dims=-4)", ".roll(r, dims=-4)", "data"),
    ("data", "-r * sense, dims=(-2, -1)", "r * sense, dims=(-2, -1)", "data"),
    ("data", "torch.diag_embed(1 / scale)", "torch.diag_embed(1 / scale.flip(1))", "data"),
    ("data", "image = image[MIRRORED_ORDER].flip(-1)", "image = image.flip(-1)", "data"),
    ("data", '"validation": ("blendswap", slice(0, 64))', '"validation": ("blendswap", slice(0, 65))', "data"),
    ("data", "generator=keyed_generator(0))[cut].tolist()", "generator=keyed_generator(1))[cut].tolist()", "data"),
    ("data", "g = keyed_generator(seed, 5, i)", "g = keyed_generator(seed, 5)", "data"),
    ("data", "views if i < len(objects) else augment(views, g), side", "views, side", "data"),
    ("data", '"seed": seed, "renderer": code("render", "toys")}', '"seed": seed}', "data"),
    ("render", "covered, seen = nearest(pixel, 2 - t,", "covered, seen = nearest(pixel, t - 2,", "data"),
    ("render", "make_toy(key_seed(seed, first + j))", "make_toy(key_seed(seed, j))", "data"),
    ("meshes", 'facing = torch.where(mesh["face"][tri] @ CAMERAS[view, 2] < 0, -1.0, 1.0)', "facing = torch.ones(len(tri))", "data"),
    ("meshes", "items() if not found]", "items() if found]", "data"),
    ("meshes", "row = ((1 - v) * height)", "row = (v * height)", "data"),
    ("meshes", "first = np.cumsum([0, *(", "first = 0 * np.cumsum([0, *(", "data"),
    ("meshes", "torch.tensor(thresholds).repeat", "torch.tensor(thresholds[::-1]).repeat", "data"),
    ("meshes", "torch.tensor(places).repeat", "torch.tensor(places[::-1]).repeat", "data"),
    ("pictures", "(255, 255, 255, 255)", "(0, 0, 0, 255)", "data"),
    ("muon", "p.add_(x, alpha=-group", "p.add_(x, alpha=group", SFT),
    ("muon", 'p.grad.lerp(m, group["momentum"])', "p.grad", SFT),
    ("sample", "cfg.seed, cfg.num_steps, bf16=bf16)[0]", "cfg.seed, bf16=bf16)[0]", "sample"),
    (D3PO, "for z in (psnr, -compared))", "for z in (psnr, compared))", D3PO),
    # metrics, matcher
    ("metrics", "return views.amin(dim=-3) < 0.9", "return views.amin(dim=-3) < 0.5", "metrics"),
    ("metrics", "masks.all(0).sum(dims) / masks.any(0)", "masks.any(0).sum(dims) / masks.any(0)", "metrics"),
    ("metrics", "mask = mask.flip([1 + d for d in (0, 1) if camera[d].sum() < 0])", "pass", "metrics"),
    ("metrics", "mask if i < j else mask.mT", "mask", "metrics"),
    ("metrics", "return torch.stack(below).any(0) | no_object(views)", "return torch.stack(below).all(0) | no_object(views)", "metrics"),
    ("metrics", "(change < 8 / 255).all(1)", "(change < 8 / 255).any(1)", "metrics"),
    ("metrics", "d.new_tensor([0.025, 0.975])", "d.new_tensor([0.05, 0.95])", "metrics"),
    ("metrics", "return psnr(images[:, 1:].flatten(1, 2), truth[None, 1:]", "return psnr(images.flatten(1, 2), truth[None]", "metrics"),
    ("metrics", "hull = {(0, 1): a * (c @ b.mT > 0)", "hull = {(0, 1): a * (b @ c.mT > 0)", "metrics"),
    ("evaluate", "with_interval(new[name] - old[name])", "with_interval(old[name] - new[name])", "evaluate"),
    ("evaluate", "with_interval(measured[name] - earlier[name])", "with_interval(earlier[name] - measured[name])", "evaluate"),
    ("evaluate", "digest(Path(folder)) for name, folder", "digest(folder) for name, folder", "evaluate"),
    ("matcher", "own = features(to_grey(ref[None]))", "own = features(grey[0, :1])", "matcher"),
    ("matcher", "count(own, candidate) for candidate in grey", "count(own, grey[0]) for candidate in grey", "matcher"),
    ("matcher", "count_matches(ref, views[:, 1:]", "count_matches(ref, views", "matcher"),
    # what is kept
    (COMMON, "state = (state ^ (int(part) + 0x9E3779B97F4A7C15))", "state = (0 ^ (int(part) + 0x9E3779B97F4A7C15))", COMMON),
    ("cache", 'for f, d in noted.pop("files").items() if digest(folder / f) != d]', 'for f, d in noted.pop("files").items() if not (folder / f).exists()]', COMMON),
    ("cache", "-{digest(made_by)[:8]}", "-{digest(list(made_by))[:8]}", COMMON),
    (COMMON, "if checksum(path, content[32:]) != content[:32]:", "if False:", COMMON),
    (COMMON, "temporary.unlink(missing_ok=True)\n        try", "path.unlink(missing_ok=True)\n        try", COMMON),
    (COMMON, 'self.state = state or {"text"', 'self.state = {**(state or {"sums": {}}), "text": ""} or {"text"', COMMON),
    (COMMON, "what.__kwdefaults__, held]", "what.__kwdefaults__]", COMMON),
    (COMMON, "[what.func, what.args, what.keywords]", "[what.func]", COMMON),
    ("cache", "key=lambda p: p == note", "key=str", COMMON),
    (COMMON, "asked or step + 1 == total or", "asked or", SFT),
    (D3PO, '"candidates", made_by | machine(cfg)', '"candidates", made_by', "damage"),
    ("cache", ', "bf16": bf16}', "}", "damage"),
    ("cache", 'code("common", "render")', '""', COMMON),
    ("cache", 'code("common", "render")', 'code("common")', COMMON),
    ("cache", "digest(body(getattr(make, \"func\", make)))", "0", COMMON),
    ("cache", "and ast.get_docstring(node)", "and not node", COMMON),
    (D3PO, '"views": [digest(z) for z in (before, after, truth)]', '"views": [digest(truth)]', D3PO),
    (D3PO, "    check_link(link)\n", "", D3PO),
    ("meshes", "corner - (low + high) / 2", "corner - low / 2", "data"),
    ("meshes", "trimesh.Trimesh) and len(", "trimesh.Trimesh) or len(", "data"),
    (SCORER, "check_link(Path(cfg.out)), machine", "Path(cfg.out), machine", SCORER),
    ("cache", "p.name != STATE", "True", COMMON),
    (COMMON, "else Path(path)).resolve()", "else Path(path))", COMMON),
    (COMMON, "sum(v) / len(v) for k, v", "sum(v) for k, v", COMMON),
    (COMMON, 'group["lr"] = rate * group', 'group["lr"] = 1.0 * group', COMMON),
    (COMMON, "clip_grad_norm_(parameters, clip)", "clip_grad_norm_(parameters, 1e9)", COMMON),
    (COMMON, "allow_tf32 = torch.backends.cudnn.allow_tf32 = False", "allow_tf32 = torch.backends.cudnn.allow_tf32 = True", COMMON),
    (COMMON, "torch.isfinite(norm)", "norm is not None", COMMON),
    # the survivors of an outside set, which have a test since
    (D3PO, '"references": digest(references), "seed"', '"references": digest(references[:, 0]), "seed"', D3PO),
    (D3PO, '{"objects": digest(objects)}', '{"objects": digest(objects[:, 0])}', D3PO),
    (D3PO, "[digest(z) for z in (before, after, truth)]", "[digest(z) for z in (before, after, truth[:, 0])]", D3PO),
    ("train_scorer", '"references": digest(truth[:, 0])', '"references": digest(train[:, 0])', "train_scorer"),
    ("runs/table1", '"ref": digest(ref), "seed"', '"ref": digest(ref[0]), "seed"', "runs"),
    ("runs/table1", 'code("candidates", "model"', 'code("model"', "runs"),
    ("candidates", "part[name].shape[2] > 1", "part[name].shape[2] > 2", D3PO),
    (D3PO, "torch.autocast(t.device.type, torch.bfloat16, enabled=bf16)", "torch.autocast(t.device.type, enabled=False)", D3PO),
    ("train_scorer", "cfg.num_steps, bf16=bf16).images", "cfg.num_steps).images", "train_scorer"),
    ("train_scorer", 'bf16, scorer = bf16 and device.type == "cuda", scorer', "bf16, scorer = bf16, scorer", "train_scorer"),
    ("train_scorer", '{"views": (images * 255).round()', '{"views": (images * 255)', "train_scorer"),
    ("train_scorer", "x.float() / 255, g) * 255).round()", "x.float() / 255, g) * 255)", "train_scorer"),
    ("pictures", "smooth.round().clamp", "smooth.floor().clamp", "data"),
    (MODEL, "if half and cfg.is_sdxl", "if half", MODEL),
    (MODEL, "if (height, width) != (size, size)", "if height != size", MODEL),
    ("scorer", "antialias=True).clamp(0, 1)", "antialias=True)", "scorer"),
    ("matcher", "size = max(MIN_SIZE, images.shape[-1])", "size = MIN_SIZE", "matcher"),
    ("matcher", "torch.set_num_threads(threads)", "torch.set_num_threads(1)", "matcher"),
    (SFT, '"position|time_emb"', '"position"', SFT),
    (SFT, "in (200, 500, 800, 950)", "in (200, 500, 800, 999)", SFT),
    (SFT, "model.train().load_state_dict(weights", "model.load_state_dict(weights", SFT),
    (SFT, 'time.time() - state.get("seconds", 0)', "time.time()", SFT),
    ("train_scorer", 'time.time() - state.get("seconds", 0)', "time.time()", "train_scorer"),
    ("runs/headroom", '"num_candidates", "num_steps", "seed"', '"num_candidates", "seed"', "runs"),
    ("runs/table1", "[key_seed(seed, i)]", "[key_seed(seed, 0)]", "runs"),
    ("runs/table1", "row not in (base, ", "row not in (", "runs"),
    ("runs/table1", "first.setdefault(row, images)", "first[row] = images", "runs"),
    ("runs/table1", '"silhouettes cover, %", 1, 100', '"silhouettes cover, %", 1, 1', "runs"),
    ("metrics", "(views[:, 1:] - views[:, :1]).abs().mean(2)", "(views[:, 1:] - views[:, :1]).abs().amax(2)", "metrics"),
    ("meshes", "* (pixels / 2) ** 2", "* pixels**2", "data"),
    ("meshes", "if count[name.lower()] > 1", "if count[name] > 1", "data"),
    ("evaluate", "{100 * c['share']:.0f}", "{c['share']:.0f}", "evaluate"),
    ("bench", "memory.peak / 1e6", "memory.peak / 2**20", "runs"),
    ("theory", "torch.tensor(check.errors).max()", "torch.tensor(check.errors).min()", "theory"),
    ("runs/theory_extra", "max(row[1:4])", "max(row[1:3])", "theory"),
    (D3PO, "    if cfg.scorer:  # does it see", '    if cfg.feedback == "contrastive":  # does it see', D3PO),
    (D3PO, "rewards.isfinite().logical_not()", "rewards.isnan()", D3PO),
    (COMMON, "Path(v).resolve() in Path(out)", "Path(v) in Path(out)", COMMON),
    (COMMON, "                saved = time.time()\n", "", COMMON),
    (COMMON, '"--always", "--dirty"', '"--always"', COMMON),
    ("cache", "wait = 0 if finished and finished.is_file() else fcntl.LOCK_NB", "wait = fcntl.LOCK_NB", COMMON),
    (COMMON, 'Path(base).glob("vae/*.*")', 'Path(base).glob("vae/*.json")', COMMON),
    (COMMON, 'Path(base).glob("unet/config.json")', 'Path(base).glob("vae/*.json")', COMMON),
    (COMMON, "checksum(path, content) + content", "hashlib.sha256(content).digest() + content", COMMON),
    (COMMON, "hashlib.sha256(path.parent.name.encode() + content)", "hashlib.sha256(content)", COMMON),
    (COMMON, "(int, float, str, tuple, Tensor))]", "(str, tuple, Tensor))]", COMMON),
    ("cache", "new.unlink(missing_ok=True)", "pass", COMMON),
    (SFT, "asdict(model.cfg), built]", "asdict(model.cfg)]", SFT),
    ("meshes", "items() if not found]:", "items() if not found][1:]:", "data"),
    ("evaluate", ".double() for z in (before, after)", ".double() for z in (after, before)", "evaluate"),
    (D3PO, '"feedback": digest(feedback)}', '"feedback": 0}', D3PO),
    (COMMON, '[what / name for name in ("config.json", "model.safetensors")]', '[what / name for name in ("model.safetensors",)]', COMMON),
    (COMMON, "not in (None, digest(tensors)):", 'not in (None, noted.get("digest")):', "damage"),
    ("cache", 'wrong + ["made_by.json"] * (noted != made_by)', "wrong", COMMON),
    ("cache", 'for path in folder.rglob(".[0-9]*.*"):', "for path in ():", "damage"),
    ("cache", "(os.path.lexists(link) and not ours)", "False", COMMON),
    ("cache", "ours = link.is_symlink() and", "ours = link.is_symlink() or", COMMON),
    (COMMON, "not abs(v) < limit", "abs(v) >= limit", COMMON),
    (COMMON, "if not (v.is_floating_point() and", "if not (True and", COMMON),
    (SFT, '"validation": digest(val_views),', "", "damage"),
    (D3PO, "settings(cfg) | made_by |", "made_by | settings(cfg) |", D3PO),
    (D3PO, '"trained_calls", "seed", "batch_size")', '"seed", "batch_size")', D3PO),
    (D3PO, "lr attention_only lora seed", "lr attention_only seed", D3PO),
    (D3PO, '"beta_dpo": 0.02, "kl": 0.2', '"beta_dpo": 0.02, "kl": 0.05', D3PO),
    (D3PO, '"loss beta_dpo kl pairs', '"loss beta_dpo pairs', D3PO),
    (D3PO, '{"pre": digest(pre), "rewards"', '{"rewards"', D3PO),
    (D3PO, '"objects": digest(objects)}', '"objects": digest(objects[0])}', D3PO),
    (D3PO, '"num_steps": cfg.num_steps, "seed": cfg.seed}', '"num_steps": cfg.num_steps}', D3PO),
    (D3PO, 'code("feedback", "matcher", "metrics", "scorer")', 'code("feedback", "matcher", "scorer")', D3PO),
    ("cache", '"on": device.type', '"on": "cpu"', D3PO),
    ("cache", '"torch": torch.__version__', '"torch": ""', COMMON),
    (COMMON, "what.co_code.hex(), what.co_names,", "what.co_code.hex(),", COMMON),
    ("data", '"size": size, "seed": seed', '"seed": seed', "data"),
    # what is said and shown
    (D3PO, '"kl": kl.mean().item()', '"kl": kl.sum().item()', D3PO),
    (D3PO, "loss_simple=loss_simple.item()", "loss_simple=(cfg.lambda_simple * loss_simple).item()", D3PO),
    (D3PO, "argsort(descending=True)", "argsort(descending=False)", D3PO),
    (D3PO, '"before": before, "after": after}', '"before": after, "after": before}', D3PO),
    ("evaluate", "measure(images, truth, truth[:, 0], scorers)", "measure(images, truth, images[:, 0], scorers)", "evaluate"),
    # draws, rates, references
    (D3PO, "(0.9, 0.99), weight_decay=0.0", "(0.9, 0.999), weight_decay=0.0", D3PO),
    (D3PO, "keyed_generator(cfg.seed, 10, round)", "keyed_generator(0, 10, 0)", D3PO),
    (D3PO, "batch, cfg.seed, n, bf16)", "batch, cfg.seed, step, bf16)", D3PO),
    (D3PO, "make_references(objects, n, cfg.seed)", "make_references(objects, n, 0)", D3PO),
    (D3PO, '("negatives", "data", "num_references"', '("negatives", "num_references"', D3PO),
    ("candidates", "(0.0, 0.1, 0.3, 0.5, 0.8)", "(0.0, 0.1, 0.2, 0.5, 0.8)", D3PO),
    ("feedback", "metrics.geometry(images, ref)", "metrics.geometry(images, images[:, 0])", D3PO),
    ("feedback", "matching_reward(ref, images", "matching_reward(images[0, 0], images", D3PO),
    # theory, bench
    ("theory", "return 2 * (y - a @ x0) * a - 2 *", "return 2 * (y - a @ x0) * a + 2 *", "theory"),
    ("theory", "return math.exp(-tau / 2), -math.expm1(-tau)", "return math.exp(-tau / 2), -math.expm1(-tau / 2)", "theory"),
    ("runs/table1", "if not changes:", "if changes:", "runs"),
    ("runs/table1", 'ROWS[row].options and row != "sft"', "ROWS[row].options", "runs"),
    ("runs/table1", "seed=cfg.seeds[0], lr=rate", "seed=seed, lr=rate", "runs"),
    ("runs/table1", 'tried[rate]["psnr_unseen"]["after"])', "-rate)", "runs"),
    ("bench", "for pair in pairs[:limit]:", "for pair in pairs[:1]:", "runs"),
    ("bench", "(a - b).norm() > 1e-4", "(a - b).norm() > 1e4", "runs"),
    ("bench", "policy.freeze(attention_only=True)", "pass", "runs"),
    # settings, logs, pictures
    (SFT, 'cfg.seed, cfg.num_steps, cfg.batch_size, "evaluate"', 'cfg.seed, 10, cfg.batch_size, "evaluate"', SFT),
    (SFT, "betas=(0.9, 0.99), weight_decay=0.0", "betas=(0.9, 0.99), weight_decay=0.01", SFT),
    (SFT, "view_embedding=not cfg.init)", "view_embedding=False)", SFT),
    (SFT, 'settings(cfg, "eval_every", "bf16"', 'settings(cfg, "eval_every", "augment", "bf16"', SFT),
    (SFT, '"metrics", "model", "muon", "pictures"', '"metrics", "model", "pictures"', SFT),
    (SFT, 'load_split(cfg.data[0], "validation"', 'load_split(cfg.data[-1], "validation"', SFT),
    (SFT, "loss_simple=loss.item(), grad_norm=norm", "loss_simple=loss.item(), grad_norm=rate", SFT),
    (SFT, "enabled=bf16):\n            loss = simple", "enabled=False):\n            loss = simple", SFT),
    (SFT, '"truth": truth[:8], "sampled": images[:8]', '"truth": images[:8], "sampled": truth[:8]', SFT),
    (SCORER, "AdamW(groups, weight_decay=cfg.weight_decay", "AdamW(groups, weight_decay=0.05", SCORER),
    (SCORER, "torch.manual_seed(key_seed(cfg.seed))", "torch.manual_seed(key_seed(0))", SCORER),
    (SCORER, "make_references(train, cfg.num_references, cfg.seed)", "make_references(train, cfg.num_references, 0)", SCORER),
    (SCORER, '{"num_steps": cfg.num_steps, "seed"', '{"seed"', SCORER),
    (SCORER, '"data", "negatives", "backbone") | {', '"data", "negatives", "backbone", "mismatch") | {', SCORER),
    (SCORER, "small_scorer(cfg.head, *sizes)", 'small_scorer("bilinear", *sizes)', SCORER),
    (SCORER, '"generated": fake, "stretched": twins', '"generated": fake, "stretched": fake', SCORER),
    (SCORER, "float(bad.sum(1).mean())", "float(bad.mean())", SCORER),
    ("scorer", 'mode="bicubic", antialias=True)', 'mode="bicubic")', "scorer"),
    (MODEL, "**new) / linear.in_features**0.5)", "**new))", MODEL),
    (SAMPLE, "zip(VIEWS, images, strict=True)", "zip(VIEWS, images.flip(0), strict=True)", SAMPLE),
    # what is compared with what, in the table, the gains, the prices and the pictures
    ("runs/table1", '"geometry", "random")', '"geometry", "noised_random")', "runs"),
    ("runs/table1", "if sign and low * high > 0 else cell", "if sign and low * high < 0 else cell", "runs"),
    ("runs/table1", '"contrastive_pre" if row == "c_pre" else "contrastive"', '"contrastive"', "runs"),
    ("runs/table1", '"negatives": base.model}', '"negatives": base.negatives}', "runs"),
    ("runs/table1", '"ref": digest(ref), "seed": seed, "num_steps"', '"ref": digest(ref), "seed": 0, "num_steps"', "runs"),
    ("runs/table1", 'json.loads(last)["kl"]', 'json.loads(last)["margin"]', "runs"),
    ("runs/table1", 'load_split("furniture", "heldout"', 'load_split("furniture", "validation"', "runs"),
    ("runs/table1", '"contrastive"}, "contrastive_pre", ', '"contrastive"}, "contrastive", ', "runs"),
    ("runs/table1", '{**FORWARD, "kl": 0.05}', '{**FORWARD, "kl": 0.5}', "runs"),
    ("runs/table1", "(sum(x) / len(x), change.mean().item())", "(sum(x), change.mean().item())", "runs"),
    ("runs/table1", '"G": five.num_candidates', '"G": 0', "runs"),
    ("evaluate", "scorer.score(ref[:1], truth[:1])", "pass", "evaluate"),
    (COMMON, 'option.name in ("out", "feedback", "rows")', 'option.name in ("out", "rows")', COMMON),
    (COMMON, "or get_origin(option.type) is Literal  # no path", "", COMMON),
    ("runs/table1", '"scorer": digest(Path(scorers["contrastive"]))', '"scorer": ""', "runs"),
    ("runs/table1", '(measured[row][c] - measured["pre"][c])', '(measured["pre"][c] - measured[row][c])', "runs"),
    ("runs/table1", "base, five, ref = job(cfg, seed=seed),", "base, five, ref = job(cfg, seed=0),", "runs"),
    ("runs/headroom", "v.gather(1, best)[:, 0] - v.mean(1)", "v.gather(1, best)[:, 0] - v[:, 0]", "runs"),
    ("runs/headroom", 'load_split(cfg.data, "validation"', 'load_split(cfg.data, "heldout"', "runs"),
    ("runs/headroom", "key_seed(cfg.seed, 8, int(i)) for i in part", "key_seed(0, 8, int(i)) for i in part", "runs"),
    ("bench", "scale = max(1, pairs / TIMED_PAIRS)", "scale = 1", "runs"),
    ("bench", "found[1][3] / took[1] / peak", "found[1][3] / took[0] / peak", "runs"),
    ("evaluate", 'judges["lpips"] = digest([*lpips.state_dict().values()])', 'judges["lpips"] = ""', "evaluate"),
    ("evaluate", '"batch_size": cfg.batch_size, "bf16": bf16}', '"batch_size": cfg.batch_size}', "evaluate"),
    ("evaluate", "Scorer.load(folder, device) for name, folder in zip(columns, cfg.scorer)}", "Scorer.load(folder, device) for name, folder in zip(columns, cfg.scorer[::-1])}", "evaluate"),
    ("grid", "paste(label, VIEWS, images, x)", "paste(label, VIEWS[::-1], images, x)", "evaluate"),
    ("matcher", "0.299 * red + 0.587 * green + 0.114 * blue", "0.299 * blue + 0.587 * green + 0.114 * red", "matcher"),
    ("meshes", '"MASK": cutoff', '"MASK": 0.5', "data"),
    ("meshes", 'else 1 - float(more.get("tr", [0])[0])', "else 1.0", "data"),
    ("meshes", "if found.is_relative_to(folder) and found.is_file()", "if found.is_file()", "data"),
    ("toys", "edges.norm(dim=-1), edges.sum(-1))", "edges.sum(-1), edges.sum(-1))", "data"),
    # a blind reader's survivors of 2026-11-30
    (D3PO, "parameters, 1 - step / cfg.steps, step)", "parameters, 1 - n / cfg.steps, step)", D3PO),
    (D3PO, "digest(Path(cfg.matcher)) if Path(cfg.matcher).is_file() else cfg.matcher", "cfg.matcher", D3PO),
    ("data", '"renderer": code("render", "toys")}\n    return', '"renderer": code("render")}\n    return', "data"),
    ("pictures", "p.name, digest(p))", "p.name, p.stat().st_size)", "data"),
    ("meshes", "np.iinfo(vertex.dtype).max if np", "255.0 if np", "data"),
    ("meshes", "values.dtype == np.uint16", "values.dtype == np.uint32", "data"),
    ("meshes", "range(int(count[-1]) // BLOCK + 1)", "range(max(1, int(count[-1]) // BLOCK))", "data"),
    ("meshes", ".remainder(height)", ".remainder(width)", "data"),
    ("meshes", "places = [(i, image.shape[1], image.shape[0])", "places = [(i, image.shape[0], image.shape[1])", "data"),
    ("meshes", "floor().long().remainder(width)", "floor().long().clamp(min=0).minimum(width - 1)", "data"),
    ("metrics", ".abs().mean(2) * either", ".mean(2).abs() * either", "metrics"),
    ("metrics", "max(1, truth.shape[-1] * 3 // 64)", "3", "metrics"),
    ("evaluate", '"truth": digest(truth), "judges"', '"truth": digest(ref), "judges"', "evaluate"),
    ("evaluate", "if min(len(set(columns))", "if max(len(set(columns))", "evaluate"),
    ("matcher", "KF.match_smnn(own", "KF.match_snn(own", "matcher"),
    (COMMON, "if not p.isfinite().all()]\n    if wrong", "if not p.isfinite().any()]\n    if wrong", "sdxl"),
    (SAMPLE, 'check_output("out", cfg.out, ".png", read)', 'check_output("out", cfg.out, "", read)', SAMPLE),
    (COMMON, "if not all(v.isfinite().all() for v in state", "if not all(v.isfinite().any() for v in state", "metrics matcher"),
    (SCORER, 'for path in sorted(folder.glob("*.safetensors"))])', 'for path in folder.glob("*.safetensors")])', SCORER),
    (SCORER, "key_seed(cfg.seed, 9, i + j)", "key_seed(cfg.seed, 9, j)", SCORER),
    (SCORER, '"backbone": digest(Path(cfg.backbone)) if local else cfg.backbone,', '"backbone": cfg.backbone,', SCORER),
    (SCORER, "margin[margin.abs() < 1e-6] = 0", "margin[margin.abs() == 0] = 0", SCORER),
    ("evaluate", "if truth.shape[-1] == 64 else", "if truth.shape[-1] >= 64 else", "evaluate"),
    ("evaluate", "cfg.data, cfg.lpips, *cfg.scorer)", "cfg.data, cfg.lpips)", "evaluate"),
    ("evaluate", "if size < 32:", "if size <= 32:", "evaluate"),
    ("meshes", "0.5 if material.alphaCutoff is None else material.alphaCutoff", "material.alphaCutoff or 0.5", "data"),
    ("meshes", "len(os.fsencode(name)) > 200", "len(name) > 200", "data"),
    ("meshes", 'path.suffix.lower() in (".glb", ".gltf")\n', 'path.suffix in (".glb", ".gltf")\n', "data"),
    ("data", "g = keyed_generator(seed, 5, i)", "g = keyed_generator(seed, 5, i % len(objects))", "data"),
    ("runs/table1", "replace(options, seed=cfg.seeds[0], lr=rate)", "replace(options, lr=rate)", "runs"),
    (SFT, "t = 1 + (u * (schedule.num_train - 1)).long()", "t = (u * schedule.num_train).long()", SFT),
    (D3PO, '"num_references", "eval_objects", "rounds")', '"num_references", "eval_objects")', D3PO),
    ("evaluate", "with_interval(measured[name] - earlier[name])", "with_interval((measured[name] - earlier[name]).mean(0))", "evaluate"),
    ("evaluate", "load_views(cfg.images, 0)[1].folders[0]", "load_views(cfg.images, 0)[1].folders[-1]", "evaluate"),
    ("pictures", 'if p.is_dir() and not p.name.startswith("."))', "if p.is_dir())", "data"),
    (SFT, "round(torch.cat(errors).mean().item(), 4)", "round(torch.cat(errors).mean().item(), 2)", SFT),
]
# fmt: on


def survives(fault: tuple[str, str, str, str]) -> bool:
    """Do the named tests pass although the fault is there?"""
    name, old, new, tests = fault
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".git", "out", "__pycache__", ".pytest_cache")
        )
        path = tree / f"{name}.py"
        path.write_text(path.read_text().replace(old, new))
        files = [f"tests/test_{test}.py" for test in tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{name}: {old!r}: the tests could not run\n{done.stdout[-2000:]}")
        return done.returncode == 0


def misplaced() -> list[str]:
    """Faults whose old text is not exactly once in its file, or that leave no Python behind."""
    wrong = []
    for name, old, new, _ in FAULTS:
        source = (ROOT / f"{name}.py").read_text()
        try:
            ast.parse(source.replace(old, new))
            if (count := source.count(old)) != 1:
                wrong.append(f"{name}: {count} times {old!r}")
        except SyntaxError:
            wrong.append(f"{name}: {new!r} is no Python")
    return wrong


def survivors(faults: list[tuple[str, str, str, str]]) -> list[str]:
    """Run all; print each as it ends."""
    found = []
    for i, fault in enumerate(faults):
        alive = survives(fault)
        print(
            f"{i + 1}/{len(faults)} {'SURVIVES' if alive else 'found':9}{fault[0]}: {fault[2]!r}", flush=True
        )
        found += [f"{fault[0]}: {fault[1]!r} -> {fault[2]!r}"] * alive
    return found


@pytest.mark.slow
def test_few_faults_survive() -> None:
    found = survivors(FAULTS)
    assert len(found) < 0.05 * len(FAULTS), found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=len(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if wrong := misplaced():
        raise SystemExit("\n".join(wrong))
    chosen = random.Random(args.seed).sample(FAULTS, args.sample)
    alive = survivors(chosen)
    print(f"{len(alive)} of {len(chosen)} survive", *alive, sep="\n")
