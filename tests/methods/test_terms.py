"""Each loss term against its published formula, written pair by pair, in fp64 with gradients."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_methods import VOCAB, B, D, P, losses_of, make_batch, make_features, make_method

from medfast.config import TrainConfig
from medfast.data import read_split
from medfast.data.loader import Loader
from medfast.data.tokens import NOT_PREDICTED
from medfast.errors import UsageError
from medfast.methods import METHODS, method_class
from medfast.methods.declip import simsiam_loss
from medfast.models import PRESETS
from medfast.models.pair import build_model
from medfast.parts import new_method

# Design of the study: the methods, their terms and the published weights.
WEIGHTS = {
    "clip": {"clip": 1.0},  # Radford 2021
    "lit": {"clip": 1.0},  # Zhai 2022
    "slip": {"clip": 1.0, "simclr": 1.0},  # Mu 2022: ssl_scale 1
    # Li 2022, section 4: alpha = beta = gamma = 0.2, CLIP's share is what is left
    "declip": {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "multi_view": 0.2, "nearest": 0.2},
    "cyclip": {"clip": 1.0, "cross_modal": 0.25, "in_modal": 0.25},  # Goel 2022, section 3
    "local": {"clip": 1.0, "local": 1.0},  # Huang 2021: both weigh the same
    "filip": {"filip": 1.0},  # Yao 2022
    "sparc": {"clip": 0.5, "fine": 1.0},  # Bica 2024
}
TERMS = [(key, term) for key, terms in WEIGHTS.items() for term in terms]
# What is brought to fp32 before it is normalised or summed, whatever the towers' dtype.
IN_FP32 = {"filip", "simclr", "simsiam", "mlm"}


def info_nce(image, text, scale, groups=None):
    """Both directions; equal groups are positives of one another, with equal shares."""
    groups = list(range(len(image))) if groups is None else groups.tolist()
    loss = 0.0
    for queries, keys in ((image, text), (text, image)):
        for i, query in enumerate(queries):
            weights = torch.stack([(scale * query @ key).exp() for key in keys])
            same = [j for j, group in enumerate(groups) if group == groups[i]]
            costs = [-(weights[j] / weights.sum()).log() for j in same]
            loss = loss + sum(costs) / len(costs) / len(image) / 2
    return loss


def row_loss(scores):
    """Cross-entropy of rows with the diagonal."""
    rows = range(len(scores))
    return sum(-(scores[i].exp()[i] / scores[i].exp().sum()).log() for i in rows) / len(scores)


def batch_norm(x, weight=1.0, bias=0.0):
    variance = ((x - x.mean(0)) ** 2).mean(0)
    return (x - x.mean(0)) / (variance + 1e-5) ** 0.5 * weight + bias


def mlp(x, p, name, layers, last_norm=False):
    """Layers of linear, batch norm, ReLU; parameters `p` by their names within `name`."""
    for k in range(layers - 1):
        x = x @ p[f"{name}.{3 * k}.weight"].T
        x = batch_norm(x, p[f"{name}.{3 * k + 1}.weight"], p[f"{name}.{3 * k + 1}.bias"])
        x = x * (x > 0)
    x = x @ p[f"{name}.{3 * layers - 3}.weight"].T
    return batch_norm(x) if last_norm else x + p[f"{name}.{3 * layers - 3}.bias"]


def clip(f, batch, method):
    return info_nce(f.image, f.text, f.logit_scale)


def simclr(f, batch, method):
    """Chen 2020, equation 1, at the temperature 0.1 of SLIP."""
    p = dict(method.named_parameters())
    views = [mlp(f.extra[name], p, "head", 3) for name in ("first view", "second view")]
    z = torch.cat([view / view.norm(dim=1, keepdim=True) for view in views])
    loss = 0.0
    for i in range(2 * B):
        weights = [(z[i] @ z[k] / 0.1).exp() for k in range(2 * B) if k != i]
        loss = loss - ((z[i] @ z[(i + B) % (2 * B)] / 0.1).exp() / sum(weights)).log()
    return loss / (2 * B)


def simsiam(f, batch, method):
    """Chen and He 2021, algorithm 1: D(p1, z2) / 2 + D(p2, z1) / 2, z without gradient."""
    p = dict(method.named_parameters())
    names = ("pooled", "pooled view")
    z = [mlp(f.extra[name], p, "simsiam.projector", 3, last_norm=True) for name in names]
    h = [mlp(x, p, "simsiam.predictor", 2) for x in z]
    cosines = [
        a @ b.detach() / a.norm() / b.detach().norm()
        for own, other in ((h[0], z[1]), (h[1], z[0]))
        for a, b in zip(own, other, strict=True)
    ]
    return -sum(cosines) / len(cosines)


def mlm(f, batch, method):
    p = dict(method.named_parameters())
    name = "masked_language.layers"
    x = f.extra["masked"] @ p[f"{name}.0.weight"].T + p[f"{name}.0.bias"]
    x = x * (1 + torch.erf(x / 2**0.5)) / 2
    centred = x - x.mean(1, keepdim=True)
    x = centred / ((centred**2).mean(1, keepdim=True) + 1e-5) ** 0.5
    x = x * p[f"{name}.2.weight"] + p[f"{name}.2.bias"]
    logits = x @ p[f"{name}.3.weight"].T + p[f"{name}.3.bias"]
    labels = [label for row in batch.masked.labels.tolist() for label in row if label >= 0]
    costs = [
        -(row.exp()[label] / row.exp().sum()).log()
        for row, label in zip(logits, labels, strict=True)
    ]
    return sum(costs) / len(costs)


def multi_view(f, batch, method):
    view, words = f.extra["image view"], f.extra["text view"]
    pairs = ((f.image, words), (view, f.text), (view, words))
    return sum(info_nce(*pair, f.logit_scale) for pair in pairs) / 3


def nearest(f, batch, method):
    found = [
        max(BANK, key=lambda entry, query=query: (query @ entry).item())
        for query in f.text.detach()
    ]
    return info_nce(f.image, torch.stack(found), f.logit_scale)


def cross_modal(f, batch, method):
    x, y = f.image, f.text
    pairs = itertools.product(range(B), repeat=2)
    return B * sum((x[i] @ y[j] - x[j] @ y[i]) ** 2 for i, j in pairs) / B**2


def in_modal(f, batch, method):
    x, y = f.image, f.text
    pairs = itertools.product(range(B), repeat=2)
    return B * sum((x[i] @ x[j] - y[i] @ y[j]) ** 2 for i, j in pairs) / B**2


def words_of(f, batch):
    return [tokens[mask] for tokens, mask in zip(f.tokens, batch.word_mask, strict=True)]


def local(f, batch, method):
    """Huang 2021, equations 2 to 7, with temperatures 4, 5 and 10."""
    rows = []
    for words in words_of(f, batch):
        row = []
        for patches in f.patches:
            similarity = (words @ patches.T).softmax(0)
            attention = (4 * similarity).softmax(1)
            contexts = attention @ patches
            cosines = F.cosine_similarity(contexts, words, dim=1)
            row.append(10 * (5 * cosines).exp().sum().log())
        rows.append(torch.stack(row))
    scores = torch.stack(rows)
    return (row_loss(scores) + row_loss(scores.T)) / 2


def filip(f, batch, method):
    """Yao 2022, equations 4 to 6, without padding."""
    words = [w / w.norm(dim=1, keepdim=True) for w in words_of(f, batch)]
    patches = [v / v.norm(dim=1, keepdim=True) for v in f.patches]
    to_text = torch.stack(
        [torch.stack([(v @ w.T).max(1).values.mean() for w in words]) for v in patches]
    )
    to_image = torch.stack(
        [torch.stack([(w @ v.T).max(1).values.mean() for v in patches]) for w in words]
    )
    return (row_loss(f.logit_scale * to_text) + row_loss(f.logit_scale * to_image)) / 2


def fine(f, batch, method):
    """Bica 2024, section 3.2: words and what they see, within one caption."""
    loss = 0.0
    for words, patches in zip(words_of(f, batch), f.patches, strict=True):
        groups = []
        for word in words:
            s = patches @ word
            s = (s - s.min()) / (s.max() - s.min())
            s = torch.where(s < 1 / P, torch.zeros_like(s), s)
            groups.append((s / s.sum()) @ patches)
        unit = [F.normalize(torch.stack(list(x)), dim=1) for x in (groups, words)]
        scores = f.logit_scale * unit[0] @ unit[1].T
        loss = loss + (row_loss(scores) + row_loss(scores.T)) / 2
    return loss / len(f.patches)


BANK = F.normalize(torch.randn(11, D, generator=torch.Generator().manual_seed(5)), dim=1)
BANK = BANK.double()  # what fp32 holds


def _double_method(key, impl, **settings):
    method = make_method(key, impl, **settings).double().train()
    if key == "declip":
        method.bank.float().push(BANK)
    return method


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(("key", "term"), TERMS)
def test_term_is_its_published_formula_in_value_and_gradients(key, term, impl):
    batch, features = make_batch(), make_features(key, torch.float64)
    method = _double_method(key, impl)
    leaves = {**features.parts(), "scale": features.logit_scale, **dict(method.named_parameters())}
    found = losses_of(method, features, batch)[term]
    want = globals()[term](features, batch, method)
    # A product of fp32 is as exact as that.
    close = {"rtol": 1e-4, "atol": 1e-5} if term in IN_FP32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.double(), want, **close)
    grads = [
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for loss in (found, want)
    ]
    used = set()
    for name, got, expected in zip(leaves, *grads, strict=True):
        assert (got is None) == (expected is None), name
        if got is not None:
            used.add(name)
            torch.testing.assert_close(
                got, expected, **close, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert used


@pytest.mark.parametrize("key", METHODS)
def test_weights_are_the_published_ones(key):
    assert method_class(key).terms == WEIGHTS[key]
    assert method_class(key)().weights == WEIGHTS[key]


def test_no_gradient_reaches_a_projection_but_through_its_own_prediction():
    torch.manual_seed(0)
    projected, predicted = ([torch.randn(B, D, requires_grad=True) for _ in "ab"] for _ in "ab")
    simsiam_loss(tuple(projected), tuple(predicted)).sum().backward()
    assert [z.grad for z in projected] == [None, None]
    assert all(p.grad.any() for p in predicted)


def test_simsiam_of_perfect_predictions_is_minus_one():
    z = torch.randn(B, D)
    assert simsiam_loss((z, 3 * z), (2 * z, z)).tolist() == pytest.approx([-1] * B)


def test_batches_without_masked_tokens_cost_nothing():
    logits = torch.empty(0, VOCAB, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64)
    loss = method_class("declip")().mean(F.cross_entropy(logits, labels, reduction="none"))
    loss.backward()
    assert loss == 0


def test_neighbours_are_not_trained_through():
    features = make_features("declip", torch.float64)
    method = _double_method("declip", "reference")
    loss = losses_of(method, features, make_batch())["nearest"]
    inputs = (features.text, features.image, features.logit_scale)
    d_text, d_image, d_scale = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert d_text is None
    assert d_image.any()
    assert d_scale != 0
    assert not method.bank.features.requires_grad


def test_captions_join_the_bank_after_they_asked_it():
    """Else each would find itself."""
    features, method = make_features("declip"), make_method("declip").train()
    losses = losses_of(method, features, make_batch())
    assert method.bank.pushed == B
    torch.testing.assert_close(method.bank.features[:B], features.text.detach())
    torch.testing.assert_close(losses["nearest"], losses["clip"])  # the bank was empty


def test_evaluation_pushes_nothing():
    method = make_method("declip").eval()
    losses_of(method, make_features("declip"), make_batch())
    assert method.bank.pushed == 0
    assert not method.bank.features.any()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("key", [key for key in METHODS if "clip" in WEIGHTS[key]])
def test_pairs_of_one_study_are_positives_of_one_another(key, impl):
    batch, features = make_batch(), make_features(key, torch.float64)
    losses = losses_of(_double_method(key, impl, group_positives=True), features, batch)
    want = info_nce(features.image, features.text, features.logit_scale, batch.group)
    alone = info_nce(features.image, features.text, features.logit_scale)
    torch.testing.assert_close(losses["clip"], want)
    assert abs(want - alone) > 1e-3
    if key == "declip":
        view, words = features.extra["image view"], features.extra["text view"]
        pairs = ((features.image, words), (view, features.text), (view, words))
        want = [info_nce(*pair, features.logit_scale, batch.group) for pair in pairs]
        torch.testing.assert_close(losses["multi_view"], sum(want) / 3)


@pytest.mark.parametrize("key", METHODS)
def test_loss_weights_replace_the_published_ones_of_their_terms_alone(key):
    first, *others = WEIGHTS[key]
    method = new_method(
        TrainConfig(method=key, loss_weights=(f"{first}=0.5",), **_weights(key)), CPU
    )
    assert method.weights == {first: 0.5, **{term: WEIGHTS[key][term] for term in others}}
    assert method.terms == WEIGHTS[key]


@pytest.mark.parametrize("key", METHODS)
def test_an_unknown_term_is_refused_with_the_terms_of_the_method(key):
    config = TrainConfig(method=key, loss_weights=("golbal=1",), **_weights(key))
    says = f"--loss-weights: {key} has no term 'golbal'; its terms are {', '.join(WEIGHTS[key])}"
    with pytest.raises(UsageError, match=says):
        new_method(config, CPU)


CPU = torch.device("cpu")


def _weights(key):
    return {"pretrained_image": "/weights"} if key == "lit" else {}


def test_masked_tokens_are_told_from_the_masked_caption(phantom, tokenizer):
    """Hidden states of the masked caption, at the masked places alone, in the batch's order."""
    preset = replace(PRESETS["tiny"], image_size=32)
    torch.manual_seed(0)
    model = build_model(preset, tokenizer, token_features=False).eval()
    method = method_class("declip")()
    records = read_split("roco", phantom, "train").records
    batch = next(Loader(records, tokenizer, 32, 8, crop=0.8, extra=method.extra).epoch(0))
    found = method.encode(model, batch).extra["masked"]
    labels = batch.masked.labels
    _, hidden = model.text_tower(batch.masked.ids, batch.mask)
    want = [
        hidden[row, place]
        for row, place in itertools.product(*map(range, labels.shape))
        if labels[row, place] != NOT_PREDICTED
    ]
    assert (batch.masked.ids != batch.ids).any()
    assert torch.equal(labels[labels != NOT_PREDICTED], batch.ids[labels != NOT_PREDICTED])
    torch.testing.assert_close(found, torch.stack(want))
