"""Scores against direct computations on tiny models, and densities from scores."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.allocation import SCORE_SCHEMES, compute_scores, densities_from_scores


class Net(nn.Module):
    """Convolution, batch norm, dropout, two linear layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(4 * 4, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.fc2(F.relu(self.fc1(self.drop(x.flatten(1)))))


NAMES = ["conv", "fc1", "fc2"]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 2, 4, 4, generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(2)
    ]


def weights_of(model: nn.Module) -> list[Tensor]:
    return [model.get_submodule(name).weight for name in NAMES]


def arguments(scheme: str, batches) -> dict[str, object]:
    return {"batches": batches, "sparsity": 0.8, "rounds": 5} if scheme == "synflow" else {"batches": batches}


# -- each score by hand -----------------------------------------------------------------------------------------------


def test_magnitude(net):
    got = compute_scores(net, NAMES, "magnitude")
    for name, w in zip(NAMES, weights_of(net)):
        assert torch.equal(got[name], w.detach().abs()) and not got[name].requires_grad


def test_lamp_by_loop(net):
    got = compute_scores(net, NAMES, "lamp")
    for name, w in zip(NAMES, weights_of(net)):
        flat = [float(v) ** 2 for v in w.detach().double().flatten()]
        expected = [a / math.fsum(b for b in flat if b >= a) for a in flat]
        torch.testing.assert_close(got[name], torch.tensor(expected).view(w.shape), rtol=1e-5, atol=0)
        assert float(got[name].max()) == 1.0


def test_lamp_of_zeros_is_finite():
    layer = nn.Linear(3, 3, bias=False)
    nn.init.zeros_(layer.weight)
    assert compute_scores(layer, [""], "lamp")[""].tolist() == [[0.0] * 3] * 3


def test_snip_is_weight_times_gradient(net, batches):
    got = compute_scores(net, NAMES, "snip", batches=batches[:1])
    twin = copy.deepcopy(net).train()
    x, y = batches[0]
    F.cross_entropy(twin(x), y).backward()
    for name, w in zip(NAMES, weights_of(twin)):
        torch.testing.assert_close(got[name], (w * w.grad).abs().detach())


def test_snip_is_the_gradient_of_a_mask_of_ones(batches):
    torch.manual_seed(0)
    linear = nn.Linear(32, 3)
    x, y = batches[0][0].flatten(1), batches[0][1]
    mask = torch.ones(3, 32, requires_grad=True)
    loss = F.cross_entropy(F.linear(x, linear.weight * mask, linear.bias), y)
    (expected,) = torch.autograd.grad(loss, mask)
    torch.testing.assert_close(compute_scores(linear, [""], "snip", batches=[(x, y)])[""], expected.abs())


def test_default_loss_takes_logits_and_log_probabilities(net, batches):
    """The published code applies nll_loss, which is silently wrong for logits."""
    log_probabilities = copy.deepcopy(net)
    log_probabilities.fc2 = nn.Sequential(net.fc2, nn.LogSoftmax(-1))
    names = ["conv", "fc1"]
    one = compute_scores(net, names, "snip", batches=batches)
    two = compute_scores(log_probabilities, names, "snip", batches=batches)
    three = compute_scores(log_probabilities, names, "snip", batches=batches, loss_fn=F.nll_loss)
    for name in names:
        torch.testing.assert_close(one[name], two[name])
        torch.testing.assert_close(one[name], three[name])


def test_grasp_by_hessian_vector_product(net, batches):
    net.double()
    batches = [(x.double(), y) for x, y in batches]
    got = compute_scores(net, NAMES, "grasp", batches=batches)
    twin = copy.deepcopy(net).train()
    params = [p.detach() for p in weights_of(twin)]
    keys = [f"{name}.weight" for name in NAMES]

    def loss(*values: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x, y in batches:
            buffers = {name: b.clone() for name, b in twin.named_buffers()}
            out = torch.func.functional_call(twin, {**dict(zip(keys, values)), **buffers}, (x,))
            total = total + F.cross_entropy(out / 200.0, y)
        return total

    gradient = torch.autograd.functional.jacobian(loss, tuple(params))
    _, products = torch.autograd.functional.hvp(loss, tuple(params), gradient)
    for name, w, product in zip(NAMES, params, products):
        torch.testing.assert_close(got[name], w * product, rtol=1e-8, atol=1e-16)
        assert float(product.abs().max()) > 0


def test_grasp_of_a_quadratic():
    """L = w'Aw / 2 has g = Aw and Hg = AAw; the output is the loss, so the temperature scales it by 1/T."""
    a = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            w = self.layer.weight[0]
            return x * (w @ a @ w) / 2

    model = Quadratic()
    data = [(torch.ones((), dtype=torch.float64), 0)]
    got = compute_scores(model, ["layer"], "grasp", batches=data, loss_fn=lambda out, _: out, temperature=2.0)
    w = model.layer.weight.detach()[0]
    torch.testing.assert_close(got["layer"][0], w * (a @ a @ w) / 4)


def test_grasp_through_attention():
    """The fused attention kernels have no second derivative."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 8)
            self.v = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            return self.v(F.scaled_dot_product_attention(q, x, x)).mean(1)

    data = [(torch.randn(2, 5, 8), torch.tensor([0, 2]))]
    got = compute_scores(Attention(), ["q", "v"], "grasp", batches=data)
    assert all(float(score.abs().sum()) > 0 for score in got.values())


def test_synflow_conserves_the_flow():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 16, bias=False),
        nn.ReLU(),
        nn.Linear(16, 16, bias=False),
        nn.ReLU(),
        nn.Linear(16, 3, bias=False),
    )
    names = ["0", "2", "4"]
    got = compute_scores(model, names, "synflow", example_input=torch.randn(7, 5), sparsity=0.5, rounds=1)
    flow = torch.ones(1, 5, dtype=torch.float64)
    for name in names:
        flow = flow @ model.get_submodule(name).weight.detach().double().abs().T
        assert got[name].dtype == torch.float64
    for score in got.values():
        assert float(score.sum()) == pytest.approx(float(flow.sum()))


def test_synflow_by_loop(net):
    """The same with plain masks and a full sort in each round."""
    sparsity, rounds = 0.8, 7
    with torch.no_grad():
        net.norm.running_mean.fill_(-0.5)
    got = compute_scores(net, NAMES, "synflow", example_input=torch.randn(1, 2, 4, 4), sparsity=sparsity, rounds=rounds)
    twin = copy.deepcopy(net).double().eval()
    with torch.no_grad():
        for t in twin.state_dict().values():
            if t.is_floating_point():
                t.abs_()
    params = weights_of(twin)
    total = sum(p.numel() for p in params)
    for k in range(rounds):
        twin.zero_grad()
        twin(torch.ones(1, 2, 4, 4, dtype=torch.float64)).sum().backward()
        score = torch.cat([(p.grad * p).abs().flatten() for p in params]).detach()
        if k == rounds - 1:
            break
        keep = round(total * (1 - sparsity) ** ((k + 1) / rounds))
        kept = torch.zeros(total, dtype=torch.float64)
        kept[score.argsort(descending=True)[:keep]] = 1
        for p, m in zip(params, kept.split([p.numel() for p in params])):
            p.data *= m.view(p.shape)
    torch.testing.assert_close(torch.cat([s.flatten() for s in got.values()]), score)


def test_synflow_without_collapse_at_extreme_sparsity():
    """Its rounds keep every layer alive where magnitude drops one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, out, bias=False) for out in (64, 64, 4)))
    with torch.no_grad():
        model[1].weight *= 1e-3
    names = ["0", "1", "2"]
    scores = compute_scores(model, names, "synflow", example_input=torch.zeros(1, 64), sparsity=0.98)
    densities = densities_from_scores(scores, 0.98)
    assert densities["1"] * 64 * 64 > 5
    magnitude = densities_from_scores(compute_scores(model, names, "magnitude"), 0.98)
    assert magnitude["1"] * 64 * 64 == 1.0  # the guard


def test_synflow_names_the_trouble():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False))
    with pytest.raises(ValueError, match="use another allocation"):
        compute_scores(model, ["0"], "synflow", example_input=torch.zeros(1, 4), sparsity=0.5)


# -- the model stays as it is -----------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[object, ...]:
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
    return state, grads, flags, torch.get_rng_state()


@pytest.mark.parametrize("scheme", SCORE_SCHEMES)
@pytest.mark.parametrize("training", [True, False])
def test_model_is_untouched(scheme, training, batches):
    torch.manual_seed(0)
    model = Net(dropout=0.5)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    model.train(training)
    model.norm.eval()
    model.fc1.weight.requires_grad_(False)
    before = snapshot(model)
    got = compute_scores(model, NAMES, scheme, **arguments(scheme, batches))
    after = snapshot(model)
    assert all(torch.equal(after[0][name], t) for name, t in before[0].items())
    assert all(a is b or torch.equal(a, b) for a, b in zip(before[1], after[1]))
    assert before[2] == after[2] and torch.equal(before[3], after[3])
    assert [score.shape for score in got.values()] == [w.shape for w in weights_of(model)]
    # Scores depend on the seed alone, in whatever mode the model is and wherever the random state stands.
    torch.manual_seed(99)
    model.train(not training)
    with torch.no_grad():
        again = compute_scores(model, NAMES, scheme, **arguments(scheme, batches))
    assert all(torch.equal(got[name], again[name]) for name in NAMES)


def test_shuffling_loader_leaves_the_random_state(net, batches):
    x, y = (torch.cat(parts) for parts in zip(*batches))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4, shuffle=True)
    before = torch.get_rng_state()
    one = compute_scores(net, NAMES, "snip", batches=loader)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one["fc1"], compute_scores(net, NAMES, "snip", batches=loader)["fc1"])


def test_reinit_scores_xavier_weights(net):
    got = compute_scores(net, NAMES, "magnitude", reinit=True, seed=3)
    torch.manual_seed(3)
    expected = nn.init.xavier_normal_(torch.empty(4, 2, 3, 3)).abs()
    assert torch.equal(got["conv"], expected)


def test_inputs_as_tuples_and_dicts(batches):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 3)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": self.fc(a + b)}

    x, y = batches[0][0].flatten(1), batches[0][1]

    def loss(out: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(out["logits"], y)

    torch.manual_seed(0)
    model = Two()
    one = compute_scores(model, ["fc"], "snip", batches=[((x, x), y)], loss_fn=loss)["fc"]
    two = compute_scores(model, ["fc"], "snip", batches=[({"a": x, "b": x}, y)], loss_fn=loss)["fc"]
    assert torch.equal(one, two) and float(one.sum()) > 0
    flow = compute_scores(model, ["fc"], "synflow", example_input={"a": x, "b": x}, sparsity=0.5, rounds=1)["fc"]
    torch.testing.assert_close(flow, 2 * model.fc.weight.detach().double().abs())


def test_missing_arguments_are_named(net, batches):
    for scheme in ("snip", "grasp"):
        with pytest.raises(ValueError, match=f"^batches: {scheme}"):
            compute_scores(net, NAMES, scheme)
        with pytest.raises(ValueError, match=r"^loss_fn: .*float32"):
            compute_scores(net, NAMES, scheme, batches=[(batches[0][0], torch.rand(6, 3))])
    with pytest.raises(ValueError, match=r"^example_input: synflow"):
        compute_scores(net, NAMES, "synflow", sparsity=0.5)
    with pytest.raises(ValueError, match=r"^sparsity: synflow"):
        compute_scores(net, NAMES, "synflow", batches=batches)
    with pytest.raises(ValueError, match="at least one"):
        compute_scores(net, NAMES, "snip", batches=iter(()))
    with pytest.raises(ValueError, match=r"\(x, y\) pairs, got Tensor"):
        compute_scores(net, NAMES, "snip", batches=[batches[0][0]])
    with pytest.raises(ValueError, match="snip, grasp, synflow, lamp, magnitude, got 'erk'"):
        compute_scores(net, NAMES, "erk")
    for names in (["conv", "fc9"], ["drop"]):
        with pytest.raises(ValueError, match=repr(names[-1])):
            compute_scores(net, names, "magnitude")
    with pytest.raises(ValueError, match="at least one layer"):
        compute_scores(net, [], "magnitude")


# -- densities from scores --------------------------------------------------------------------------------------------


def test_exact_global_top_k():
    torch.manual_seed(0)
    scores = {"a": torch.randn(30, 20), "b": 2 * torch.randn(10, 5, 3, 3), "c": torch.randn(7, 7)}
    flat = torch.cat([s.flatten() for s in scores.values()])
    for sparsity in (0.0, 0.5, 0.9, 0.93):
        keep = round((1 - sparsity) * flat.numel())
        threshold = flat.sort(descending=True).values[keep - 1]
        got = densities_from_scores(scores, sparsity, min_elements=0)
        for name, score in scores.items():
            assert got[name] * score.numel() == pytest.approx(int((score >= threshold).sum()))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0, 0.99), st.integers(0, 100), st.booleans())
def test_totals_hold_with_ties(sizes, sparsity, seed, priced):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"l{i}": torch.randint(4, (n,), generator=generator).float() for i, n in enumerate(sizes)}
    costs = {name: float(s.numel() * (i + 1)) for i, (name, s) in enumerate(scores.items())} if priced else None
    got = densities_from_scores(scores, sparsity, costs)
    cost = costs or {name: float(s.numel()) for name, s in scores.items()}
    unit = {name: cost[name] / s.numel() for name, s in scores.items()}
    budget = (1 - sparsity) * sum(cost.values())
    budget = budget if priced else max(round(budget), 1)
    spent = sum(got[name] * cost[name] for name in scores)
    assert all(0 < d <= 1 for d in got.values())
    assert all(d * scores[name].numel() >= 1 - 1e-9 for name, d in got.items())
    # One weight per layer may already be more than the budget; then the minimum wins.
    assert spent == pytest.approx(max(budget, sum(unit.values())), rel=1e-9) or (
        spent > budget and all(d * scores[name].numel() <= 1 + 1e-9 for name, d in got.items())
    )


def test_ties_are_shared_in_proportion():
    scores = {"a": torch.ones(30), "b": torch.ones(10)}
    assert densities_from_scores(scores, 0.75) == {"a": 0.25, "b": 0.25}
    scores = {"a": torch.cat([torch.ones(6), torch.full((4,), 2.0)]), "b": torch.ones(10)}
    assert densities_from_scores(scores, 0.4) == {"a": 0.7, "b": 0.5}  # 12 kept: 4 above, half of 16 ties


def test_cost_budget():
    """The threshold falls until the costs of what is above it meet the budget."""
    scores = {"cheap": torch.arange(0.0, 20, 2), "dear": torch.arange(1.0, 21, 2)}
    got = densities_from_scores(scores, 0.6, {"cheap": 10.0, "dear": 40.0})  # budget 20: 1 and 4 per weight
    assert got == {"cheap": pytest.approx(0.4), "dear": pytest.approx(0.4)}
    with pytest.raises(ValueError, match=r"positive cost for \['dear'\]"):
        densities_from_scores(scores, 0.6, {"cheap": 10.0})


def test_collapse_guard_takes_blocks():
    scores = {"weak": torch.zeros(64), "strong": torch.rand(640) + 1}
    got = densities_from_scores(scores, 0.9, min_elements=16)
    assert got["weak"] == 16 / 64
    assert got["strong"] * 640 + 16 == pytest.approx(round(0.1 * 704))
    got = densities_from_scores(scores, 0.9, min_elements={"weak": 4, "strong": 4})
    assert got["weak"] == 4 / 64
    assert densities_from_scores(scores, 0.99, min_elements=1000) == {"weak": 1.0, "strong": 1.0}


def test_densities_errors():
    with pytest.raises(ValueError, match=r"infinity in \['a'\]"):
        densities_from_scores({"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(2)}, 0.5)
    with pytest.raises(ValueError, match="at least one layer"):
        densities_from_scores({}, 0.5)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        densities_from_scores({"a": torch.ones(2)}, 1.0)
