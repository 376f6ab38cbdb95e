"""Centroids: one step by hand, equal on all ranks, never twice, revival, and fp32 whatever the model."""

import math

import pytest
import torch

from farspan.layers import Sequence, build
from farspan.layers.routing_centroids import DEAD_STEPS, Centroids
from farspan.parallel import ContextParallel

WIDTH, HEADS, DIM = 16, 4, 8
OPTIONS = {"clusters": 3, "window": 6, "local_heads": 2, "head_dim": DIM}


def make(**options):
    torch.manual_seed(1)
    return build("routing", width=WIDTH, heads=HEADS, **{**OPTIONS, **options}).train()


def alone(x):
    return x


def rows(batch, time, seed=2):
    torch.manual_seed(seed)
    return torch.randn(batch, time, WIDTH)


def routed(mixer, x):
    q = mixer.query(x).unflatten(-1, (-1, DIM))[:, :, 2:]
    return torch.nn.functional.layer_norm(q, (DIM,), eps=1e-6).flatten(0, 1).detach()


def buffers(mixer):
    return {name: value.clone() for name, value in mixer.centroids.named_buffers()}


def test_one_step_by_hand():
    mixer, x = make(early_steps=0, decay=0.9), rows(2, 50)
    before, q = buffers(mixer), routed(mixer, x)
    mixer(x).output.sum().backward()
    mixer.after_step(alone)
    for head in range(2):
        nearest = (q[:, head] @ before["mu"][head].t()).argmax(-1)
        for cluster in range(3):
            own = q[nearest == cluster, head]
            size = 0.9 * before["size"][head, cluster] + 0.1 * len(own)
            total = 0.9 * before["total"][head, cluster] + 0.1 * own.sum(0)
            torch.testing.assert_close(mixer.centroids.size[head, cluster], size)
            torch.testing.assert_close(mixer.centroids.total[head, cluster], total, rtol=1e-5, atol=1e-5)
            mu = math.sqrt(DIM) * total / total.norm()
            torch.testing.assert_close(mixer.centroids.mu[head, cluster], mu, rtol=1e-5, atol=1e-5)
    assert mixer.centroids.steps == 1 and mixer.centroids.new_size.eq(0).all()


def test_they_move_faster_in_the_first_steps():
    sizes = []
    for early in (0, 1):
        mixer = make(early_steps=early, decay=0.9, early_decay=0.5)
        mixer(rows(2, 50)).output.sum().backward()
        mixer.after_step(alone)
        sizes.append(mixer.centroids.size.sum(-1))
    torch.testing.assert_close(sizes[0], torch.full((2,), 0.9 * 3 + 0.1 * 100))
    torch.testing.assert_close(sizes[1], torch.full((2,), 0.5 * 3 + 0.5 * 100))


def test_a_batch_in_parts_counts_the_same():
    """Micro-batches, and ranks, whose sums are added."""
    whole, parts, x = make(), make(), rows(4, 30)
    whole(x).output.sum().backward()
    for part in x.split(1):
        parts(part).output.sum().backward()
    whole.after_step(alone)
    parts.after_step(alone)
    for name in ("mu", "size", "total"):
        torch.testing.assert_close(getattr(parts.centroids, name), getattr(whole.centroids, name))


def test_nothing_is_counted_in_evaluation_or_with_a_forward_pass_done_again():
    mixer, x = make(), rows(2, 30)
    before = buffers(mixer)
    mixer.eval()(x)
    assert all(torch.equal(before[name], value) for name, value in mixer.centroids.named_buffers())
    mixer.train()
    for reentrant in (False, True):
        mixer.centroids.new_size.zero_()
        again = x.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(lambda y: mixer(y).output, again, use_reentrant=reentrant).sum().backward()
        assert mixer.centroids.new_size.sum(-1).eq(60).all()


def test_a_step_without_tokens_does_not_move_the_forward_pass_before_it():
    mixer, x = make(), rows(2, 30)
    first = mixer(x).output
    assert torch.equal(mixer(x).output, first)  # counting changes nothing until the step
    mixer.after_step(alone)
    assert not torch.equal(mixer(x).output, first)


def test_dead_centroids_take_a_query_and_the_mean_size():
    """A centroid that no query is nearest to: the opposite of all of them."""
    mixer = make(early_steps=0, decay=0.5)
    with torch.no_grad():
        mixer.query.bias = torch.nn.Parameter(torch.zeros(HEADS * DIM))
        mixer.query.bias.view(HEADS, DIM)[:, 0] = 50.0
    direction = routed(mixer, rows(1, 10)).mean(0)
    mixer.centroids.mu[:, 0], mixer.centroids.mu[:, 2] = direction, 0.9 * direction
    mixer.centroids.mu[:, 1] = -direction
    mixer.centroids.total.copy_(mixer.centroids.mu)
    revived = None
    for step in range(DEAD_STEPS + 20):
        x = rows(1, 40, seed=step)
        mixer(x).output.sum().backward()
        q, idle = routed(mixer, x), mixer.centroids.idle.clone()
        mixer.after_step(alone)
        if (idle[:, 1] == DEAD_STEPS - 1).all():
            revived = step
            break
    assert revived is not None and revived >= DEAD_STEPS - 1
    for head in range(2):
        assert (q[:, head] - mixer.centroids.mu[head, 1]).norm(dim=-1).min() == 0
        torch.testing.assert_close(
            mixer.centroids.total[head, 1], mixer.centroids.size[head, 1] * mixer.centroids.mu[head, 1]
        )
    assert mixer.centroids.idle[:, 1].eq(0).all()


def test_a_centroid_without_tokens_stays_where_it_is():
    """The ratio of the released code would send it to 8e5 times its length instead."""
    centroids = Centroids(1, 4, DIM, 0.999, 0.999, 0)
    before = centroids.mu.clone()
    centroids.new_size[0, :2] = 10_000.0
    centroids.new_total[0, :2] = torch.randn(2, DIM) * 5000
    for _ in range(20):
        size, total = centroids.new_size.clone(), centroids.new_total.clone()
        centroids.update(alone)
        centroids.new_size.copy_(size)
        centroids.new_total.copy_(total)
    torch.testing.assert_close(centroids.mu[0, 2:], before[0, 2:])
    torch.testing.assert_close(centroids.mu.norm(dim=-1), torch.full((1, 4), math.sqrt(DIM)))


def test_they_find_the_means_of_what_is_nearest_to_them():
    """Queries in four tight clusters: every centroid ends as the direction of the mean of its own, and none is dead."""
    torch.manual_seed(0)
    centres = torch.nn.functional.layer_norm(torch.randn(4, DIM), (DIM,))
    centroids = Centroids(1, 4, DIM, 0.9, 0.9, 0)
    for _ in range(400):
        q = centres[torch.randint(0, 4, (200,))] + 0.05 * torch.randn(200, DIM)
        q = torch.nn.functional.layer_norm(q, (DIM,))[:, None]
        centroids.count(q, centroids.nearest(centroids.scores(q))[..., 0], [0])
        centroids.update(alone)
    own = centroids.nearest(centroids.scores(centres[:, None]))[:, 0, 0]
    for cluster in own.unique():
        mean = centres[own == cluster].mean(0)
        cosine = torch.nn.functional.cosine_similarity(mean, centroids.mu[0, cluster], dim=0)
        assert cosine > 0.99
    assert centroids.idle.max() < DEAD_STEPS


def test_commitment_pulls_queries_to_their_centroids():
    mixer, x = make(commitment=0.3), rows(2, 20)
    mixed = mixer(x)
    q = routed(mixer, x).requires_grad_()
    nearest = torch.einsum("thd,hcd->thc", q.detach(), mixer.centroids.mu).argmax(-1)
    own = mixer.centroids.mu[torch.arange(2), nearest]
    loss = 0.3 * (q - own).square().mean()
    torch.testing.assert_close(mixed.loss, loss)
    gradient = torch.autograd.grad(loss, q)[0]
    torch.testing.assert_close(gradient, 2 * 0.3 * (q - own).detach() / q.numel())
    assert mixer.eval()(x).loss is None
    assert make(commitment=0.0)(x).loss is None


def test_they_stay_fp32_in_a_half_precision_model():
    mixer = make().bfloat16()
    assert all(value.dtype == torch.float32 for value in mixer.centroids.buffers())
    assert mixer.query.weight.dtype == torch.bfloat16
    mixed = mixer(rows(1, 20).bfloat16())
    assert mixed.output.dtype == torch.bfloat16 and mixed.loss.dtype == torch.float32
    assert all(value.dtype == torch.float64 for value in mixer.double().centroids.buffers())


def test_they_are_saved_and_are_no_parameters():
    mixer = make()
    assert not any("centroids" in name for name, _ in mixer.named_parameters())
    saved = {name for name in mixer.state_dict() if "centroids" in name}
    assert saved == {f"centroids.{name}" for name, _ in mixer.centroids.named_buffers()}
    mixer(rows(2, 30)).output.sum().backward()
    mixer.after_step(alone)
    other = make()
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other.eval()(rows(1, 20)).output, mixer.eval()(rows(1, 20)).output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reloaded_model_has_them_bit_for_bit_and_nothing_counted(dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    from farspan import DecoderConfig, DecoderForCausalLM

    fields = {"vocab_size": 61, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1}
    pattern = [{"mixer": "routing", **OPTIONS}]
    model = DecoderForCausalLM(DecoderConfig(**fields, num_attention_heads=HEADS, mixer_pattern=pattern))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    pairs = zip(model.mixers()[0].centroids.buffers(), loaded.mixers()[0].centroids.buffers(), strict=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_balance_is_reported():
    mixer = make()
    metrics = mixer(rows(2, 60)).metrics
    assert 0 < metrics["routing_entropy"] <= 1
    assert metrics["routing_smallest"] <= 1 <= metrics["routing_largest"] <= 3
    even = mixer.centroids.balance(torch.arange(60)[:, None].expand(-1, 2) % 3)
    assert all(float(value) == pytest.approx(1.0) for value in even.values())
    streaming = make(membership="streaming")(rows(2, 60)).metrics
    assert 0 <= streaming["routing_unrouted"] < 1 and 0 <= streaming["routing_several"] < 1


def sharded_step(mesh, lengths):
    """Centroids and commitment loss after one step on a shard, against the whole row."""
    results, tokens = [], sum(lengths)
    torch.manual_seed(5)
    x, weight = torch.randn(1, tokens, WIDTH, dtype=torch.float64), torch.randn(1, tokens, WIDTH, dtype=torch.float64)

    def add(value):
        value = value.clone()
        torch.distributed.all_reduce(value, group=mesh.context.group)
        return value

    whole = make(commitment=0.5).double()
    mixed = whole(x, Sequence.packed(lengths))
    loss = (mixed.output * weight).sum() + mesh.context.size * mixed.loss
    expected = [mixed.loss, *torch.autograd.grad(loss, list(whole.parameters()))]
    whole.after_step(alone)
    for layout in ("contiguous", "zigzag") if mesh.ring.size > 1 else ("contiguous",):
        mixer = make(commitment=0.5).double()
        shard = ContextParallel(mesh, layout).shard(lengths)
        mixed = mixer(shard.take(x), Sequence.sharded(shard))
        loss = (mixed.output * shard.take(weight)).sum() + mixed.loss
        found = [mixed.loss, *(add(g) for g in torch.autograd.grad(loss, list(mixer.parameters())))]
        mixer.after_step(add)
        state = [getattr(m.centroids, name) for m in (mixer, whole) for name in ("mu", "size", "total", "idle")]
        pairs = [*zip(found, expected, strict=True), *zip(state[:4], state[4:], strict=True)]
        results.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
    return results


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (4, 1), (1, 4), (2, 2)], ids=str)
@pytest.mark.parametrize("lengths", [(53,), (1, 2, 9, 16, 17, 1, 30)], ids=str)
def test_loss_and_centroids_of_a_shard_equal_those_of_the_whole(run_distributed, sizes, lengths):
    for errors in run_distributed(sharded_step, sizes, lengths):
        assert all(error < 1e-6 for error in errors), errors  # the loss is fp32


def revive(mesh):
    """Every rank has samples of its own; all have to take the same one."""
    torch.manual_seed(1)
    centroids = Centroids(2, 3, DIM, 0.9, 0.9, 0)
    torch.manual_seed(100 + mesh.context.rank)
    centroids.idle[:, 1] = DEAD_STEPS
    centroids.size[:, 1] = 0.0
    centroids.new_size.copy_(torch.tensor([10.0, 0.0, 10.0]))
    centroids.new_total.copy_(torch.randn(2, 3, DIM))
    if mesh.context.rank:  # the first rank has none: its heads are elsewhere
        centroids.sample.copy_(torch.nn.functional.layer_norm(torch.randn(2, 3, DIM), (DIM,)))

    def add(value):
        torch.distributed.all_reduce(value, group=mesh.context.group)
        return value

    own = centroids.sample.clone()
    centroids.update(add)
    return centroids.mu.clone(), own


def test_every_rank_revives_with_the_same_query(run_distributed):
    results = run_distributed(revive, (4, 1))
    mus, samples = [mu for mu, _ in results], [own for _, own in results]
    assert all(torch.equal(mu, mus[0]) for mu in mus)
    for head in range(2):
        assert any(torch.equal(mus[0][head, 1], own[head, 1]) for own in samples[1:])
