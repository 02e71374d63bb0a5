"""Muon: momentum with orthogonal updates, for the matrices of a network that starts from nothing.

Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, whose coefficients these are. From
nothing it took the toy network to the same error in half of AdamW's time; torch's own Muon leaves out
convolutions, half of this network. It has nothing to do with the paper: train_sft.py uses it from nothing, or
by --optimizer muon. Fine-tuning takes AdamW, as the paper does.
"""

import torch
from torch import nn


class Muon(torch.optim.Optimizer):
    """Of the momentum's singular value decomposition U S V^T the step is U V^T: every direction moves equally
    far, not only the few that have large gradients. Convolutions (out, in, k, k) are taken as matrices (out,
    in k k)."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                m = self.state[p]["momentum"]
                m.lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(m, group["momentum"]).flatten(1)  # Nesterov's; (out, in)
                tall = g.shape[0] > g.shape[1]
                x = (g.T if tall else g) / (g.norm() + 1e-7)
                # Newton-Schulz: x <- a x + b (x x^T) x + c (x x^T)^2 x brings all singular values near 1
                for _ in range(5):
                    xxt = x @ x.T
                    x = 3.4445 * x + (-4.7750 * xxt + 2.0315 * xxt @ xxt) @ x
                x = (x.T if tall else x).view_as(p)
                p.add_(x, alpha=-group["lr"] * max(1, g.shape[0] / g.shape[1]) ** 0.5)
