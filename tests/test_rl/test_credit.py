"""The golden vector and the invariants of the credit strategies."""

import pytest
import torch

from farspan.lm.rl.credit import delta, peaks, scaled, threshold, top, weights
from farspan.lm.rl.spec import CreditSpec

WAAD = torch.tensor([[6, 2, 1.5, 7, 3, 2, 1.8, 1.7, 5, 2.5]])
FAI = torch.tensor([[0.10, 0.50, 0.05, 0.20, 0.60, 0.40, 0.02, 0.01, 0.30, 0.03]])
ALL = torch.ones(1, 10, dtype=torch.bool)
ONES = torch.ones(1, 10, dtype=torch.int32)
STRATEGIES = ("local", "anchor", "coupled")


def golden(**options):
    return weights(CreditSpec(**options), ALL, waad=WAAD, fai=FAI, fai_count=ONES)


def members(chosen):
    return chosen[0].nonzero()[:, 0].tolist()


def batch(rows=6, time=40, seed=0):
    """Responses of every length in a padded batch: what `weights` takes."""
    generator = torch.Generator().manual_seed(seed)
    waad, fai = 10 * torch.rand(rows, time, generator=generator), torch.rand(rows, time, generator=generator)
    lengths = torch.tensor([0, 1, 2, 7, time - 1, time][:rows])
    places = torch.arange(time)
    mask = places < lengths[:, None]
    count = (lengths[:, None] - 3 - places).clamp(min=0) * mask
    return {"mask": mask, "waad": waad, "fai": fai, "fai_count": count}


def test_golden_vector():
    step, defined = delta(WAAD, ALL)
    assert step[0, :9].tolist() == pytest.approx([4, 0.5, 5.5, 4, 1, 0.2, 0.1, 3.3, 2.5]) and not defined[0, 9]
    assert threshold("median", WAAD, ALL).item() == 2
    assert threshold("median", step, defined).item() == 2.5
    local, anchor, coupled = (golden(strategy=name) for name in STRATEGIES)
    assert members(local.local) == [0, 2, 3, 7] and members(anchor.anchors) == [1, 4, 5, 8]
    assert members(coupled.dominated) == [1, 5] and members(coupled.intros) == [0, 2]
    assert local.gamma[0].tolist() == [1.5, 1, 1.5, 1.5, 1, 1, 1, 1.5, 1, 1]
    assert anchor.gamma[0].tolist() == [1, 1.5, 1, 1, 1.5, 1.5, 1, 1, 1.5, 1]
    assert coupled.gamma[0].tolist() == [1.25, 1.25, 1.25, 1, 1.5, 1.25, 1, 1, 1.5, 1]
    assert (coupled.gamma - 1).sum() == 2.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gamma_is_bounded_and_one_outside_the_response(strategy):
    inputs = batch()
    gamma = weights(CreditSpec(strategy=strategy), **inputs).gamma
    assert (gamma >= 1).all() and (gamma[~inputs["mask"]] == 1).all()
    assert gamma.max() <= (1.75 if strategy == "coupled" else 1.5)
    assert (gamma[:2] == 1).all(), "responses of fewer than two tokens get no credit"


@pytest.mark.parametrize("constant", [False, True])
def test_counts(constant):
    inputs = batch()
    if constant:
        inputs["waad"] = torch.full_like(inputs["waad"], 3.0)
        inputs["fai"] = torch.zeros_like(inputs["fai"])
    local, anchor = (weights(CreditSpec(strategy=name), **inputs) for name in ("local", "anchor"))
    long_enough = inputs["mask"].sum(1) >= 2
    steps = (inputs["mask"].sum(1) - 1).clamp(min=0)
    eligible = (inputs["fai_count"] > 0).sum(1) * long_enough
    assert local.local.sum(1).tolist() == torch.floor(0.4 * steps + 0.5).int().tolist()
    assert anchor.anchors.sum(1).tolist() == torch.floor(0.4 * eligible + 0.5).int().tolist()
    for made, chosen in ((local, local.local), (anchor, anchor.anchors)):
        assert (made.gamma - 1).sum(1).tolist() == pytest.approx((0.5 * chosen.sum(1)).tolist())


@pytest.mark.parametrize("seed", range(5))
def test_bonus_of_coupled_credit(seed):
    inputs = batch(seed=seed)
    once, many = (weights(CreditSpec(intro_count=kind), **inputs) for kind in ("set", "multi"))
    whole = 0.5 * once.anchors.sum(1)
    assert (many.gamma - 1).sum(1).tolist() == pytest.approx(whole.tolist(), abs=1e-5)
    assert ((once.gamma - 1).sum(1) <= whole + 1e-5).all()
    is_injective = once.dominated.sum(1) == once.intros.sum(1)
    equal = ((once.gamma - 1).sum(1) - whole).abs() < 1e-5
    assert (equal == is_injective).all()


def test_a_token_may_be_a_free_anchor_and_an_intro():
    """The terms add: 1 + b + alpha b."""
    waad = torch.tensor([[9.0, 1, 1, 1, 1, 1]])
    fai = torch.tensor([[0.9, 0.8, 0, 0, 0, 0]])
    ones = torch.ones(1, 6, dtype=torch.int32)
    made = weights(CreditSpec(), ones.bool(), waad=waad, fai=fai, fai_count=ones)
    assert made.gamma[0].tolist() == [1.75, 1.25, 1, 1, 1, 1]


def test_first_of_equal_changes_is_the_intro():
    waad = torch.tensor([[5.0, 1, 5, 1, 1, 1]])
    fai = torch.tensor([[0, 0, 0, 0.9, 0, 0.0]])
    ones = torch.ones(1, 6, dtype=torch.int32)
    made = weights(CreditSpec(top_fraction=0.2), ones.bool(), waad=waad, fai=fai, fai_count=ones)
    assert members(made.intros) == [0]


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"alpha": 0.0}, {"strategy": "anchor"}),
        ({"k": 0}, {"strategy": "anchor"}),
        ({"tau_waad": -1.0}, {"strategy": "anchor"}),
        ({"gamma_amp": 1.0}, {"strategy": "uniform"}),
        ({"tau_waad": "quantile:0.5"}, {"tau_waad": "median"}),
        ({"tau_waad": "quantile:1"}, {"tau_waad": 10.0}),
    ],
)
def test_limits(options, same):
    inputs = batch()
    assert torch.equal(weights(CreditSpec(**options), **inputs).gamma, weights(CreditSpec(**same), **inputs).gamma)


def test_everything_eligible_is_amplified():
    inputs = batch()
    gamma = weights(CreditSpec(strategy="anchor", top_fraction=1.0), **inputs).gamma
    eligible = (inputs["fai_count"] > 0) & (inputs["mask"].sum(1, keepdim=True) >= 2)
    assert torch.equal(gamma > 1, eligible)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_may_be_rescaled_and_rows_permuted(strategy):
    inputs, credit = batch(), CreditSpec(strategy=strategy)
    gamma = weights(credit, **inputs).gamma
    scaled_up = {**inputs, "waad": inputs["waad"] * 4, "fai": inputs["fai"] * 0.25}
    assert torch.equal(weights(credit, **scaled_up).gamma, gamma)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    assert torch.equal(weights(credit, **{name: value[order] for name, value in inputs.items()}).gamma, gamma[order])


@pytest.mark.parametrize("strategy", (*STRATEGIES, "entropy", "random"))
def test_what_is_outside_the_response_changes_nothing(strategy):
    inputs, credit = batch(), CreditSpec(strategy=strategy)
    more = {"entropy": inputs["fai"], "seeds": list(range(6))}
    gamma = weights(credit, **inputs, **more).gamma
    poisoned = {
        name: torch.where(inputs["mask"], value, torch.nan) if value.is_floating_point() else value
        for name, value in {**inputs, "entropy": inputs["fai"]}.items()
    }
    assert torch.equal(weights(credit, **poisoned, seeds=more["seeds"]).gamma, gamma)


def test_prompt_tokens_are_no_intros_and_the_first_token_is_not_dominated():
    """A response behind three prompt columns, whose WAAD falls most before it begins."""
    waad = torch.tensor([[0.0, 9, 0, 1, 1, 6, 1, 1]])
    fai = torch.tensor([[0.0, 0, 0, 0.9, 0.8, 0, 0.7, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]).bool()
    made = weights(CreditSpec(top_fraction=0.6), mask, waad=waad, fai=fai, fai_count=mask.int())
    assert members(made.anchors) == [3, 4, 6]
    assert not made.intros[0, :3].any() and not made.dominated[0, 3] and made.dominated[0, 6]


def test_tokens_of_tools_divide_a_response():
    """No change is defined across tokens that carry no loss."""
    mask = torch.tensor([[1, 1, 0, 1, 1]]).bool()
    _, defined = delta(torch.rand(1, 5), mask)
    assert defined[0].tolist() == [True, False, False, True, False]


def test_controls():
    inputs = batch()
    mask = inputs["mask"]
    wanted = torch.floor(0.4 * mask.sum(1) + 0.5).int() * (mask.sum(1) >= 2)
    drawn = weights(CreditSpec(strategy="random"), mask, seeds=[1, 2, 3, 4, 5, 6]).gamma
    again = weights(CreditSpec(strategy="random"), mask[4:], seeds=[5, 6]).gamma
    other = weights(CreditSpec(strategy="random"), mask[4:], seeds=[7, 8]).gamma
    assert torch.equal(drawn[4:], again) and not torch.equal(drawn[4:], other)
    entropy = weights(CreditSpec(strategy="entropy"), mask, entropy=inputs["fai"])
    for gamma in (drawn, entropy.gamma):
        assert (gamma > 1).sum(1).tolist() == wanted.tolist()
    chosen = entropy.gamma[5] > 1
    assert inputs["fai"][5][chosen].min() >= inputs["fai"][5][~chosen & mask[5]].max()


@pytest.mark.parametrize("strategy", (*STRATEGIES, "entropy"))
def test_bottom_takes_the_lowest(strategy):
    inputs = batch()
    inputs |= {"entropy": inputs["fai"]}
    highest, lowest = (weights(CreditSpec(strategy=strategy, bottom=b), **inputs) for b in (False, True))
    assert not torch.equal(highest.gamma, lowest.gamma)
    if strategy == "anchor":
        defined = inputs["fai_count"][5] > 0
        assert inputs["fai"][5][lowest.anchors[5]].max() <= inputs["fai"][5][defined & ~lowest.anchors[5]].min()


def test_sign():
    advantages, gamma = torch.tensor([2.0, -1.0, 0.0]), torch.full((3, 2), 1.5)
    assert scaled(advantages, gamma).tolist() == [[3, 3], [-1.5, -1.5], [0, 0]]
    assert scaled(advantages, gamma, "nonneg").tolist() == [[3, 3], [-1, -1], [0, 0]]
    assert scaled(advantages, gamma, "neg").tolist() == [[2, 2], [-1.5, -1.5], [0, 0]]


def test_renormalised():
    inputs = batch()
    gamma = weights(CreditSpec(renorm="mean1"), **inputs).gamma
    means = (gamma * inputs["mask"]).sum(1)[2:] / inputs["mask"].sum(1)[2:]
    assert means.tolist() == pytest.approx([1.0] * 4)


def test_switches():
    assert delta(WAAD, ALL, "drop")[0][0, :3].tolist() == [4, 0.5, 0]
    shifted = golden(strategy="local", row_shift=-1)
    assert members(shifted.local) == [1, 3, 4, 8]
    few = weights(CreditSpec(strategy="anchor", fai_min_count=2), ALL, waad=WAAD, fai=FAI, fai_count=ONES)
    assert not few.anchors.any()


def test_top_takes_the_earlier_of_equals_and_exactly_so_many():
    score = torch.zeros(1, 7)
    eligible = torch.tensor([[0, 1, 1, 1, 1, 1, 0]]).bool()
    assert members(top(score, 0.5, eligible)) == [1, 2, 3]  # floor(2.5 + 0.5)
    assert members(top(score, 0.5, eligible, bottom=True)) == [1, 2, 3]
    assert not top(score, 0.0, eligible).any() and torch.equal(top(score, 1.0, eligible), eligible)


def test_peaks():
    assert members(peaks(WAAD, ALL)) == [0, 3, 8]


def test_no_gradient_flows_to_gamma():
    inputs = batch()
    inputs["waad"].requires_grad_(), inputs["fai"].requires_grad_()
    assert not weights(CreditSpec(), **inputs).gamma.requires_grad
