"""What the paper's theory says and what holds: Sections 3.1 and 4 and Appendix A, checked in float64.

Each statement is a function; the comment above a line is its formula, with the derivation. The check below
compares it with something that does not use it: autograd of the definition, quadrature over the latent, or
the exact moments of the reverse process. The order is the paper's. Our own additions (mixture latents, an m
that is no gradient, laws of the guided process, matched comparison) are printed as "ext.".

Run:
    python theory.py           # all checks and the matched comparison; exit status 1 on any FAIL
    python theory.py --plot    # also draws Figure 3

Expect:
    PASS on every line, in about 3 s on one CPU core. Xf marks a sentence that is false as written in the
    paper: its line passes if the sentence is off by MORE than the tolerance; what is true stands beside it.

Letters (they differ from the other files, none of which is imported):
    D, M        dimension of the 3-D data, number of views; A (D, M) = [a_1 ... a_M], A^T A = I, P = A A^T
    z, x0, x    latent (M,); clean data x0 = A z (D,); noised data (D,)
    B           noise level, int_0^t beta(s) ds: the schedule beta only relabels time
    E, J        posterior mean E[X0 | Xt = x] (D,) and its Jacobian J[i, j] = dE_i/dx_j (D, D)
    a, ap, y    a_i (ground truth), a_i^appro (from generated samples), y^Target
    r, c        alpha2/alpha1, the coefficients of J ap and of a in the contrastive guidance; cos(a, ap)
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import tyro
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Config:
    """Options of `python theory.py`."""

    seed: int = 0  # draws the random models and points of the checks; every seed has to pass
    plot: bool = False  # draw Figure 3 to figure3.png and figure3.svg in the folder `out`
    out: str = "results/theory"  # folder of the figure
    trajectories: int = 2000  # samples per cloud of the figure (300 are drawn, the titles average over all)


class Check(NamedTuple):
    """One printed line."""

    source: str  # where the paper says it; "ext." for our additions
    name: str
    error: float
    tol: float
    truth: str = ""  # not empty: `name` is a sentence of the paper that is false, and this holds instead

    @property
    def passed(self) -> bool:
        """Written so that a nan fails in both cases."""
        return self.error > self.tol if self.truth else self.error <= self.tol


# --- small helpers ---

F64 = torch.float64
LEVELS = (
    0.05,
    0.5,
    2.0,
    8.0,
)  # noise levels B of the checks; at ln 2, alpha^2 = h would hide an exchange of the two


def vec(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=F64)


def worst(errors: Iterable[float]) -> float:
    """The largest error, or nan if there is one (Python's max may lose it)."""
    return vec(*errors).max().item()


def gap(a: Tensor, b: Tensor | float) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def mv(matrix: Tensor, vector: Tensor) -> Tensor:
    """Batched matrix times vector: (..., D, E), (..., E) -> (..., D)."""
    return (matrix @ vector[..., None])[..., 0]


def derivative(f: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Autograd's gradient (D,) of a scalar f, or Jacobian [i, j] = df_i/dx_j, at x (D,); args stay fixed."""
    return cast(
        Tensor, torch.autograd.functional.jacobian(lambda x: f(x, *args), x)
    )  # torch.func loads for 3 s


def random_basis(D: int, M: int, gen: torch.Generator) -> Tensor:
    """Orthonormal columns (D, M)."""
    return torch.linalg.qr(torch.randn(D, M, generator=gen, dtype=F64))[0]


def random_unit(D: int, gen: torch.Generator) -> Tensor:
    """A unit vector (D,)."""
    return normalize(torch.randn(D, generator=gen, dtype=F64), dim=0)


def random_spd(M: int, gen: torch.Generator) -> Tensor:
    """A covariance (M, M) that is not diagonal, with eigenvalues between 0.3 and 2."""
    Q = random_basis(M, M, gen)
    return Q @ torch.diag(0.3 + 1.7 * torch.rand(M, generator=gen, dtype=F64)) @ Q.T


# --- Section 3.1: the forward process ---


def schedule(B: float) -> tuple[float, float]:
    """Signal and noise of X_t | X_0 = N(alpha X_0, h I) (Sec. 3.1)."""
    # dX = -beta/2 X dt + sqrt(beta) dB is linear: d alpha/dB = -alpha/2, dh/dB = 1 - h from (1, 0), hence
    # alpha = exp(-B/2), h = 1 - alpha^2
    return math.exp(-B / 2), -math.expm1(-B)


def check_forward(seed: int) -> list[Check]:
    """The two differential equations and their start, by central differences."""
    errors, d = [abs(schedule(0.0)[0] - 1), abs(schedule(0.0)[1])], 1e-5
    for B in LEVELS:
        (alpha, h), (alpha_up, h_up), (alpha_down, h_down) = schedule(B), schedule(B + d), schedule(B - d)
        errors += [abs((alpha_up - alpha_down) / (2 * d) + alpha / 2), abs((h_up - h_down) / (2 * d) - 1 + h)]
    return [Check("Sec. 3.1", "X_t | X_0 = N(alpha X_0, h I)", worst(errors), 1e-8)]


# --- Section 3.1: the guided reverse process ---
#
# With B as the time, running down, it is dX = [X/2 + score + G] dB + dW. For Gaussian data N(m, C) the
# posterior mean is E = m + J (x - alpha m), J = alpha C (alpha^2 C + h I)^{-1}, and Tweedie's formula E = (x
# + h score)/alpha gives the score back. The guidances of Section 4 are affine in E. So an Euler-Maruyama step
# is an affine map plus noise, and the mean and covariance of the samples propagate exactly, with no sampling
# error.

Guidance = Callable[[float, Tensor], tuple[Tensor, Tensor]]  # (B, J (..., D, D)) -> F, f of G = F E + f


def posterior_map(B: float, m: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """J (..., D, D) and e (..., D) of E[X0 | Xt = x] = J x + e for data N(m (..., D), C (..., D, D))."""
    alpha, h = schedule(B)
    J = alpha * torch.linalg.solve(alpha**2 * C + h * torch.eye(C.shape[-1], dtype=F64), C)
    return J, m - alpha * mv(J, m)


def reverse_step(B: float, dB: float, m: Tensor, C: Tensor, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """S (..., D, D), b (..., D) of one step X <- S X + b + sqrt(dB) noise of Eq. (1) with guidance."""
    alpha, h = schedule(B)
    J, e = posterior_map(B, m, C)
    F, f = guidance(B, J)
    eye = torch.eye(C.shape[-1], dtype=F64)
    # drift = x/2 + (alpha E - x)/h + (F E + f): beta multiplies the guidance as it does the score
    S = eye + dB * (eye / 2 + (alpha * J - eye) / h + F @ J)
    return S, dB * (alpha / h * e + mv(F, e) + f)


def noise_levels(steps: int) -> list[float]:
    """Log-spaced noise levels from pure noise to almost clean, steps + 1 of them."""
    return torch.logspace(math.log10(16), -5, steps + 1, dtype=F64).tolist()


def reverse_law(m: Tensor, C: Tensor, guidance: Guidance, steps: int) -> tuple[Tensor, Tensor]:
    """Mean (..., D) and covariance (..., D, D) of the sampler's output: N(0, I), steps, then E[X0 | Xt]."""
    mean, cov = torch.zeros_like(m), torch.eye(C.shape[-1], dtype=F64)
    levels = noise_levels(steps)
    for B, B_next in pairwise(levels):
        S, b = reverse_step(B, B - B_next, m, C, guidance)
        mean, cov = mv(S, mean) + b, S @ cov @ S.mT + (B - B_next) * torch.eye(C.shape[-1], dtype=F64)
    J, e = posterior_map(levels[-1], m, C)
    return mv(J, mean) + e, J @ cov @ J.mT


def sampler_law(m: Tensor, C: Tensor, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """The same without the first-order error of the step size: Richardson's 2 f(400) - f(200)."""
    (mean, cov), (mean2, cov2) = reverse_law(m, C, guidance, 200), reverse_law(m, C, guidance, 400)
    return 2 * mean2 - mean, 2 * cov2 - cov


def guide_nothing(B: float, J: Tensor) -> tuple[Tensor, Tensor]:
    """G = 0."""
    return torch.zeros_like(J), torch.zeros_like(J[..., 0])


def check_reverse(seed: int) -> list[Check]:
    """The reverse process returns the data; with the index that Eq. (1) prints it does not."""
    gen = torch.Generator().manual_seed(seed)
    m, C = torch.randn(3, generator=gen, dtype=F64), random_spd(3, gen)
    mean, cov = sampler_law(m, C, guide_nothing)
    right = worst([gap(mean, m), gap(cov, C)])
    # Eq. (1) asks for s_theta(., t_k), the noise level at the other end of the process; here beta = 1, B = T
    # - t_k
    mean, cov, dB = torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64), 16 / 200
    for k in range(200):
        S, b = reverse_step((k + 0.5) * dB, dB, m, C, guide_nothing)
        mean, cov = mv(S, mean) + b, S @ cov @ S.mT + dB * torch.eye(3, dtype=F64)
    wrong = worst([gap(mean, m), gap(cov, C)])
    return [
        Check("Sec. 3.1", "the reverse process returns the data's mean and covariance", right, 3e-3),
        Check("Eq. (1)", '"s_theta(X, t_k)": the same error', wrong, 0.05, "s_theta(X, T - t_k)"),
    ]


# --- Section 4, Assumption 1: X = A z, z ~ N(mu, Sigma) ---
#
# No formula before the words "When assuming a Gaussian latent" needs the Gaussian. So the latent here is a
# mixture of Gaussians (ext.); one component is the paper's case. The random inputs avoid what hides mistakes:
# mu = 0 (an unscaled mu), Sigma = I (Sigma^{-1} for Sigma, alpha^2 for h), D = M (the off-span term).
# References compute alpha and h anew.


@dataclass(frozen=True)
class Latent:
    """Law of z: sum_k weight_k N(mean_k, cov_k)."""

    weight: Tensor  # (K,)
    mean: Tensor  # (K, M)
    cov: Tensor  # (K, M, M)


def gaussian(mu: Tensor, Sigma: Tensor) -> Latent:
    """Assumption 1: mu (M,), Sigma (M, M)."""
    return Latent(vec(1), mu[None], Sigma[None])


def random_latent(M: int, components: int, gen: torch.Generator) -> Latent:
    """Nothing in it is zero, diagonal or equal."""
    weight = torch.softmax(torch.randn(components, generator=gen, dtype=F64), 0)
    mean = 1.5 * torch.randn(components, M, generator=gen, dtype=F64)
    return Latent(weight, mean, torch.stack([random_spd(M, gen) for _ in range(components)]))


def random_point(A: Tensor, latent: Latent, B: float, gen: torch.Generator) -> Tensor:
    """A point (D,) where q_t has mass: alpha A z + sqrt(h) eps, z near the first component."""
    z = latent.mean[0] + torch.randn(A.shape[1], generator=gen, dtype=F64)
    eps = torch.randn(A.shape[0], generator=gen, dtype=F64)
    return math.exp(-B / 2) * A @ z + math.sqrt(1 - math.exp(-B)) * eps


# --- Section 4, Eq. (3): the score of low-rank data ---


def latent_score(u: Tensor, latent: Latent, B: float) -> Tensor:
    """grad log q_t^LD(u), (M,) -> (M,), as defined below Eq. (3) with (m_t, sigma_t^2) = (alpha, h)."""
    alpha, h = schedule(B)
    # q_t^LD(u) = int N(u; alpha z, h I) q(z) dz = sum_k weight_k N(u; alpha mu_k, C_k), C_k = alpha^2 Sigma_k
    # + h I
    C = alpha**2 * latent.cov + h * torch.eye(len(u), dtype=F64)  # (K, M, M)
    offset = u - alpha * latent.mean  # (K, M)
    # score of one component: s_k = -C_k^{-1} (u - alpha mu_k); of the mixture: sum_k P(k | u) s_k
    s = -torch.linalg.solve(C, offset)  # (K, M)
    log_w = latent.weight.log() - 0.5 * torch.logdet(C) + 0.5 * (offset * s).sum(-1)
    return torch.softmax(log_w, 0) @ s


def score(x: Tensor, A: Tensor, latent: Latent, B: float) -> Tensor:
    """Eq. (3), (D,) -> (D,)."""
    _, h = schedule(B)
    # X_t = alpha A z + sqrt(h) eps is alpha z + noise in the span of A and pure noise off it:
    # grad log q_t(x) = A grad log q_t^LD(A^T x) - (I - A A^T) x / sigma_t^2
    return A @ latent_score(A.T @ x, latent, B) - (x - A @ (A.T @ x)) / h


def check_score(seed: int) -> list[Check]:
    """Eq. (3) against the score of N(alpha A mu, alpha^2 A Sigma A^T + h I) in R^D."""
    gen, errors = torch.Generator().manual_seed(seed), []
    for D, M in ((3, 2), (64, 4)):
        A, latent = random_basis(D, M, gen), random_latent(M, 1, gen)
        for B in LEVELS:
            x, alpha, h = random_point(A, latent, B, gen), math.exp(-B / 2), 1 - math.exp(-B)
            C = alpha**2 * A @ latent.cov[0] @ A.T + h * torch.eye(D, dtype=F64)
            expected = -torch.linalg.solve(C, x - alpha * A @ latent.mean[0])
            errors.append(gap(score(x, A, latent, B), expected))
    return [Check("Eq. (3)", "score = A grad log q^LD(A^T x) - (I - A A^T) x/h", worst(errors), 1e-11)]


# --- Section 4: the posterior mean; Appendix A, Eq. (4): its derivative ---

Mfn = Callable[[Tensor], Tensor]  # the paper's m, (M,) -> (M,); Eq. (4) and after hold for any


def latent_m(u: Tensor, latent: Latent, B: float) -> Tensor:
    """The m of an exact score, (M,) -> (M,)."""
    _, h = schedule(B)
    # m(u) = grad log q_t^LD(u) + u/h
    return latent_score(u, latent, B) + u / h


def exact_m(latent: Latent, B: float) -> Mfn:
    """The same as a function of u alone."""
    return lambda u: latent_m(u, latent, B)


def surrogate_m(M: int, gen: torch.Generator) -> Mfn:
    """An m that is no gradient, as a network's is not (ext.): W tanh(V u) + b, Jacobian not symmetric."""
    (W, V), b = torch.randn(2, M, M, generator=gen, dtype=F64), torch.randn(M, generator=gen, dtype=F64)
    return lambda u: W @ torch.tanh(V @ u) + b


def tweedie_mean(x: Tensor, A: Tensor, latent: Latent, B: float) -> Tensor:
    """E[X0 | Xt = x] (D,), the paper's first form: Tweedie's formula."""
    alpha, h = schedule(B)
    # grad log q_t(x) = E[grad_x log q_t(x | X0) | x] = (alpha E - x)/h; the middle is what L_simple regresses
    # on, so its minimiser is the score. Solved for E: E = (x + h grad log q_t(x))/alpha
    return (x + h * score(x, A, latent, B)) / alpha


def posterior_mean(x: Tensor, A: Tensor, m: Mfn, B: float) -> Tensor:
    """E[X0 | Xt = x] (D,), the paper's second form."""
    alpha, h = schedule(B)
    # Eq. (3) into Tweedie, with u = A^T x: x + h [A score^LD - (x - A u)/h] = A (h score^LD + u), so
    # E = (h/alpha) A m(A^T x)
    return h / alpha * A @ m(A.T @ x)


def mean_jacobian(x: Tensor, A: Tensor, m: Mfn, B: float) -> Tensor:
    """J[i, j] = dE_i/dx_j (D, D): Eq. (4) less its transpose."""
    alpha, h = schedule(B)
    # Chain rule, grad_m[i, j] = dm_i/du_j: J = (h/alpha) A grad_m A^T. Eq. (4) prints grad_m^T, which gives
    # J^T, the gradient layout dE_j/dx_i. For every exact score grad_m is a Hessian plus I/h, symmetric, and
    # the slip is invisible.
    return h / alpha * A @ derivative(m, A.T @ x) @ A.T


def posterior_cov(x: Tensor, A: Tensor, m: Mfn, B: float) -> Tensor:
    """Cov(X0 | Xt = x) (D, D)."""
    alpha, h = schedule(B)
    # Differentiating E = int x0 q(x0 | x) dx0 brings down (alpha x0 - x)/h, so J = (alpha/h) Cov(X0 | x)
    return h / alpha * mean_jacobian(x, A, m, B)


def check_posterior(seed: int) -> list[Check]:
    """E and J against the closed forms of a Gaussian latent."""
    gen = torch.Generator().manual_seed(seed)
    first, second, jacobian = [], [], []
    for D, M in ((3, 2), (64, 4)):
        A, latent = random_basis(D, M, gen), random_latent(M, 1, gen)
        precision = torch.linalg.inv(latent.cov[0])
        for B in LEVELS:
            x, m = random_point(A, latent, B, gen), exact_m(latent, B)
            alpha, h = math.exp(-B / 2), 1 - math.exp(-B)
            # Cov(z | u) = (Sigma^{-1} + alpha^2/h I)^{-1}, E[z | u] = Cov(z | u) (Sigma^{-1} mu + alpha/h u)
            cov = torch.linalg.inv(precision + alpha**2 / h * torch.eye(M, dtype=F64))
            E = A @ cov @ (precision @ latent.mean[0] + alpha / h * A.T @ x)
            first.append(gap(tweedie_mean(x, A, latent, B), E))
            second.append(gap(posterior_mean(x, A, m, B), E))
            jacobian.append(gap(mean_jacobian(x, A, m, B), alpha / h * A @ cov @ A.T))
    return [
        Check("Sec. 4", "E = (x + h score)/alpha", worst(first), 1e-11),
        Check("Sec. 4", "E = (h/alpha) A m(A^T x)", worst(second), 1e-11),
        Check("Eq. (4)", "J = (h/alpha) A grad_m A^T = (alpha/h) Cov(X0 | x)", worst(jacobian), 1e-11),
    ]


# Quadrature uses no formula: only q(z) on a grid of z (n, 2) and N(x; alpha A z, h I) go in.


def grid_latent(latent: Latent, points: int = 200) -> tuple[Tensor, Tensor]:
    """z (n, 2), n = points^2, over the component means +-9 standard deviations; log q(z) + constant (n,)."""
    sd = torch.diagonal(latent.cov, dim1=-2, dim2=-1).sqrt()  # (K, 2)
    low, high = (latent.mean - 9 * sd).amin(0), (latent.mean + 9 * sd).amax(0)
    unit = torch.linspace(0, 1, points, dtype=F64)
    z = low + (high - low) * torch.cartesian_prod(unit, unit)
    d = z[:, None] - latent.mean  # (n, K, 2)
    quadratic = torch.einsum("nki,kij,nkj->nk", d, torch.linalg.inv(latent.cov), d)
    return z, torch.logsumexp(latent.weight.log() - 0.5 * (quadratic + torch.logdet(latent.cov)), -1)


def grid_joint(x: Tensor, x0: Tensor, log_prior: Tensor, B: float) -> Tensor:
    """log q(z) + log q_t(x | x0) + constant, (n,), at x0 = A z (n, D)."""
    return log_prior - ((x - math.exp(-B / 2) * x0) ** 2).sum(-1) / (2 * (1 - math.exp(-B)))


def grid_log_q(x: Tensor, x0: Tensor, log_prior: Tensor, B: float) -> Tensor:
    """log q_t(x) + constant, a scalar."""
    return torch.logsumexp(grid_joint(x, x0, log_prior, B), 0)


def grid_mean(x: Tensor, x0: Tensor, log_prior: Tensor, B: float) -> Tensor:
    """E[X0 | Xt = x] (D,)."""
    return torch.softmax(grid_joint(x, x0, log_prior, B), 0) @ x0


def check_quadrature(seed: int) -> list[Check]:
    """Score, E, J and covariance of a Gaussian and of a mixture latent in R^3."""
    gen = torch.Generator().manual_seed(seed)
    A = random_basis(3, 2, gen)
    errors: dict[str, list[float]] = {"score": [], "E": [], "J": []}
    for components in (1, 3):
        latent = random_latent(2, components, gen)
        z, log_prior = grid_latent(latent)
        x0 = z @ A.T
        for B in LEVELS[:3]:
            x, m, grid = random_point(A, latent, B, gen), exact_m(latent, B), (x0, log_prior, B)
            E = grid_mean(x, *grid)
            cov = (x0 - E).T @ (torch.softmax(grid_joint(x, *grid), 0)[:, None] * (x0 - E))
            errors["score"].append(gap(score(x, A, latent, B), derivative(grid_log_q, x, *grid)))
            errors["E"] += [gap(tweedie_mean(x, A, latent, B), E), gap(posterior_mean(x, A, m, B), E)]
            errors["J"].append(gap(mean_jacobian(x, A, m, B), derivative(grid_mean, x, *grid)))
            errors["J"].append(gap(posterior_cov(x, A, m, B), cov))
    return [
        Check("Eq. (3)", "score by quadrature, Gaussian and mixture", worst(errors["score"]), 1e-9),
        Check("Sec. 4", "E by quadrature, both forms", worst(errors["E"]), 1e-9),
        Check("Eq. (4)", "J and Cov(X0 | x) by quadrature", worst(errors["J"]), 1e-8),
    ]


# --- Section 4, before Corollary 1: what a_i and y^Target are said to be ---


def two_views(s1: float, s2: float, rho: float) -> tuple[Tensor, Latent]:
    """A = [e_1, e_2] in R^3 and a Gaussian latent with variances s1, s2 and covariance rho."""
    Sigma = torch.tensor([[s1, rho], [rho, s2]], dtype=F64)
    return torch.eye(3, dtype=F64)[:, :2], gaussian(vec(1, 0.5), Sigma)


def check_assumptions(seed: int) -> list[Check]:
    """Principal components, and the bound on the similarity."""
    A = random_basis(12, 4, torch.Generator().manual_seed(seed))
    # order and sign of eigenvectors are arbitrary: each a_i is matched to the closest
    found = torch.linalg.eigh(A @ torch.diag(vec(1.5, 1, 0.6, 0.3)) @ A.T)[1]
    diagonal = gap((A.T @ found).abs().amax(1), 1.0)
    A3, latent = two_views(1, 1, 0.5)
    mixed = 1 - (A3.T @ torch.linalg.eigh(A3 @ latent.cov[0] @ A3.T)[1]).abs().amax(1).min().item()
    # a^T X0 is Gaussian: whatever y is, P(a^T X0 > y) > 0, and then alpha1 = 2 (y - a^T X0) < 0
    beyond = 0.5 * math.erfc(3 / math.sqrt(2))
    no_bound = "a Gaussian has none; alpha1 < 0 with that probability"
    return [
        Check("Sec. 4", "PCA finds a_i up to order and sign, Sigma diagonal, distinct", diagonal, 1e-9),
        Check("Sec. 4", '"each view is an eigenvector a_i": 1 - |cos|', mixed, 0.1, "iff Sigma is diagonal"),
        Check("Sec. 4", '"y is the upper bound": P(beyond), y at 3 sd', beyond, 0.0, no_bound),
    ]


# --- Section 4, Corollary 1: the simple guidance ---


def simple_by_definition(x: Tensor, a: Tensor, y: float, mean: Callable[..., Tensor], *args: Any) -> Tensor:
    """G_simple = -grad_x (y - a^T E)^2 (D,), as Section 4 defines it, by autograd; E = mean(x, *args)."""
    return -derivative(lambda x: (y - a @ mean(x, *args)) ** 2, x)


def simple_guidance(x: Tensor, a: Tensor, y: float, A: Tensor, m: Mfn, B: float) -> Tensor:
    """Corollary 1, (D,); a is a_i or a_i^appro, in or out of the span of A."""
    alpha, h = schedule(B)
    # -grad (y - a^T E)^2 = 2 (y - a^T E) J^T a with J = (h/alpha) A grad_m A^T; here the transpose belongs:
    # G = 2 (h/alpha) (y - a^T E) A grad_m^T A^T a
    return 2 * h / alpha * (y - a @ posterior_mean(x, A, m, B)) * A @ derivative(m, A.T @ x).T @ A.T @ a


def check_corollary1(seed: int) -> list[Check]:
    """Corollary 1 and Eq. (4) against autograd, for exact scores and for an m that is no gradient."""
    gen = torch.Generator().manual_seed(seed)
    exact, surrogate, printed, combined = [], [], [], []
    for D, M in ((3, 2), (24, 4)):
        A = random_basis(D, M, gen)
        for B in LEVELS[:3]:
            for a, y in ((A[:, 0], 4.0), (A[:, 0], -4.0), (random_unit(D, gen), 4.0)):
                for latent in (random_latent(M, 1, gen), random_latent(M, 3, gen)):
                    x = random_point(A, latent, B, gen)
                    G = simple_by_definition(x, a, y, tweedie_mean, A, latent, B)
                    exact.append(gap(simple_guidance(x, a, y, A, exact_m(latent, B), B), G))
            m, x = surrogate_m(M, gen), torch.randn(D, generator=gen, dtype=F64)
            G = simple_by_definition(x, a, y, posterior_mean, A, m, B)
            J = derivative(posterior_mean, x, A, m, B)
            surrogate += [gap(simple_guidance(x, a, y, A, m, B), G), gap(mean_jacobian(x, A, m, B), J)]
            # Eq. (4) as printed is J^T; put into the proof's first display, (dE/dx)^T a, it gives J a
            printed.append(gap(J.T, J) / J.abs().max().item())
            combined.append(gap(2 * (y - a @ posterior_mean(x, A, m, B)) * J @ a, G) / G.abs().max().item())
    gives = '"G = 2 (y - a^T E) (dE/dx)^T a and Eq. (4)" give Corollary 1'
    return [
        Check("Cor. 1", "G = 2 (h/alpha) (y - a^T E) A grad_m^T A^T a", worst(exact), 1e-10),
        Check("ext.", "Corollary 1 and J if m is no gradient", worst(surrogate), 1e-11),
        Check("Eq. (4)", '"dE/dx = (h/alpha) A grad_m^T A^T"', worst(printed), 1e-2, "J has no transpose"),
        Check("App. A", gives, worst(combined), 1e-2, "they give J a; with the transpose of (4) gone, J^T a"),
    ]


# What the paper concludes from Corollary 1, for a Gaussian latent. On the span of A the eigenvalues of J are
# lam = alpha s/(alpha^2 s + h), s those of Sigma; off it they are D - M exact zeros. So the coefficient of a,
# 2 (y - a^T E) J, is only semi-definite, with a sign of its own, and G never leaves the span.


def check_coefficient(seed: int) -> list[Check]:
    """Is the coefficient of a positive definite?"""
    gen, D, M = torch.Generator().manual_seed(seed), 12, 4
    A, latent, mixture = random_basis(D, M, gen), random_latent(M, 1, gen), random_latent(M, 3, gen)
    eigenvalues, zeros, semi = [], [], []
    for B in LEVELS:
        alpha, h, s = math.exp(-B / 2), 1 - math.exp(-B), torch.linalg.eigvalsh(latent.cov[0])
        lam = torch.linalg.eigvalsh(mean_jacobian(random_point(A, latent, B, gen), A, exact_m(latent, B), B))
        eigenvalues += [gap(lam[-M:], alpha * s / (alpha**2 * s + h)), gap(lam[:-M], 0.0)]
        zeros.append(int((lam.abs() < 1e-9).sum()))
        J = mean_jacobian(random_point(A, mixture, B, gen), A, exact_m(mixture, B), B)
        semi += [gap(J, J.T), -torch.linalg.eigvalsh(J)[0].item()]
    # z = (+-2, 0) with variance .05, at the midpoint:
    # J = (h/alpha) (1/h - 1/C + 4 alpha^2/C^2) along z_1, C = .05 alpha^2 + h
    eye, alpha2, h = torch.eye(2, dtype=F64), math.exp(-1), 1 - math.exp(-1)
    bimodal = Latent(vec(0.5, 0.5), torch.stack([vec(2, 0), vec(-2, 0)]), 0.05 * torch.stack([eye, eye]))
    found = math.sqrt(alpha2) * mean_jacobian(vec(0, 0), eye, exact_m(bimodal, 1.0), 1.0)[0, 0].item()
    C = alpha2 * 0.05 + h
    expected = h * (1 / h - 1 / C + 4 * alpha2 / C**2)
    definite = "semi-definite; definite on span(A) only, times sign(y - a^T E)"
    return [
        Check("Cor. 1", "eigenvalues of J: alpha s/(alpha^2 s + h), D - M zeros", worst(eigenvalues), 1e-10),
        Check("Cor. 1", '"the coefficient is positive definite": zeros', min(zeros), 0.5, definite),
        Check("ext.", "a mixture's J is symmetric and semi-definite", worst(semi), 1e-9),
        Check("ext.", f"but alpha lam < 1 is lost: {expected:.2f} if bimodal", abs(found - expected), 1e-10),
    ]


# In the span G points along J a. With k the ratio of the largest to the smallest eigenvalue of J there,
# Wielandt's inequality gives cos(J a, a) >= 2 sqrt(k)/(1 + k), attained along
# v_max/sqrt(lam_max) + v_min/sqrt(lam_min). With the noise,
#     k = s_max (alpha^2 s_min + h) / [s_min (alpha^2 s_max + h)]
# grows from 1 to cond(Sigma). Out of the span J a = J P a, so cos(G, a) = cos(G, P a) |P a|.


def check_direction(seed: int) -> list[Check]:
    """Is the direction of G_simple approximately a, and does it keep the other components?"""
    gen, far = torch.Generator().manual_seed(seed), 100.0  # a y above every a^T E below
    A, latent = random_basis(12, 4, gen), random_latent(4, 1, gen)
    s, v = torch.linalg.eigh(latent.cov[0])  # ascending
    below, attained, off_span, flip = [0.0], [], [], []
    for B in LEVELS:
        m, x = exact_m(latent, B), random_point(A, latent, B, gen)
        lam = s / (math.exp(-B) * s + 1 - math.exp(-B))
        k = (lam[-1] / lam[0]).item()
        bound, sharp = 2 * math.sqrt(k) / (1 + k), A @ (v[:, -1] / lam[-1].sqrt() + v[:, 0] / lam[0].sqrt())
        attained.append(abs(cosine(simple_guidance(x, sharp, far, A, m, B), sharp).item() - bound))
        for a, generic in [(A @ random_unit(4, gen), random_unit(12, gen)) for _ in range(3)]:
            G = simple_guidance(x, a, far, A, m, B)
            below.append(bound - cosine(G, a).item())
            y = 2 * (a @ posterior_mean(x, A, m, B)).item() - far  # as far below a^T E as `far` is above
            flip.append(gap(simple_guidance(x, a, y, A, m, B), -G) / G.norm().item())
            G, inside = simple_guidance(x, generic, far, A, m, B), A @ (A.T @ generic)
            off_span.append(gap(A @ (A.T @ G), G) / G.norm().item())
            off_span.append(gap(cosine(G, generic), cosine(G, inside) * inside.norm()))
    x, (A3, latent) = vec(0.3, -0.2, 0.1), two_views(10, 1, 0)
    k = 10 / (math.exp(-2) * 10 + 1 - math.exp(-2))
    G = simple_guidance(x, vec(1, math.sqrt(k), 0), far, A3, exact_m(latent, 2.0), 2.0)
    angle = math.degrees(math.acos(cosine(G, vec(1, math.sqrt(k), 0)).item()))
    G = simple_guidance(x, A3[:, 0], far, A3, exact_m(latent, 2.0), 2.0)
    along = cosine(G, A3[:, 0]).item()
    leaks = []  # G_2/G_1 of G_simple(a_1) for correlated views
    for rho, B in ((0.8, 0.5), (-0.8, 2.0)):
        A3, latent = two_views(1, 1, rho)
        G = simple_guidance(x, A3[:, 0], far, A3, exact_m(latent, B), B)
        leaks.append((G[1] / G[0]).item())
    approx = "only if cond(J) ~ 1 and a in span(A); here Sigma = diag(10, 1), B = 2"
    exact = "it points along a_i if Sigma is diagonal; fails for a misaligned model or a biased mean"
    others = f'"G_simple(a_1) maintains the others": G_2/G_1 {leaks[0]:+.2f}, {leaks[1]:+.2f}'
    return [
        Check("Cor. 1", "cos(G, a) >= 2 sqrt(k)/(1 + k) in the span", worst(below), 1e-9),
        Check("Cor. 1", "the bound is attained", worst(attained), 1e-9),
        Check("Cor. 1", '"direction is approximately a": degrees off', angle, 10, approx),
        Check("Cor. 1", "G stays in span(A): cos(G, a) = cos(G, P a) |P a|", worst(off_span), 1e-9),
        Check("Cor. 1", "y < a^T E turns G around", worst(flip), 1e-9),
        Check("Cor. 1", '"G_simple(a_i) does not lead to a_i": cos(G, a_i)', along, 0.9, exact),
        Check("Example 1", others, min(map(abs, leaks)), 0.1, "iff Sigma_21 = 0"),
    ]


# --- Section 4, Theorem 1: the contrastive guidance ---
#
# The display that defines G_3D-Consistency is unreadable in the text we have. The proof "expands the
# derivative" in X0 and in Xt into a term that is the derivative of a square and one that is not. Three
# definitions come near:
#
#   D1   -grad_X0 (y - a^T X0)^2 - 2 grad_Xt (ap^T E)        gives the theorem as printed: implemented
#   D2   -grad_X0 (y - a^T X0)^2 + grad_Xt (y - ap^T E)^2    second term gets the factor y - ap^T E
#   D3   -grad_X0 (y - a^T X0)^2 - grad_Xt (0 - ap^T E)^2    second term gets the factor ap^T E
#
# D2 is the positive term less G_simple(ap), so the proof probably dropped the factor; D3 mirrors Section 5's
# targets 1 and 0. X0 and Xt are independent arguments; one gradient through Xt = alpha X0 + sqrt(h) eps gives
# the second term an alpha. While sampling no X0 belongs to Xt: the laws further down take the ground-truth
# mean.

# what is differentiated in Xt, as a function of p = ap^T E and y
NEGATIVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "D1": lambda p, y: -2 * p,
    "D2": lambda p, y: (y - p) ** 2,
    "D3": lambda p, y: -((0 - p) ** 2),
}


def contrastive_guidance(
    x0: Tensor, x: Tensor, a: Tensor, ap: Tensor, y: float, A: Tensor, m: Mfn, B: float
) -> Tensor:
    """Theorem 1's right-hand side, (D,)."""
    alpha, h = schedule(B)
    # 2 (y - a^T X0) a - 2 (h/alpha) A grad_m^T A^T ap; the second term is -2 J^T ap
    return 2 * (y - a @ x0) * a - 2 * h / alpha * A @ derivative(m, A.T @ x).T @ A.T @ ap


def check_theorem1(seed: int) -> list[Check]:
    """Theorem 1 against autograd of the three definitions."""
    gen, y = torch.Generator().manual_seed(seed), 4.0
    plain: dict[str, list[float]] = {"D1": [], "D2": [], "D3": []}
    repaired: dict[str, list[float]] = {"D1": [], "D2": [], "D3": []}
    tied, surrogate = [], []

    def negative(x: Tensor, reading: str, ap: Tensor, mean: Callable[..., Tensor], *args: Any) -> Tensor:
        return NEGATIVES[reading](ap @ mean(x, *args), y)

    def negative_of_x0(x0: Tensor, noise: Tensor, ap: Tensor, A: Tensor, latent: Latent, B: float) -> Tensor:
        return -2 * ap @ tweedie_mean(math.exp(-B / 2) * x0 + noise, A, latent, B)

    for D, M in ((3, 2), (24, 4)):
        A = random_basis(D, M, gen)
        for B in LEVELS[:3]:
            a, ap, x0 = A[:, 0], random_unit(D, gen), torch.randn(D, generator=gen, dtype=F64)
            positive = -derivative(lambda x0, a=a: (y - a @ x0) ** 2, x0)
            for latent in (random_latent(M, 1, gen), random_latent(M, 3, gen)):
                x = random_point(A, latent, B, gen)
                G = contrastive_guidance(x0, x, a, ap, y, A, exact_m(latent, B), B)
                E = tweedie_mean(x, A, latent, B)
                for reading, factor in (("D1", 1.0), ("D2", y - ap @ E), ("D3", ap @ E)):
                    defined = positive + derivative(negative, x, reading, ap, tweedie_mean, A, latent, B)
                    plain[reading].append(gap(G, defined))
                    repaired[reading].append(gap(positive + factor * (G - positive), defined))
                through_x0 = derivative(negative_of_x0, x0, x - math.exp(-B / 2) * x0, ap, A, latent, B)
                tied.append(gap(math.exp(-B / 2) * (G - positive), through_x0))
            m, x = surrogate_m(M, gen), torch.randn(D, generator=gen, dtype=F64)
            defined = positive + derivative(negative, x, "D1", ap, posterior_mean, A, m, B)
            surrogate.append(gap(contrastive_guidance(x0, x, a, ap, y, A, m, B), defined))
    return [
        Check("Thm. 1", "2 (y - a^T X0) a - 2 (h/alpha) A grad_m^T A^T ap, D1", worst(plain["D1"]), 1e-10),
        Check("ext.", "Theorem 1 under D1 if m is no gradient", worst(surrogate), 1e-11),
        Check("Thm. 1", '"Theorem 1" under D2', worst(plain["D2"]), 0.01, "second term times (y - ap^T E)"),
        Check("Thm. 1", "Theorem 1 with that factor under D2", worst(repaired["D2"]), 1e-10),
        Check("Thm. 1", '"Theorem 1" under D3', worst(plain["D3"]), 0.01, "second term times ap^T E"),
        Check("Thm. 1", "Theorem 1 with that factor under D3", worst(repaired["D3"]), 1e-10),
        Check("Thm. 1", "one gradient through X0 and Xt: second term times alpha", worst(tied), 1e-10),
    ]


# --- Section 4, Example 1 ---
#
# M = 2, D = 3, a_1 = e_1, a_2 = e_2, ap = (4, sqrt 5, 2)/5. So |ap| = 1, c = 4/5, and |A^T ap| = sqrt(21)/5
# puts ap 24 degrees out of the span. Whose A is it? With Assumption 1's A = [a_1, a_2], J kills
# every third component. With the model's own A' = [ap, (-2, 2 sqrt 5, -1)/5], ap is an eigenvector and a_1 is
# not. The paper's sentence on ap needs A', its sentence on a_1 needs A.

A1, AP = vec(1, 0, 0), vec(4, math.sqrt(5), 2) / 5
A_TRUE = torch.stack([A1, vec(0, 1, 0)], 1)
A_MODEL = torch.stack([AP, vec(-2, 2 * math.sqrt(5), -1) / 5], 1)


def check_example1(seed: int) -> list[Check]:
    """Both readings; at a^T X0 = y Theorem 1 is its negative term alone."""
    gen, y, x0 = torch.Generator().manual_seed(seed), 4.0, vec(4, 0, 0)
    third, along_ap = [], []
    for B in LEVELS:
        latent, x = random_latent(2, 1, gen), torch.randn(3, generator=gen, dtype=F64)
        third.append(abs(contrastive_guidance(x0, x, A1, AP, y, A_TRUE, exact_m(latent, B), B)[2].item()))
        s = 0.3 + torch.rand(2, generator=gen, dtype=F64)
        m = exact_m(gaussian(latent.mean[0], torch.diag(s)), B)
        lam = math.exp(-B / 2) * s[0] / (math.exp(-B) * s[0] + 1 - math.exp(-B))  # alpha2 = 2 lam
        along_ap.append(gap(contrastive_guidance(x0, x, A1, AP, y, A_MODEL, m, B), -2 * lam * AP))
    # Sigma = I: J = alpha P, and alpha2 := 2 ap^T J ap
    B, x = 0.5, vec(0.3, -0.2, 0.1)
    m = exact_m(gaussian(vec(1, 0.5), torch.eye(2, dtype=F64)), B)
    alpha2 = 2 * math.exp(-B / 2) * 21 / 25
    negative = contrastive_guidance(x0, x, A1, AP, y, A_TRUE, m, B) / alpha2
    share_ap = cosine(simple_guidance(x, AP, y, A_TRUE, m, B), vec(0, 0, 1)).item()
    share_a1 = cosine(simple_guidance(x, A1, y, A_MODEL, m, B), vec(0, 0, 1)).item()
    exact, printed = vec(-20, -5 * math.sqrt(5), 0) / 21, abs(negative[2].item() + 2 / 5)
    needs_model = "0 with A; true with A'"
    needs_true = "with A' it is (2, 0, 1)/sqrt 5 at Sigma = I; true with A"
    return [
        Check("Example 1", "A: third component of the negative term is 0", worst(third), 1e-12),
        Check("Example 1", '"third component -alpha2 2/5": with A, off by', printed, 0.1, needs_model),
        Check("Example 1", "A: -alpha2 (20, 5 sqrt 5, 0)/21 at Sigma = I", gap(negative, exact), 1e-12),
        Check("Example 1", "A': -alpha2 (4, sqrt 5, 2)/5, Sigma diagonal", worst(along_ap), 1e-12),
        Check("Example 1", '"G_simple(ap) increases the third": off by', 0.4 - share_ap, 0.1, needs_model),
        Check("Example 1", '"G_simple(a_1) maintains the others": third', share_a1, 0.1, needs_true),
    ]


# --- Section 4, after Theorem 1: is the contrastive direction correct? ---
#
# Absorb lam into r: the direction is g = a_1 - r ap. Bare, it only turns away from a_1:
#     cos(g, a_1) = (1 - r c)/sqrt(1 - 2 r c + r^2).
# As a correction at a sample x = ap, take a step s along g/|g|. There cos(x, a_1) has the gradient a_1 - c ap,
# and <a_1 - c ap, a_1 - r ap> = 1 - c^2 for every r, so at s = 0
#     d/ds cos(x + s g/|g|, a_1) = (1 - c^2)/sqrt(1 - 2 r c + r^2),
# largest at r = c, where g is orthogonal to ap; above the rate of a_1 alone (r = 0) iff 0 < r < 2 c; and 0
# along ap itself. A long step overshoots. This is the sense in which Figure 3 (c) beats (a) and (b).


def direction(r: float) -> Tensor:
    """g/|g| of Example 1, (3,)."""
    return normalize(A1 - r * AP, dim=0)


def step_cosine(s: Tensor, g: Tensor) -> Tensor:
    """cos(ap + s g, a_1) for steps s (n,) along g (3,), (n,)."""
    return cosine(AP + s[:, None] * g, A1)


def check_correction(seed: int) -> list[Check]:
    """The direction of Example 1, bare and as a correction."""
    c, bare, rate = 4 / 5, [], []

    def speed(r: float) -> float:
        return derivative(lambda s: step_cosine(s, direction(r)).sum(), vec(0)).item()

    for r in (0.0, 0.25, 0.5, c, 1.0, 1.25, 1.6):
        norm = math.sqrt(1 - 2 * r * c + r * r)
        bare.append(abs(cosine(direction(r), A1).item() - (1 - r * c) / norm))
        rate.append(abs(speed(r) - (1 - c * c) / norm))
    best = max(speed(c - 0.01), speed(c + 0.01)) - speed(c)
    along_ap = derivative(lambda s: step_cosine(s, AP).sum(), vec(0)).item()
    edge = worst([abs(speed(2 * c) - speed(0)), abs(along_ap)])
    turned, far = 1 - cosine(direction(0.8), A1).item(), 1 - step_cosine(vec(5), direction(0.8)).item()
    bare_truth, far_truth = "bare, worse than a_1 for all r > 0", "best at a step of .75; then it overshoots"
    return [
        Check("Thm. 1", "cos(a_1 - r ap, a_1) = (1 - rc)/sqrt(1 - 2rc + r^2)", worst(bare), 1e-12),
        Check("Thm. 1", '"a correct direction": 1 - cos(a_1 - .8 ap, a_1)', turned, 0.1, bare_truth),
        Check("ext.", "as a correction: (1 - c^2)/sqrt(1 - 2rc + r^2)", worst(rate), 1e-12),
        Check("ext.", "... best at r = c", best, 0.0),
        Check("ext.", "... better than a_1 iff 0 < r < 2c; 0 along ap", edge, 1e-12),
        Check("Fig. 3", '"a correct direction": 1 - cos after a step of 5', far, 0.1, far_truth),
    ]


# --- The laws of the guided reverse process (ext.) ---
#
# Unguided, E is a martingale of the reverse process, from m to X0: dE = J dW with int J^2 dB = C. Guidance
# adds J G dB:
#
#     dE = J G dB + J dW,    int J^2 dB = C,    int J dB = K(C)
#
# and each law below is an integral of this line. Along an eigenvector with variance s, with v = alpha,
#     K(s) = int_0^inf alpha s/(alpha^2 s + h) dB = 2 s int_0^1 dv/(1 + (s - 1) v^2).


def field_response(C: Tensor) -> Tensor:
    """K(C) (..., D, D): a constant field b added to the score moves the samples' mean by K(C) b."""
    s, U = torch.linalg.eigh(C)
    # K(s) = 2 s atan(root)/root if s > 1, 2 s atanh(root)/root if s < 1, root = sqrt|s - 1|; K(1) = 2, K(0) = 0
    root = (s - 1).abs().clamp(min=1e-12).sqrt()
    angle = torch.where(s > 1, torch.atan(root), torch.atanh(root.clamp(max=1 - 1e-15)))
    K = 2 * s.clamp(min=0) * angle / root
    return U @ (K[..., None] * U.mT)


def guide_simple(a: Tensor, y: float | Tensor, w: float | Tensor) -> Guidance:
    """w G_simple = 2 w (y - a^T E) J a; a (..., D); y and w broadcast to (..., 1)."""

    def guidance(B: float, J: Tensor) -> tuple[Tensor, Tensor]:
        Ja = 2 * w * mv(J, a)
        return -Ja[..., :, None] * a[..., None, :], y * Ja

    return guidance


def guide_contrastive(a: Tensor, ap: Tensor, alpha1: float | Tensor, alpha2: float | Tensor) -> Guidance:
    """alpha1 a - alpha2 J ap: w times Theorem 1 at a fixed X0 is alpha1 = 2 w (y - a^T X0), alpha2 = 2 w."""
    return lambda B, J: (torch.zeros_like(J), alpha1 * a - alpha2 * mv(J, ap))


def guide_conditional(a: Tensor, y: float, sigma: float) -> Guidance:
    """G_simple with the weight 1/(2 (sigma^2 + a^T Cov(X0 | Xt) a))."""

    # given Xt, a^T X0 + sigma eps is N(a^T E, sigma^2 + a^T Cov a), Cov = (h/alpha) J: G is its score at y
    def guidance(B: float, J: Tensor) -> tuple[Tensor, Tensor]:
        alpha, h = schedule(B)
        return guide_simple(a, y, 1 / (2 * (sigma**2 + h / alpha * (a @ J @ a))))(B, J)

    return guidance


def law_simple(
    m: Tensor, C: Tensor, a: Tensor, y: float | Tensor, w: float | Tensor, points: int = 300
) -> tuple[Tensor, Tensor]:
    """Mean and covariance under w G_simple(a); m, a (..., D), C (..., D, D); y, w broadcast to (..., 1)."""
    # Let V(B) = int_B^inf J^2 = alpha^2 C (alpha^2 C + h I)^{-1} C, from 0 to C, and phi = a^T V a. With noise
    # of covariance dV, dE = 2 w (y - a^T E) dV a + noise: a^T E is an Ornstein-Uhlenbeck process in phi.
    #   e = y - mean of a^T E = (y - a^T m) exp(-2 w phi)           mean = m + 2 w int e dV a
    #   u = Cov(E, a^T E) = exp(-2 w phi) int cosh(2 w phi) dV a    cov = C - 2 w int (dV a u^T + u a^T dV)
    # If a is an eigenvector with variance s: along a the mean is y + (a^T m - y) exp(-2 w s), the variance
    # (1 - exp(-4 w s))/(4 w); nothing else changes. D2's negative term is w < 0: it explodes.
    s, U = torch.linalg.eigh(C)
    w = vec(1) * w  # (..., 1)
    a_U, s = mv(U.mT, a)[..., None, :], s.clamp(min=1e-30)[..., None, :]  # (..., 1, D) in the eigenbasis of C
    alpha2 = torch.exp(-vec(math.inf, *noise_levels(points), 0))[:, None]  # (T, 1)
    V = alpha2 * s**2 / (alpha2 * s + (1 - alpha2))  # (..., T, D), diagonal
    phi = (V * a_U**2).sum(-1)  # (..., T)
    dVa = V.diff(dim=-2) * a_U  # (..., T-1, D)

    def middle(f: Tensor) -> Tensor:  # (..., T) -> (..., T-1, 1)
        return (f[..., 1:, None] + f[..., :-1, None]) / 2

    decay, rise = middle(torch.exp(-2 * w * phi)), middle(torch.cosh(2 * w * phi)) * dVa
    shift = 2 * w * (y - (a * m).sum(-1, keepdim=True)) * (decay * dVa).sum(-2)
    u = decay * (rise.cumsum(-2) - rise / 2)  # (..., T-1, D)
    drop = 2 * w[..., None] * dVa.mT @ u
    return m + mv(U, shift), C - U @ (drop + drop.mT) @ U.mT


def law_contrastive(
    m: Tensor, C: Tensor, a: Tensor, ap: Tensor, alpha1: float | Tensor, alpha2: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and covariance under alpha1 a - alpha2 J ap; shapes as in `law_simple`."""
    # int J (alpha1 a - alpha2 J ap) dB = alpha1 K(C) a - alpha2 C ap, and no covariance changes. alpha1 = 0
    # is the exact tilt of the law by exp(-alpha2 ap^T x). With one random draw X0 per trajectory alpha1
    # varies between trajectories and adds its variance times K a (K a)^T.
    return m + alpha1 * mv(field_response(C), a) - alpha2 * mv(C, ap), C


def law_conditional(m: Tensor, C: Tensor, a: Tensor, y: float, sigma: float) -> tuple[Tensor, Tensor]:
    """N(m, C) given a^T X0 + sigma eps = y: what `guide_conditional` samples."""
    gain = C @ a / (a @ C @ a + sigma**2)
    return m + gain * (y - a @ m), C - torch.outer(gain, C @ a)


def check_laws(seed: int) -> list[Check]:
    """The laws against the moments of Euler-Maruyama."""
    gen, y = torch.Generator().manual_seed(seed), 2.5
    m, C = torch.randn(3, generator=gen, dtype=F64), random_spd(3, gen)
    a, ap = random_unit(3, gen), random_unit(3, gen)
    s, v = (t[..., 1] for t in torch.linalg.eigh(C))

    def on_eigenvector(w: float) -> tuple[Tensor, Tensor]:
        pull, variance = 1 - torch.exp(-2 * w * s), (1 - torch.exp(-4 * w * s)) / (4 * w)
        return m + pull * (y - v @ m) * v, C + (variance - s) * torch.outer(v, v)

    laws: dict[str, tuple[Guidance, tuple[Tensor, Tensor]]] = {
        "w G_simple(a)": (guide_simple(a, y, 0.4), law_simple(m, C, a, y, 0.4)),
        "w G_simple(a), a eigenvector: y + (m - y) exp(-2ws)": (guide_simple(v, y, 0.4), on_eigenvector(0.4)),
        "D2's negative term explodes: w < 0": (guide_simple(v, y, -0.2), on_eigenvector(-0.2)),
        "-alpha2 J ap tilts: mean m - alpha2 C ap": (guide_contrastive(a, ap, 0, 0.6), (m - 0.6 * C @ ap, C)),
        "a constant field moves the mean by K(C) b": (
            guide_contrastive(a, ap, 0.7, 0),
            law_contrastive(m, C, a, ap, 0.7, 0),
        ),
        "G_simple/(2 (sig^2 + a^T Cov a)): N(. | a^T X0 + sig eps = y)": (
            guide_conditional(a, y, 0.5),
            law_conditional(m, C, a, y, 0.5),
        ),
    }

    def all_at_once(B: float, J: Tensor) -> tuple[Tensor, Tensor]:  # F (laws, 3, 3), f (laws, 3)
        F, f = zip(*(guidance(B, J) for guidance, _ in laws.values()), strict=True)
        return torch.stack(F), torch.stack(f)

    means, covs = sampler_law(m, C, all_at_once)
    checks = []
    for name, (_, (mean, cov)), found_mean, found_cov in zip(laws, laws.values(), means, covs, strict=True):
        checks.append(Check("ext.", name, worst([gap(found_mean, mean), gap(found_cov, cov)]), 3e-3))

    # the tilt again: for a Gaussian latent its exact guidance is grad log E[exp(b^T X0) | x] = J b
    A, latent, errors = random_basis(3, 2, gen), random_latent(2, 1, gen), []
    z, log_prior = grid_latent(latent)
    for B in LEVELS[:3]:
        x, b, x0 = random_point(A, latent, B, gen), 0.5 * random_unit(3, gen), z @ A.T
        tilted, plain = (derivative(grid_log_q, x, x0, prior, B) for prior in (log_prior + x0 @ b, log_prior))
        errors.append(gap(tilted - plain, mean_jacobian(x, A, exact_m(latent, B), B) @ b))
    checks.append(Check("ext.", "grad log E[exp(b^T X0) | x] = J b by quadrature", worst(errors), 1e-9))

    # "adding additional h/alpha": int (h/alpha) J dB = int s h/(alpha^2 s + h) dB ~ s B_T = 2 s ln(1/alpha_T)
    B = torch.linspace(0, 32, 6401, dtype=F64)
    speed = (1 - torch.exp(-B)) / (torch.exp(-B) + 1 - torch.exp(-B))  # s = 1
    growth = torch.trapezoid(speed[3200:], B[3200:]).item()
    balance, diverges = (
        '"add h/alpha": growth of the shift, B_T 16 to 32',
        "diverges as 2 s ln(1/alpha_T): do not",
    )
    return [*checks, Check("Thm. 1", balance, growth, 1, diverges)]


# When does contrast help? Let Q = I - a a^T and call E|Q x|^2 the off-target energy. By the law above the
# off-target mean is v - alpha2 q with v = Q (m + alpha1 K(C) a), q = Q C ap, and the covariance does not
# depend on the guidance. The negative term changes the energy by
# |v - alpha2 q|^2 - |v|^2 = alpha2 (alpha2 |q|^2 - 2 <v, q>), so it helps iff
#
#     0 < alpha2 < 2 <v, q>/|q|^2.
#
# It shifts the other components by -alpha2 q and shrinks none of their variances. It helps a model whose mean
# leans off target the way ap does. If a_i is an eigenvector and the mean lies along it, v = 0: it always
# hurts.


def contrast_bound(m: Tensor, C: Tensor, a: Tensor, ap: Tensor, alpha1: float) -> Tensor:
    """2 <v, q>/|q|^2, (...,); m, a, ap (..., D), C (..., D, D)."""

    def off_target(x: Tensor) -> Tensor:
        return x - (x * a).sum(-1, keepdim=True) * a

    v, q = off_target(m + alpha1 * mv(field_response(C), a)), off_target(mv(C, ap))
    return 2 * (v * q).sum(-1) / (q * q).sum(-1)


def off_target_energy(mean: Tensor, cov: Tensor, a: Tensor) -> Tensor:
    """E|(I - a a^T) x|^2, (...,)."""
    total = (mean**2).sum(-1) + torch.diagonal(cov, dim1=-2, dim2=-1).sum(-1)
    return total - (mean * a).sum(-1) ** 2 - (a * mv(cov, a)).sum(-1)


def check_condition(seed: int) -> list[Check]:
    """The law of Theorem 1 and the condition on 48 random models, against the moments of the sampler."""
    gen, n, alpha1 = torch.Generator().manual_seed(seed), 48, 0.7
    m = 1.5 * torch.randn(n, 4, generator=gen, dtype=F64)
    C = torch.stack([random_spd(4, gen) for _ in range(n)])
    a, ap = (torch.stack([random_unit(4, gen) for _ in range(n)]) for _ in range(2))
    alpha2 = 0.2 + 1.3 * torch.rand(n, 1, generator=gen, dtype=F64)
    mean, cov = sampler_law(m, C, guide_contrastive(a, ap, alpha1, alpha2))
    law_mean, law_cov = law_contrastive(m, C, a, ap, alpha1, alpha2)
    law = worst([gap(mean, law_mean), gap(cov, law_cov)])
    without, _ = sampler_law(m, C, guide_contrastive(a, ap, alpha1, 0.0))
    helps = off_target_energy(mean, cov, a) < off_target_energy(without, cov, a)
    share = alpha2[:, 0] / contrast_bound(m, C, a, ap, alpha1)
    judged = (share - 1).abs() > 0.02  # next to the bound the sampler's own error decides
    wrong = int((judged & (helps != ((share > 0) & (share < 1)))).sum())
    # a model without error: Example 1's A, mean and a_1 aligned
    m, C = vec(2, 0, 0), torch.diag(vec(1, 0.5, 0.3))
    empty = abs(contrast_bound(m, C, A1, AP, alpha1).item())
    energy = [off_target_energy(*law_contrastive(m, C, A1, AP, alpha1, x), A1).item() for x in (0.0, 0.56)]
    decreases, shifts = (
        '"decreases the others": energy up, no model error',
        "shifts their mean by -alpha2 Q C ap",
    )
    return [
        Check("ext.", "Theorem 1 samples N(m + alpha1 K(C) a - alpha2 C ap, C)", law, 4e-3),
        Check("ext.", f"contrast helps iff 0 < alpha2 < 2<v,q>/|q|^2 ({int(helps.sum())} of {n})", wrong, 0),
        Check("ext.", "without model error that interval is empty", empty, 1e-12),
        Check("Thm. 1", decreases, energy[1] - energy[0], 0.01, shifts),
    ]


# --- Matched comparison (ext.) ---
#
# Any guidance raises the similarity if it is strong, and a strong one explodes something else. So each gets
# the strength at which E[a_1^T x] meets a target, and the question is what else it did. All models are
# Example 1's:

STUDIES = {  # name: basis, latent mean, latent variances, noise in all of R^3, target E[a_1^T x], y^Target
    "S1": (A_TRUE, vec(2, 0), vec(1, 0.5), 0.0, 4.0, 5.5),  # no model error
    "S3": (A_TRUE, vec(2, 0.9), vec(1, 0.5), 0.0, 4.0, 5.5),  # right span, mean leaning towards ap
    "S4": (A_TRUE, vec(2, -0.9), vec(1, 0.5), 0.0, 4.0, 5.5),  # right span, mean leaning away from ap
    "S5": (A_MODEL, vec(2, 0), vec(1, 0.5), 0.0, 3.5, 5.5),  # wrong span
    "S6": (A_MODEL, vec(2, 0), vec(1, 0.5), 0.2, 3.5, 5.5),  # wrong span, some noise out of it
    "S7": (A_MODEL, vec(2, 0), vec(0.1, 0.05), 0.05, 2.4, 3.2),  # the same, tighter: drawn in Figure 3
}
RATIOS = (0.0, 0.25, 0.5, 0.8, 1.2)  # r of the contrastive guidances; 0 is "a_i only", a constant field


def study(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m (3,), C (3, 3), target (1,), y (1,)."""
    basis, mu, s, noise, target, y = STUDIES[name]
    return basis @ mu, basis @ torch.diag(s) @ basis.T + noise * torch.eye(3, dtype=F64), vec(target), vec(y)


def mean_cosine(mean: Tensor, cov: Tensor, a: Tensor, points: int = 2048) -> Tensor:
    """E cos(x, a) under N(mean, cov), (...,), over quasi-random points that all laws share."""
    u = torch.quasirandom.SobolEngine(mean.shape[-1], scramble=True, seed=0).draw(points, dtype=F64)
    normal = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-12, 1 - 1e-12))  # (points, D)
    s, U = torch.linalg.eigh(cov)  # low-rank covariances have no Cholesky factor
    x = mean[..., None, :] + (normal * s.clamp(min=0).sqrt()[..., None, :]) @ U.mT  # (..., points, D)
    return cosine(x, a[..., None, :]).mean(-1)


def match_simple(m: Tensor, C: Tensor, a: Tensor, guide: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """w (..., 1) at which w G_simple(guide) gives E[a^T x] = target (..., 1), by bisection."""
    low, high = torch.zeros_like(target), 4 / (guide * mv(C, guide)).sum(-1, keepdim=True)
    for _ in range(20):
        w = (low + high) / 2
        below = (law_simple(m, C, guide, y, w, points=100)[0] * a).sum(-1, keepdim=True) < target
        low, high = torch.where(below, w, low), torch.where(below, high, w)
    return (low + high) / 2


def match_contrastive(
    m: Tensor, C: Tensor, a: Tensor, ap: Tensor, target: Tensor, r: float | Tensor
) -> Tensor:
    """alpha1 (..., 1) at which alpha1 (a - r J ap) gives E[a^T x] = target (..., 1)."""
    # beyond r* = a^T K(C) a/(a^T C ap) the field lowers the similarity and no alpha1 > 0 does it
    gain = (a * (mv(field_response(C), a) - r * mv(C, ap))).sum(-1, keepdim=True)
    return (target - (a * m).sum(-1, keepdim=True)) / gain


Table = dict[str, list[tuple[float, float, float]]]  # study: for each guidance, the three numbers below
COLUMNS = ("none", "simple ap", "simple a_i", "a_i only", *(f"r = {r:g}" for r in RATIOS[1:]))


def matched_table() -> Table:
    """Mean cosine to a_1, off-target energy E[x_2^2] in the true span, E[x_3^2] out of it."""
    table: Table = {}
    for name in STUDIES:
        m, C, target, y = study(name)
        laws = [(m, C)]
        for guide in (AP, A1):
            laws.append(law_simple(m, C, guide, y, match_simple(m, C, A1, guide, y, target)))
        for r in RATIOS:
            alpha1 = match_contrastive(m, C, A1, AP, target, r)
            laws.append(law_contrastive(m, C, A1, AP, alpha1, r * alpha1))
        mean, cov = (torch.stack(t) for t in zip(*laws, strict=True))  # (guidances, 3), (guidances, 3, 3)
        energy = mean**2 + torch.diagonal(cov, dim1=-2, dim2=-1)
        cells = torch.stack([mean_cosine(mean, cov, A1), energy[:, 1], energy[:, 2]], 1)
        table[name] = [(cos, inside, outside) for cos, inside, outside in cells.tolist()]
    return table


def check_limits(seed: int) -> list[Check]:
    """What no strength of guidance can do."""
    # the output is in the span of the model's A', so cos(x, a_1) <= |A'^T a_1| = 2/sqrt 5 in Example 1
    m, C, _, y = study("S5")
    mean, cov = reverse_law(m, C, guide_simple(A1, y, 0.4), steps=50)
    normal = torch.linalg.cross(A_MODEL[:, 0], A_MODEL[:, 1])
    outside = worst([abs((normal @ mean).item()), (normal @ cov @ normal).abs().item()])
    # beyond r* = a^T K a/(a^T C ap) the contrastive field lowers the similarity
    m, C, _, _ = study("S6")
    r_star = (A1 @ field_response(C) @ A1 / (A1 @ C @ AP)).item()
    still = (sampler_law(m, C, guide_contrastive(A1, AP, 1.0, r_star))[0] - m)[0].abs().item()
    return [
        Check("ext.", "guidance stays in the model's span, cos <= |A'^T a_1| = .894", outside, 1e-9),
        Check("ext.", f"in S6 contrast stops raising the similarity at r* = {r_star:.2f}", still, 4e-3),
    ]


def random_models(kind: str, n: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m (n, 12), C (n, 12, 12), a, ap (n, 12); the model's basis is turned away from A unless "aligned"."""
    D, M, models = 12, 4, []
    for _ in range(n):
        A, N = random_basis(D, 2 * M, gen).split(M, dim=1)
        S = torch.randn(M, M, generator=gen, dtype=F64)
        turn = torch.linalg.matrix_exp(0.5 * (S - S.T) / torch.linalg.matrix_norm(S - S.T))
        basis = A if kind == "aligned" else (math.cos(0.5) * A + math.sin(0.5) * N) @ turn
        noisy = normalize(A[:, 0] + 0.3 * random_unit(D, gen), dim=0)
        m = torch.zeros(D, dtype=F64) if kind == "zero mean" else 3 * basis[:, 0]
        C = basis @ torch.diag(vec(1, 0.7, 0.5, 0.3)) @ basis.T + 0.02 * torch.eye(D, dtype=F64)
        models.append((m, C, A[:, 0], noisy if kind == "aligned" else basis[:, 0]))
    m, C, a, ap = (torch.stack(list(t)) for t in zip(*models, strict=True))
    return m, C, a, ap


def check_wins(seed: int) -> list[Check]:
    """Where Figure 3's ranking holds: contrastive, r = c, against both simple guidances, matched."""
    gen, n, kinds = torch.Generator().manual_seed(seed), 20, ("misaligned", "zero mean", "aligned")
    m, C, a, ap = (torch.cat(t) for t in zip(*(random_models(kind, n, gen) for kind in kinds), strict=True))
    sd = (a * mv(C, a)).sum(-1, keepdim=True).sqrt()
    target = (a * m).sum(-1, keepdim=True) + 1.5 * sd
    y, c = target + 1.5 * sd, (a * ap).sum(-1, keepdim=True)
    alpha1 = match_contrastive(m, C, a, ap, target, c)
    contrastive = mean_cosine(*law_contrastive(m, C, a, ap, alpha1, c * alpha1), a, 512)
    simple = []
    for guide in (ap, a):
        law = law_simple(m, C, guide, y, match_simple(m, C, a, guide, y, target), 100)
        simple.append(mean_cosine(*law, a, 512))
    wins = (contrastive > torch.maximum(*simple)).reshape(3, n).sum(1).tolist()
    misaligned, zero, aligned = ((n - won) / n for won in wins)
    only = "only if the mean leans off target as ap does"
    return [
        Check("Fig. 3", "(c) beats (a), (b): misaligned, mean along ap; share lost", misaligned, 0.05),
        Check("Fig. 3", '"(c) beats (a), (b)": misaligned, zero mean; share lost', zero, 0.79, only),
        Check("Fig. 3", '"(c) beats (a), (b)": aligned, ap noisy; share lost', aligned, 0.79, only),
    ]


# --- Figure 3 ---


def trajectories(m: Tensor, C: Tensor, guidance: Guidance, n: int, seed: int) -> Tensor:
    """Samples (n, D) of the reverse process, 200 Euler-Maruyama steps; equal seeds draw equal noise."""
    gen = torch.Generator().manual_seed(seed)
    x, levels = torch.randn(n, len(m), generator=gen, dtype=F64), noise_levels(200)
    for B, B_next in pairwise(levels):
        S, b = reverse_step(B, B - B_next, m, C, guidance)
        x = x @ S.T + b + math.sqrt(B - B_next) * torch.randn(n, len(m), generator=gen, dtype=F64)
    J, e = posterior_map(levels[-1], m, C)
    return x @ J.T + e


def plot_figure(cfg: Config, table: Table) -> Path:
    """Figure 3 (a)-(c) on S7, matched; (d) a step that overshoots; (e) where contrast helps or hurts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    m, C, target, y = study("S7")
    alpha1 = match_contrastive(m, C, A1, AP, target, 0.8)
    panels = {
        "(a) simple, $a^{appro}$": guide_simple(AP, y, match_simple(m, C, A1, AP, y, target)),
        "(b) simple, $a_1$": guide_simple(A1, y, match_simple(m, C, A1, A1, y, target)),
        "(c) contrastive, $r = c$": guide_contrastive(A1, AP, alpha1, 0.8 * alpha1),
    }
    figure = plt.figure(figsize=(12, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1))
    plane = torch.stack([A1, (AP - 0.8 * A1) / 0.6], 1)  # (3, 2): a_1 and the rest of ap

    def arrow(axis: Any, start: Tensor, end: Tensor, colour: str, label: str) -> None:
        style = {
            "arrowstyle": "-|>",
            "color": colour,
            "lw": 2.2,
            "mutation_scale": 16,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        axis.annotate("", (end @ plane).tolist(), (start @ plane).tolist(), arrowprops=style, zorder=3)
        axis.plot([], [], color=colour, lw=2.2, label=label)

    plain = trajectories(m, C, guide_nothing, cfg.trajectories, cfg.seed)
    before = f"unguided (mean cosine {cosine(plain, A1).mean().item():.3f})"
    axis = None
    for i, (name, guidance) in enumerate(panels.items()):
        axis = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
        guided = trajectories(m, C, guidance, cfg.trajectories, cfg.seed)
        for x, colour, label in (
            (plain, "0.65", before),
            (guided, "tab:blue", "guided to equal similarity to $a_1$"),
        ):
            axis.plot(*(x[:300] @ plane).T.numpy(), ".", ms=4, mew=0, color=colour, alpha=0.7, label=label)
        arrow(axis, 0 * A1, A1, "tab:green", "$a_1$")
        arrow(axis, 0 * A1, AP, "tab:red", "$a^{appro}$")
        arrow(axis, plain.mean(0), guided.mean(0), "black", "what the guidance does to the mean")
        axis.set_title(f"{name}: mean cosine {cosine(guided, A1).mean().item():.3f}", fontsize=11)
        axis.set(
            xlim=(-0.2, 3.4),
            ylim=(-0.2, 2.6),
            aspect="equal",
            xlabel="along $a_1$",
            ylabel="rest of $a^{appro}$",
        )
    assert axis is not None
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False, markerscale=3
    )

    axis = figure.add_subplot(grid[1, :3])
    s = torch.linspace(0, 5, 201, dtype=F64)
    for name, g in {
        "$a^{appro}$": AP,
        "$a_1$": A1,
        r"$a_1 - 0.8\,a^{appro}$": direction(0.8),
        r"$a_1 - 1.4\,a^{appro}$": direction(1.4),
    }.items():
        axis.plot(s, step_cosine(s, g), lw=2, label=name)
    axis.set_title("(d) a step of length s from $a^{appro}$: contrast is faster and overshoots")
    axis.set(xlabel="s", ylabel="cosine to $a_1$", ylim=(0, 1.02))
    axis.legend(title="along", loc="lower left")

    axis = figure.add_subplot(grid[1, 3:])
    models = {
        "S1": "no error",
        "S3": "mean towards $a^{appro}$",
        "S4": "mean away from it",
        "S6": "wrong span",
    }
    for (name, label), colour in zip(models.items(), ("C0", "C2", "C1", "C3"), strict=True):
        axis.plot(
            RATIOS, [cell[0] for cell in table[name][3:]], "o-", lw=2, color=colour, label=f"{name}: {label}"
        )
        axis.axhline(table[name][2][0], ls=":", color=colour)
    axis.set_title("(e) at equal similarity contrast helps some models, hurts others")
    axis.set(
        xlabel="r = alpha2/alpha1     (dotted: simple guidance with $a_1$)",
        ylabel="mean cosine to $a_1$",
        ylim=(0.82, 1),
    )
    axis.legend(loc="lower right", ncols=2)

    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "figure3"  # the same file from the same command
    for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
        figure.savefig(folder / f"figure3.{suffix}", dpi=110, metadata=metadata)
    plt.close(figure)
    return folder / "figure3.png"


# --- everything, in the paper's order ---

CHECKS: tuple[Callable[[int], list[Check]], ...] = (
    check_forward, check_reverse, check_score, check_posterior, check_quadrature, check_assumptions,
    check_corollary1, check_coefficient, check_direction, check_theorem1, check_example1, check_correction,
    check_laws, check_condition, check_limits, check_wins,
)  # fmt: skip


def line(check: Check) -> str:
    """PASS or FAIL, the mark Xf, source, name, error, tolerance, and what is true instead."""
    status, mark = "PASS" if check.passed else "FAIL", "Xf" if check.truth else "  "
    relation, truth = (">", f"  true: {check.truth}") if check.truth else ("<=", "")
    measured = f"{check.error:9.1e} {relation:>2} {check.tol:<5.0e}"
    return f"{status} {mark} {check.source:<10}{check.name:<62}{measured}{truth}"


def print_table(table: Table) -> None:
    """The matched comparison, and whether contrast (r = c) beats all that uses no negative term."""
    print("\nMatched comparison, each guidance at the strength where E[a_1^T x] meets the study's target:")
    print("mean cosine to a_1 / off-target energy in the true span / energy out of it\n")
    print("    " + "".join(f"{name:>16}" for name in COLUMNS) + "   contrast, r = c")
    for name, row in table.items():
        cells = "".join(f"{f'{cos:.3f}/{inside:.2f}/{outside:.2f}':>16}" for cos, inside, outside in row)
        helps = row[COLUMNS.index("r = 0.8")][0] > max(cell[0] for cell in row[1:4])
        print(f"{name:<4}{cells}   {'helps' if helps else 'HURTS'}")
    print(
        "\nS1 no model error; S3, S4 right span, mean leaning towards, away from ap; S5-S7 wrong span (A')."
    )


def main(cfg: Config) -> dict[str, Any]:
    """Run and print everything; returns the checks, the table and the number of failures."""
    start, checks = time.perf_counter(), []
    for run_checks in CHECKS:
        for check in run_checks(cfg.seed):
            print(line(check), flush=True)
            checks.append(check)
    table = matched_table()
    print_table(table)
    failed, false = sum(not c.passed for c in checks), sum(bool(c.truth) for c in checks)
    print(f"\n{len(checks)} checks, {failed} failed; {false} show a sentence of the paper false as written.")
    print(
        f"seed {cfg.seed}, float64, {torch.get_num_threads()} thread(s), {time.perf_counter() - start:.1f} s"
    )
    if cfg.plot:
        print(f"figure: {plot_figure(cfg, table)}")
    return {"checks": checks, "table": table, "failed": failed}


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny
    raise SystemExit(main(tyro.cli(Config, description=__doc__))["failed"] > 0)
