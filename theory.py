"""Section 4 of the paper in float64: its formulas, and which of its sentences hold.

Each formula is a function, derived in the comment above it. Each `check_` compares formulas with what does
not use them: autograd, or quadrature over the latent. Samples (Figure 3): runs/theory_extra.py.

Run: python theory.py
Expect PASS on every line (or exit status 1), after about a second of one CPU core:
    holds      The statement is true. The number is its error and must not exceed the tolerance.
    refuted    A sentence of the paper (in quotes) is false as written. The number says by how much a
               counterexample violates it and must exceed the margin. What is true ends the line.

Letters (some differ from the other files', of which only common.cli is used):
    D, M        dimension of the 3-D data, number of views; A (D, M) = [a_1 ... a_M], A^T A = I
    z, x0, x    latent (M,), z ~ N(mu, Sigma); clean data x0 = A z (D,); noised data (D,)
    tau         noise level, int_0^t beta(s) ds: the schedule beta only relabels time
    E, J        posterior mean E[X0 | Xt = x] (D,) and its Jacobian J[i, j] = dE_i/dx_j (D, D)
    a, ap, y    a_i (ground truth), a_i^appro (from generated samples), y^Target
    r, c        alpha2/alpha1, the coefficients of J ap and of a in the contrastive guidance; cos(a, ap)
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common import cli


@dataclass(frozen=True)
class Config:
    seed: int = 0  # draws the random models and points of the checks; every seed has to pass


class Holds(NamedTuple):
    """A true statement: no error exceeds the tolerance (a nan does)."""

    source: str  # where the paper says it; "ours" in runs/theory_extra.py
    statement: str
    errors: list[float]
    tol: float

    @property
    def passed(self) -> bool:
        return bool(self.errors) and all(error <= self.tol for error in self.errors)


class Refuted(NamedTuple):
    """A sentence that is false as written: a counterexample violates it by more than the margin."""

    source: str
    statement: str
    violation: float
    margin: float
    instead: str  # what is true

    @property
    def passed(self) -> bool:
        return self.violation > self.margin


Check = Holds | Refuted

F64 = torch.float64
LEVELS = (0.05, 0.5, 2.0, 8.0)  # tau of the checks; at ln 2, alpha^2 = h would hide an exchange of the two


def vec(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=F64)


def max_error(a: Tensor, b: Tensor | float) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the last dimension."""
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def derivative(f: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Autograd's gradient (D,) of a scalar f, or Jacobian [i, j] = df_i/dx_j, at x (D,); args stay fixed."""
    return cast(Tensor, torch.autograd.functional.jacobian(lambda x: f(x, *args), x))  # torch.func loads 3 s


def random_basis(D: int, M: int, gen: torch.Generator) -> Tensor:
    """Orthonormal columns (D, M)."""
    return torch.linalg.qr(torch.randn(D, M, generator=gen, dtype=F64))[0]


def random_spd(M: int, gen: torch.Generator) -> Tensor:
    """A covariance (M, M) that is not diagonal, with eigenvalues between 0.3 and 2."""
    Q = random_basis(M, M, gen)
    return Q @ torch.diag(0.3 + 1.7 * torch.rand(M, generator=gen, dtype=F64)) @ Q.T


# --- Section 4: Assumption 1, Eq. (3), the posterior mean, Eq. (4) ---
#
# The random inputs avoid what hides mistakes: mu = 0 (an unscaled mu), Sigma = I (Sigma^{-1} for Sigma,
# alpha^2 for h), D = M (the term off the span). No formula before "When assuming a Gaussian latent" needs it.


def alpha_h(tau: float) -> tuple[float, float]:
    """Signal alpha and variance h of X_t | X_0 = N(alpha X_0, h I)."""
    # dX = -beta/2 X dt + sqrt(beta) dB is linear: d alpha/dtau = -alpha/2, dh/dtau = 1 - h from (1, 0), hence
    # alpha = exp(-tau/2), h = 1 - alpha^2
    return math.exp(-tau / 2), -math.expm1(-tau)


class Latent(NamedTuple):
    """N(mu, Sigma), the law of z."""

    mu: Tensor  # (M,)
    Sigma: Tensor  # (M, M)


def random_latent(M: int, gen: torch.Generator) -> Latent:
    """Nothing in it is zero, diagonal or equal."""
    return Latent(1.5 * torch.randn(M, generator=gen, dtype=F64), random_spd(M, gen))


def latent_score(u: Tensor, latent: Latent, tau: float) -> Tensor:
    """grad log q_t^LD(u), (M,) -> (M,), as defined below Eq. (3) with (m_t, sigma_t^2) = (alpha, h)."""
    alpha, h = alpha_h(tau)
    # q_t^LD = N(alpha mu, alpha^2 Sigma + h I)
    cov = alpha**2 * latent.Sigma + h * torch.eye(len(u), dtype=F64)
    return -torch.linalg.solve(cov, u - alpha * latent.mu)


def score(x: Tensor, A: Tensor, latent: Latent, tau: float) -> Tensor:
    """Eq. (3), (D,) -> (D,)."""
    _, h = alpha_h(tau)
    # X_t = alpha A z + sqrt(h) eps is alpha z + noise in the span of A and pure noise off it:
    # grad log q_t(x) = A grad log q_t^LD(A^T x) - (I - A A^T) x / sigma_t^2
    return A @ latent_score(A.T @ x, latent, tau) - (x - A @ (A.T @ x)) / h


Mfn = Callable[[Tensor], Tensor]  # the paper's m, (M,) -> (M,); the formulas below hold for any


def exact_m(latent: Latent, tau: float) -> Mfn:
    """The paper's own m, that of the exact score."""
    # m(u) = grad log q_t^LD(u) + u/h
    return lambda u: latent_score(u, latent, tau) + u / alpha_h(tau)[1]


def surrogate_m(M: int, gen: torch.Generator) -> Mfn:
    """An m that is no gradient, as a network's is not: W tanh(V u) + b, Jacobian not symmetric."""
    (W, V), b = torch.randn(2, M, M, generator=gen, dtype=F64), torch.randn(M, generator=gen, dtype=F64)
    return lambda u: W @ torch.tanh(V @ u) + b


def tweedie_mean(x: Tensor, A: Tensor, latent: Latent, tau: float) -> Tensor:
    """E[X0 | Xt = x] (D,), the paper's first form."""
    alpha, h = alpha_h(tau)
    # grad log q_t(x) = E[grad_x log q_t(x | X0) | x] = (alpha E - x)/h, solved for E:
    return (x + h * score(x, A, latent, tau)) / alpha


def posterior_mean(x: Tensor, A: Tensor, m: Mfn, tau: float) -> Tensor:
    """E[X0 | Xt = x] (D,), the paper's second form."""
    alpha, h = alpha_h(tau)
    # Eq. (3) into Tweedie, with u = A^T x: x + h [A score^LD - (x - A u)/h] = A (h score^LD + u), so
    # E = (h/alpha) A m(A^T x)
    return h / alpha * A @ m(A.T @ x)


def mean_jacobian(x: Tensor, A: Tensor, m: Mfn, tau: float) -> Tensor:
    """J[i, j] = dE_i/dx_j (D, D): Eq. (4) less its transpose."""
    alpha, h = alpha_h(tau)
    # Chain rule, grad_m[i, j] = dm_i/du_j: J = (h/alpha) A grad_m A^T. Eq. (4) prints grad_m^T. The paper's
    # own m is the gradient of log q^LD + |u|^2/2h, so grad_m is symmetric and the two are equal.
    return h / alpha * A @ derivative(m, A.T @ x) @ A.T


def posterior_cov(x: Tensor, A: Tensor, m: Mfn, tau: float) -> Tensor:
    """Cov(X0 | Xt = x) (D, D)."""
    alpha, h = alpha_h(tau)
    # Differentiating E = int x0 q(x0 | x) dx0 brings down (alpha x0 - x)/h, so J = (alpha/h) Cov(X0 | x)
    return h / alpha * mean_jacobian(x, A, m, tau)


def grid_latent(latent: Latent, points: int = 200) -> tuple[Tensor, Tensor]:
    """z (n, 2), n = points^2, over mu +- 9 standard deviations; log q(z) + constant (n,)."""
    unit = torch.linspace(-9, 9, points, dtype=F64)
    d = torch.cartesian_prod(unit, unit) * torch.diagonal(latent.Sigma).sqrt()
    return latent.mu + d, -0.5 * (d * torch.linalg.solve(latent.Sigma, d.T).T).sum(-1)


def grid_log(x: Tensor, x0: Tensor, log_prior: Tensor, tau: float) -> Tensor:
    """log q(z) + log q_t(x | x0) + constant, (n,), at x0 = A z (n, D)."""
    return log_prior - ((x - math.exp(-tau / 2) * x0) ** 2).sum(-1) / (2 * (1 - math.exp(-tau)))


def check_quadrature(seed: int) -> list[Check]:
    """Score, E, J and Cov without a formula: only q(z) on a grid and N(x; alpha A z, h I) go in."""
    gen = torch.Generator().manual_seed(seed)
    scores, means, jacobians, covs = [], [], [], []
    for D in (3, 8):
        A, latent = random_basis(D, 2, gen), random_latent(2, gen)
        z, log_prior = grid_latent(latent)
        x0 = z @ A.T
        for tau in LEVELS[:3]:
            x, m = torch.randn(D, generator=gen, dtype=F64), exact_m(latent, tau)
            grid = (x0, log_prior, tau)
            weight = grid_log(x, *grid).softmax(0)
            E, J = weight @ x0, derivative(lambda *args: grid_log(*args).softmax(0) @ args[1], x, *grid)
            log_q_gradient = derivative(lambda *args: grid_log(*args).logsumexp(0), x, *grid)
            scores.append(max_error(score(x, A, latent, tau), log_q_gradient))
            means.append(max_error(tweedie_mean(x, A, latent, tau), E))
            means.append(max_error(posterior_mean(x, A, m, tau), E))
            found = mean_jacobian(x, A, m, tau)
            jacobians += [max_error(found, J), max_error(found.T, J)]
            cov = (x0 - E).T @ (weight[:, None] * (x0 - E))
            covs.append(max_error(posterior_cov(x, A, m, tau), cov))
    return [
        Holds("Eq. (3)", "score = A grad log q^LD(A^T x) - (I - A A^T) x/h", scores, 1e-9),
        Holds("Sec. 4", "E = (x + h score)/alpha = (h/alpha) A m(A^T x)", means, 1e-9),
        Holds("Eq. (4)", "dE/dx = (h/alpha) A grad_m^T A^T, m of the exact score", jacobians, 1e-8),
        Holds("Sec. 4", "dE/dx = (alpha/h) Cov(X0 | x)", covs, 1e-8),
    ]


# --- Section 4, before Corollary 1: what a_i and y^Target are said to be ---


def check_assumptions(seed: int) -> list[Check]:
    """Principal components, and the bound on the similarity."""
    gen = torch.Generator().manual_seed(seed)
    A, (mu, Sigma) = random_basis(12, 4, gen), random_latent(4, gen)
    # order and sign of eigenvectors are arbitrary: each a_i is matched to the closest
    pca = [torch.linalg.eigh(A @ cov @ A.T)[1] for cov in (torch.diag(vec(1.5, 1, 0.6, 0.3)), Sigma)]
    diagonal, mixed = (max_error((A.T @ found).abs().amax(1), 1.0) for found in pca)
    # a_1^T X0 is Gaussian: some X0 lie beyond any y, and there alpha1 = 2 (y - a_1^T X0) < 0
    z = mu + torch.randn(100_000, 4, generator=gen, dtype=F64) @ torch.linalg.cholesky(Sigma).T
    beyond = ((z @ A.T) @ A[:, 0] > mu[0] + 3 * Sigma[0, 0].sqrt()).double().mean().item()
    return [
        Holds("Sec. 4", "PCA finds the a_i if Sigma is diagonal and distinct", [diagonal], 1e-9),
        Refuted("Sec. 4", '"each view is an eigenvector": 1 - |cos|', mixed, 0.01, "needs Sigma diagonal"),
        Refuted("Sec. 4", '"y is the upper bound": share beyond 3 sd', beyond, 5e-4, "a Gaussian has none"),
    ]


# --- Section 4, Corollary 1: the simple guidance ---


def simple_guidance(x: Tensor, a: Tensor, y: float, A: Tensor, m: Mfn, tau: float) -> Tensor:
    """Corollary 1, (D,); a is a_i or a_i^appro, in or out of the span of A."""
    alpha, h = alpha_h(tau)
    # -grad (y - a^T E)^2 = 2 (y - a^T E) J^T a with J = (h/alpha) A grad_m A^T; here the transpose belongs:
    # G = 2 (h/alpha) (y - a^T E) A grad_m^T A^T a
    return 2 * h / alpha * (y - a @ posterior_mean(x, A, m, tau)) * A @ derivative(m, A.T @ x).T @ A.T @ a


def check_corollary1(seed: int) -> list[Check]:
    """Corollary 1 and Eq. (4) against autograd, for the paper's m and for one that is no gradient."""
    gen, exact, surrogate = torch.Generator().manual_seed(seed), [], []

    def loss(x: Tensor, a: Tensor, y: float, mean: Callable[..., Tensor], *args: Any) -> Tensor:
        return (y - a @ mean(x, *args)) ** 2

    for D, M in ((3, 2), (24, 4)):
        A, latent, m = random_basis(D, M, gen), random_latent(M, gen), surrogate_m(M, gen)
        for tau in LEVELS[:3]:
            for a, y in ((A[:, 0], 4.0), (A[:, 0], -4.0), (random_basis(D, 1, gen)[:, 0], 4.0)):
                x = torch.randn(D, generator=gen, dtype=F64)
                G = -derivative(loss, x, a, y, tweedie_mean, A, latent, tau)
                exact.append(max_error(simple_guidance(x, a, y, A, exact_m(latent, tau), tau), G))
                G = -derivative(loss, x, a, y, posterior_mean, A, m, tau)
                surrogate.append(max_error(simple_guidance(x, a, y, A, m, tau), G))
            J = derivative(posterior_mean, x, A, m, tau)
            surrogate.append(max_error(mean_jacobian(x, A, m, tau), J))
    return [
        Holds("Cor. 1", "G_simple = 2 (h/alpha) (y - a^T E) A grad_m^T A^T a", exact, 1e-10),
        Holds("App. A", "both for any m, if (4) loses its T (a slip of notation)", surrogate, 1e-11),
    ]


# What the paper concludes from Corollary 1. On the span of A the eigenvalues of J are
# lam = alpha s/(alpha^2 s + h), s those of Sigma; off it they are D - M exact zeros. So the coefficient of a,
# 2 (y - a^T E) J, is only semi-definite, with a sign of its own, and G stays in the span. For a in the span,
# Wielandt's inequality is cos(J a, a) >= 2 sqrt(k)/(1 + k), k the ratio of the largest to the smallest lam,
# with equality along v_max/sqrt(lam_max) + v_min/sqrt(lam_min).


def check_conclusions(seed: int) -> list[Check]:
    """Is the coefficient positive definite? Does G point along a? Can it lead to a_i?"""
    gen, far = torch.Generator().manual_seed(seed), 100.0  # a y above every a^T E below
    A, latent = random_basis(12, 4, gen), random_latent(4, gen)
    s, v = torch.linalg.eigh(latent.Sigma)  # ascending
    eigenvalues, zeros, sign, bound = [], [], [], []
    for tau in LEVELS:
        m, x, (alpha, h) = exact_m(latent, tau), torch.randn(12, generator=gen, dtype=F64), alpha_h(tau)
        lam, found = alpha * s / (alpha**2 * s + h), torch.linalg.eigvalsh(mean_jacobian(x, A, m, tau))
        eigenvalues += [max_error(found[-4:], lam), max_error(found[:-4], 0.0)]
        zeros.append(int((found.abs() < 1e-9).sum()))
        k, a = (lam[-1] / lam[0]).item(), A @ (v[:, -1] / lam[-1].sqrt() + v[:, 0] / lam[0].sqrt())
        G = simple_guidance(x, a, far, A, m, tau)
        bound.append(abs(cosine(G, a).item() - 2 * math.sqrt(k) / (1 + k)))
        y = 2 * (a @ posterior_mean(x, A, m, tau)).item() - far  # as far below a^T E as `far` is above
        sign.append(max_error(simple_guidance(x, a, y, A, m, tau), -G) / G.norm().item())
    # A = [e_1, e_2]; at Sigma = diag(10, 1), tau = 2 the worst a is (1, sqrt k), k = 4.5
    x, m, a = vec(0.3, -0.2, 0.1), exact_m(Latent(vec(1, 0.5), torch.diag(vec(10, 1))), 2.0), vec(1, 2.12, 0)
    degrees = math.degrees(math.acos(cosine(simple_guidance(x, a, far, A_TRUE, m, 2.0), a).item()))
    along = cosine(simple_guidance(x, A1, far, A_TRUE, m, 2.0), A1).item()
    definite = "semi-definite; definite on span(A), times sign(y - a^T E)"
    leads = '"... would not generate samples similar to a_i": cos(G, a_i)'
    return [
        Holds("Cor. 1", "J has the eigenvalues alpha s/(alpha^2 s + h) and 0", eigenvalues, 1e-10),
        Refuted("Cor. 1", '"the coefficient is positive definite": zeros', min(zeros), 0.5, definite),
        Holds("Cor. 1", "y < a^T E turns G around", sign, 1e-9),
        Holds("Cor. 1", "cos(G, a) is as low as 2 sqrt(k)/(1 + k), a in the span", bound, 1e-9),
        Refuted("Cor. 1", '"approximately the direction of a": degrees', degrees, 10, "needs cond(J) ~ 1"),
        Refuted("Cor. 1", leads, along, 0.9, "G is along a_i, Sigma diagonal; needs a model error"),
    ]


# --- Section 4, Theorem 1: the contrastive guidance ---
#
# The display that defines G_3D-Consistency is unreadable in the text we have. The right-hand side below is
#     -grad_X0 (y - a^T X0)^2 - 2 grad_Xt (ap^T E),
# X0 and Xt independent: the negative term is not squared. If it were, as in G_simple, it had one more factor.


def contrastive_guidance(
    x0: Tensor, x: Tensor, a: Tensor, ap: Tensor, y: float, A: Tensor, m: Mfn, tau: float
) -> Tensor:
    """Theorem 1's right-hand side, (D,)."""
    alpha, h = alpha_h(tau)
    # 2 (y - a^T X0) a - 2 (h/alpha) A grad_m^T A^T ap; the second term is -2 J^T ap
    return 2 * (y - a @ x0) * a - 2 * h / alpha * A @ derivative(m, A.T @ x).T @ A.T @ ap


def check_theorem1(seed: int) -> list[Check]:
    """Theorem 1 against autograd, for the paper's m and any m; the factor of a squared negative term."""
    gen, y, linear, squared = torch.Generator().manual_seed(seed), 4.0, [], []

    def similarity(x: Tensor, ap: Tensor, A: Tensor, m: Mfn, tau: float) -> Tensor:
        return ap @ posterior_mean(x, A, m, tau)

    for D, M in ((3, 2), (24, 4)):
        A, latent = random_basis(D, M, gen), random_latent(M, gen)
        for tau in LEVELS[:3]:
            for m in (exact_m(latent, tau), surrogate_m(M, gen)):
                x0, x = torch.randn(2, D, generator=gen, dtype=F64)
                a, ap = A[:, 0], random_basis(D, 1, gen)[:, 0]
                G = contrastive_guidance(x0, x, a, ap, y, A, m, tau)
                positive = -derivative(lambda x0, a=a: (y - a @ x0) ** 2, x0)
                linear.append(max_error(G - positive, -2 * derivative(similarity, x, ap, A, m, tau)))
                square = derivative(lambda *args: (y - similarity(*args)) ** 2, x, ap, A, m, tau)
                squared.append(max_error((G - positive) * (y - similarity(x, ap, A, m, tau)), square))
    return [
        Holds("Thm. 1", "right-hand side, negative term -2 grad_Xt (ap^T E)", linear, 1e-10),
        Holds("Thm. 1", "... times y - ap^T E, term grad_Xt (y - ap^T E)^2", squared, 1e-10),
    ]


# --- Section 4, Example 1 ---
#
# M = 2, D = 3, a_1 = e_1, a_2 = e_2, ap = (4, sqrt 5, 2)/5, so |ap| = 1 and c = 4/5. Whose A is it? With
# Assumption 1's A = [a_1, a_2], J removes every third component. The sentences on ap need ap to be an
# eigenvector of J, the one on a_1 needs a_1 to be one. A basis of span(a_1, ap) with Sigma = I gives both.

A1, AP = vec(1, 0, 0), vec(4, math.sqrt(5), 2) / 5
A_TRUE = torch.stack([A1, vec(0, 1, 0)], 1)
A_SPAN = torch.stack([A1, (AP - 0.8 * A1) / 0.6], 1)
A_MODEL = torch.stack([AP, vec(-2, 2 * math.sqrt(5), -1) / 5], 1)  # a generated model's own: ap and a normal


def check_example1(seed: int) -> list[Check]:
    """The readings of A. With x0 = y a_1 Theorem 1 is its negative term alone."""
    gen, y, x0, mu = torch.Generator().manual_seed(seed), 100.0, vec(100, 0, 0), vec(1, 0.5)
    both, model, third, simple, leak = [], [], [], [], []
    correlated = Latent(mu, torch.tensor([[1, 0.8], [0.8, 1]], dtype=F64))
    for tau in LEVELS[:3]:
        x, (alpha, h) = torch.randn(3, generator=gen, dtype=F64), alpha_h(tau)
        identity, unequal = (exact_m(Latent(mu, torch.diag(s)), tau) for s in (vec(1, 1), vec(1.5, 0.6)))
        both += [1 - cosine(simple_guidance(x, a, y, A_SPAN, identity, tau), a).item() for a in (A1, AP)]
        both.append(max_error(contrastive_guidance(x0, x, A1, AP, y, A_SPAN, identity, tau), -2 * alpha * AP))
        lam = alpha * 1.5 / (alpha**2 * 1.5 + h)
        model.append(max_error(contrastive_guidance(x0, x, A1, AP, y, A_MODEL, unequal, tau), -2 * lam * AP))
        negative = contrastive_guidance(x0, x, A1, AP, y, A_TRUE, unequal, tau)
        third.append(abs(negative[2] / negative.norm() + 0.4).item())
        G = simple_guidance(x, AP, y, A_TRUE, unequal, tau)
        simple.append(0.4 - (G[2] / G.norm()).item())
        G = simple_guidance(x, A1, y, A_TRUE, exact_m(correlated, tau), tau)
        leak.append((G[1] / G[0]).item())
    zero = "0 with A = [a_1, a_2]; needs ap in the span"
    return [
        Holds("Example 1", "A of span(a_1, ap), Sigma = I: all three sentences", both, 1e-12),
        Holds("Example 1", "A = [ap, ...], Sigma diagonal: negative term along ap", model, 1e-12),
        Refuted("Example 1", '"increase the third", G_simple(ap): off by', min(simple), 0.1, zero),
        Refuted("Example 1", '"-alpha2 2/5", third component of G: off by', min(third), 0.1, zero),
        Refuted("Example 1", '"maintain the others", a_1: G_2/G_1', max(leak), 0.1, "needs Sigma_21 = 0"),
    ]


# --- Section 4, after Theorem 1, and Figure 3: is the contrastive direction correct? ---
#
# Absorb lam into r: the direction is g = a_1 - r ap. Bare, it only turns away from a_1:
#     cos(g, a_1) = (1 - r c)/|g|,  |g|^2 = 1 - 2 r c + r^2.
# As a correction at a sample x = ap, take a step s along g/|g|. There cos(x, a_1) has the gradient
# a_1 - c ap, and <a_1 - c ap, a_1 - r ap> = 1 - c^2 for every r, so at s = 0
#     d/ds cos(x + s g/|g|, a_1) = (1 - c^2)/|g|.
# It is largest at r = c, where g is orthogonal to ap; above the rate of a_1 alone (r = 0) iff 0 < r < 2 c;
# and 0 along ap itself. In this sense Figure 3's direction (c) beats (b) and (a).


def direction(r: float) -> Tensor:
    """g/|g| of Example 1, (3,)."""
    return normalize(A1 - r * AP, dim=0)


def step_cosine(s: Tensor, g: Tensor) -> Tensor:
    """cos(ap + s g, a_1) for steps s (n,) along g (3,), (n,)."""
    return cosine(AP + s[:, None] * g, A1)


def rate(g: Tensor) -> float:
    """d/ds cos(ap + s g, a_1) at s = 0."""
    return derivative(lambda s: step_cosine(s, g).sum(), vec(0)).item()


def check_direction(seed: int) -> list[Check]:
    """The direction of Example 1, bare and as a correction; the sentences after Theorem 1."""
    c, bare, correction = 0.8, [], []
    for r in (0.0, 0.4, c, 1.2, 2 * c):
        norm = math.sqrt(1 - 2 * r * c + r * r)
        bare.append(abs(cosine(direction(r), A1).item() - (1 - r * c) / norm))
        correction.append(abs(rate(direction(r)) - (1 - c * c) / norm))
    order = [rate(direction(r)) - rate(direction(c)) for r in (0, 0.4, 1.2)] + [rate(AP) - rate(A1)]
    turned = 1 - cosine(direction(c), A1).item()
    # no model error, and E along a_1: a step along the negative term moves E off a_1
    x, x0, tau = vec(1, 0, 0), vec(4, 0, 0), 0.5
    latent = Latent(vec(2, 0), torch.diag(vec(1, 0.5)))
    m = exact_m(latent, tau)
    negative = contrastive_guidance(x0, x, A1, AP, 4.0, A_TRUE, m, tau)
    before, after = (posterior_mean(point, A_TRUE, m, tau)[1].abs().item() for point in (x, x + negative))
    # h/alpha on the positive term makes r = alpha2/alpha1 an eigenvalue of grad_m, lam alpha/h instead of lam
    lam = torch.stack([mean_jacobian(x, A_TRUE, exact_m(latent, tau), tau)[0, 0] for tau in LEVELS])
    balanced = lam * vec(*(alpha_h(tau)[0] / alpha_h(tau)[1] for tau in LEVELS))
    spread, plain = ((r.max() / r.min()).item() for r in (balanced, lam))
    theta, moved = '"alpha1 = Theta(alpha2)", adding h/alpha: range of r', after - before
    return [
        Holds("Thm. 1", "bare: cos(a_1 - r ap, a_1) = (1 - rc)/|a_1 - r ap|", bare, 1e-12),
        Refuted("Thm. 1", '"a correct direction": 1 - cos, r = c', turned, 0.1, "bare, worse than a_1 alone"),
        Holds("Thm. 1", "at x = ap cos(x, a_1) grows by (1 - c^2)/|a_1 - r ap|", correction, 1e-12),
        Holds("Fig. 3", "so at ap (c) is faster than (b) and (a), most at r = c", order, 0.0),
        Refuted("Thm. 1", '"decrease the other components": 0 to', moved, 0.1, "needs E to lean as ap"),
        Refuted("Thm. 1", theta, spread, 1000, f"{plain:.0f} without h/alpha"),
    ]


CHECKS = [check_quadrature, check_assumptions, check_corollary1, check_conclusions]
CHECKS += [check_theorem1, check_example1, check_direction]
SAMPLES = """
Samples: contrast lowers their energy off a_1 iff 0 < alpha2 < 2 <v, q>/|q|^2. Here v is their mean off a_1
without the negative term, and the term moves it by -alpha2 q. So Figure 3's ranking of samples needs a model
whose mean leans off a_1 the way ap does, and a weak lean is not enough: python -m runs.theory_extra"""


def format_line(check: Check) -> str:
    """PASS or FAIL, verdict, source, statement, number, bound, and what is true instead."""
    status = "PASS" if check.passed else "FAIL"
    start = f"{status} {type(check).__name__.lower():<8}{check.source:<10}{check.statement:<61}"
    if isinstance(check, Holds):
        return f"{start}{torch.tensor(check.errors).max().item():8.1e} <= {check.tol:.0e}"
    return f"{start}{check.violation:8.2g}  > {check.margin:<7.2g}{check.instead}"


def run_checks(checks: Iterable[Callable[[int], list[Check]]], seed: int) -> int:
    """Run and print all, then count them; returns the number of failures."""
    start, done = time.process_time(), []
    for check in (check for run in checks for check in run(seed)):
        print(format_line(check), flush=True)
        done.append(check)
    failed, refuted = sum(not c.passed for c in done), sum(isinstance(c, Refuted) for c in done)
    print(f"\n{len(done)} lines, {failed} failed; {len(done) - refuted} hold, {refuted} refute a sentence")
    print(f"seed {seed}, float64, {time.process_time() - start:.1f} s of one CPU core")
    return failed


def main(cfg: Config) -> int:
    """Run and print everything; returns the number of failures."""
    failures = run_checks(CHECKS, cfg.seed)
    print(SAMPLES)
    return failures


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are tiny
    raise SystemExit(cli(main, Config, __doc__) > 0)
