"""What every global loss promises, as tests that the classes of its op inherit."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from medfast.ops import matmul, tiles
from medfast.ops.dispatch import why_not

# 1 = no negatives, 127..129 straddle a tile of the kernels, D = 1 and 3 are no power of two
SIZES = [
    *((B, 64) for B in (1, 2, 3, 127, 128, 129, 1000)),
    *((129, D) for D in (1, 3, 512, 768, 1024)),
    *((2, 1), (1000, 512)),
]
EPS = torch.finfo(torch.float32).eps

# Image and text features of batches at the edge of what numbers can hold.
EXTREMES = {
    "every diagonal wins": lambda x, y: (x, x),
    "every diagonal loses": lambda x, y: (x, -x),
    "all equal": lambda x, y: (x[:1].expand_as(x), x[:1].expand_as(x)),
    "every cosine -1": lambda x, y: (x[:1].expand_as(x), -x[:1].expand_as(x)),
    "zero vectors": lambda x, y: (x, torch.zeros_like(y)),
    "one pair saturated": lambda x, y: (x, torch.cat([x[:1], y[1:]])),
    "one row far from all": lambda x, y: (torch.cat([-y.mean(0, True), x[1:]]), y),
}


def unit_features(B, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(B, D, generator=generator), dim=-1) for _ in range(2))
    return image.to(dtype), text.to(dtype)


def loss_and_grads(fn, inputs, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    loss = fn(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


class GlobalLossChecks:
    """A subclass names its op: `name`, `function`, `reference`, `eager`, `scalars`, `bands`."""

    name = ""
    device = "cpu"
    scalars = (14.3,)
    extreme_scalars = ()
    unnormalised_scalars = ()

    @pytest.fixture(
        params=[
            "torch",
            "cpu",
            pytest.param("torch on cuda", marks=pytest.mark.gpu),
            pytest.param("triton on cuda", marks=pytest.mark.gpu),
        ]
    )
    def loss(self, request, monkeypatch):
        """The op with one implementation, where bf16 products are not rounded on a CPU."""
        impl, _, device = request.param.partition(" on ")
        self.device = device or "cpu"
        self.rounds = impl == "triton"
        reason = why_not(self.name, impl)
        if reason is not None:
            pytest.skip(reason)
        monkeypatch.setattr(matmul, "multiplies_bf16", lambda: False)
        return lambda *a, **k: self.function(*a, impl=impl, **k)

    def inputs(self, B, D, dtype=torch.float32, scalars=None):
        more = (torch.tensor(value) for value in scalars or self.scalars)
        return [t.to(self.device) for t in (*unit_features(B, D, dtype), *more)]

    def assert_as_close_as_eager(self, fn, inputs, rounds=False):
        """The error against fp64, in norm, is at most twice that of eager in the same dtype.

        Beyond that, a few roundings of the terms that a gradient sums, and that of a logit, which
        moves its exponential by as many roundings as the logit is large: where terms cancel, eager
        may be right by luck. `rounds` says that the gradient of the logits is rounded to the
        features' dtype on its way; eager then is the formula in that dtype throughout.
        """
        rounds = rounds and inputs[0].dtype != torch.float32
        truth = loss_and_grads(self.reference, inputs, torch.float64)
        eager = loss_and_grads(self.eager if rounds else self.reference, inputs)
        found = loss_and_grads(fn, inputs)
        bands = self.bands(truth[0], *(t.detach().double() for t in inputs))
        names = ("loss", "d_image", "d_text", "d_scale", "d_bias")
        for name, want, low, got, band in zip(names, truth, eager, found, bands, strict=False):
            assert got.dtype == (torch.float32 if name == "loss" else low.dtype)
            if rounds and name in ("d_image", "d_text"):
                band = band * torch.finfo(inputs[0].dtype).eps / EPS / 8
            error, allowed = (got - want).norm(), 2 * (low - want).norm() + band
            assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("B", "D"), SIZES)
    def test_is_as_close_to_fp64_as_eager(self, loss, B, D, dtype):
        self.assert_as_close_as_eager(loss, self.inputs(B, D, dtype), self.rounds)

    @pytest.mark.usefixtures("bf16_products")
    @pytest.mark.parametrize("impl", ["torch", "cpu"])
    @pytest.mark.parametrize(("B", "D"), [(1, 3), (2, 3), (2, 64), (129, 64), (1000, 512)])
    @pytest.mark.parametrize("workspace", ["256", "0.1"])
    def test_bf16_products_with_sums_in_fp32(self, monkeypatch, impl, B, D, workspace):
        """What a CPU with bf16 in hardware does; it can be had, slowly, on any."""
        if why_not(self.name, impl) is not None:
            pytest.skip(why_not(self.name, impl))
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", workspace)
        inputs = self.inputs(B, D, torch.bfloat16)
        loss = lambda *a: self.function(*a, impl=impl)  # noqa: E731
        self.assert_as_close_as_eager(loss, inputs, rounds=True)

    @pytest.mark.parametrize(("B", "D"), [(2, 3), (33, 48), (129, 64)])
    def test_tiles_change_nothing(self, loss, monkeypatch, B, D):
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "0.005")
        self.assert_as_close_as_eager(loss, self.inputs(B, D), self.rounds)

    @pytest.mark.parametrize(("rows", "columns"), [(5, 7), (64, 3), (1, 129)])
    def test_tiles_of_any_shape(self, loss, monkeypatch, rows, columns):
        monkeypatch.setattr(tiles, "tile_shape", lambda x, y: (rows, columns))
        self.assert_as_close_as_eager(loss, self.inputs(129, 16), self.rounds)

    @pytest.mark.parametrize("make", EXTREMES.values(), ids=EXTREMES)
    def test_extreme_batches(self, loss, make):
        for scalars in self.extreme_scalars:
            image, text, *more = self.inputs(65, 32, scalars=scalars)
            self.assert_as_close_as_eager(loss, [*make(image, text), *more], self.rounds)

    def test_features_that_are_not_normalised(self, loss):
        lengths = torch.linspace(0.1, 9, 65, device=self.device).unsqueeze(1)
        for scalars in self.unnormalised_scalars:
            image, text, *more = self.inputs(65, 32, scalars=scalars)
            inputs = [image * lengths, text * lengths.flip(0), *more]
            self.assert_as_close_as_eager(loss, inputs, self.rounds)

    def test_reference_gradient_is_that_of_its_value(self):
        leaves = [t.double().requires_grad_() for t in self.inputs(5, 4)]
        assert gradcheck(self.reference, leaves)

    def test_runs_are_equal_bit_for_bit(self, loss):
        inputs = self.inputs(300, 64)
        for a, b in zip(loss_and_grads(loss, inputs), loss_and_grads(loss, inputs), strict=True):
            assert torch.equal(a, b)

    def test_every_output_is_written(self, loss, uninitialised_is_nan):
        for B in (1, 2, 129):
            assert all(t.isfinite().all() for t in loss_and_grads(loss, self.inputs(B, 24)))

    def test_strides_do_not_matter(self, loss):
        image, text, *more = self.inputs(33, 16)
        strided = image.T.contiguous().T, text.repeat(1, 2)[:, :16]
        for a, b in zip(
            loss_and_grads(loss, (image, text, *more)),
            loss_and_grads(loss, (*strided, *more)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    def test_an_expanded_row(self, loss):
        image, text, *more = self.inputs(33, 16)
        row = image[:1].clone().requires_grad_()
        loss(row.expand_as(image), text, *more).backward()
        copied = row.detach().repeat(33, 1).requires_grad_()
        loss(copied, text, *more).backward()
        torch.testing.assert_close(row.grad, copied.grad.sum(0, keepdim=True))

    def test_gradients_of_some_inputs_alone(self, loss):
        inputs = self.inputs(33, 16)
        want = loss_and_grads(loss, inputs)[1:]
        for needs in itertools.product([False, True], repeat=len(inputs)):
            leaves = [t.clone().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
            value = loss(*leaves)
            assert value.requires_grad == any(needs)
            if any(needs):
                value.backward()
            for leaf, need, grad in zip(leaves, needs, want, strict=True):
                if need:
                    torch.testing.assert_close(leaf.grad, grad)
                else:
                    assert leaf.grad is None

    def test_a_second_backward_through_a_kept_graph(self, loss):
        leaves = [t.requires_grad_() for t in self.inputs(9, 4)]
        value = loss(*leaves)
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        second = torch.autograd.grad(value * 2, leaves)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(2 * a, b)

    def test_hooks_see_the_gradient(self, loss):
        leaves = [t.requires_grad_() for t in self.inputs(9, 4)]
        seen = []
        features = leaves[0] * 1.0
        features.register_hook(lambda grad: seen.append(grad) or 2 * grad)
        loss(features, *leaves[1:]).backward()
        torch.testing.assert_close(leaves[0].grad, 2 * seen[0])

    def test_scalars_may_be_numbers_or_one_element(self, loss):
        image, text, *more = self.inputs(9, 4)
        want = loss(image, text, *more)
        torch.testing.assert_close(loss(image, text, *self.scalars), want)
        torch.testing.assert_close(loss(image, text, *(t.reshape(1) for t in more)), want)

    @pytest.mark.parametrize("side", [0, 1])
    def test_nan_features_make_the_loss_nan(self, loss, side):
        inputs = self.inputs(9, 4)
        inputs[side][3, 1] = torch.nan
        value, *grads = loss_and_grads(loss, inputs)
        assert value.isnan()
        assert grads[1 - side].isnan().any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_takes_its_dtype_and_sums_in_fp32(self, loss, dtype):
        inputs = [t.requires_grad_() for t in self.inputs(33, 16)]
        with torch.autocast(self.device, dtype):
            value = loss(*inputs)
        assert value.dtype == torch.float32
        image, text, *more = inputs
        assert torch.equal(value, loss(image.to(dtype), text.to(dtype), *more))
        grads = torch.autograd.grad(value, inputs)
        assert all(grad.dtype == torch.float32 for grad in grads)

    @pytest.mark.parametrize("impl", ["auto", "torch", "cpu", "reference"])
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_to_one_graph(self, impl, dynamic):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *a: self.function(*a, impl=impl),
            fullgraph=True,
            dynamic=dynamic,
            backend="aot_eager",
        )
        for B in (33, 34):
            inputs = self.inputs(B, 16)
            for got, want in zip(
                loss_and_grads(compiled, inputs),
                loss_and_grads(self.reference, inputs),
                strict=True,
            ):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_inductor_compiles_it(self, loss):
        torch.compiler.reset()
        compiled = torch.compile(lambda x, *a: 2 * loss(F.normalize(x, dim=-1), *a), fullgraph=True)
        inputs = self.inputs(33, 16)
        for got, want in zip(
            loss_and_grads(compiled, inputs),
            loss_and_grads(lambda x, *a: 2 * loss(F.normalize(x, dim=-1), *a), inputs),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_memory_stays_within_the_workspace(self, loss, monkeypatch, largest_tensor):
        """B x B logits would be 36 MB; no tensor of the forward or the backward comes near."""
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "4")
        inputs = self.inputs(3000, 8)
        with largest_tensor() as largest:
            loss_and_grads(loss, inputs)
        assert largest.bytes <= 4 * 2**20

    def test_fp64_is_not_rounded(self):
        inputs = [t.double() for t in self.inputs(9, 4)]
        with pytest.raises(RuntimeError, match="fp64"):
            self.function(*inputs, impl="cpu")
        torch.testing.assert_close(
            self.function(*inputs, impl="torch"), self.reference(*inputs), rtol=1e-12, atol=0
        )

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda i, t, *s: (i, t[:3], *s), r"\[4, 8\] and \[3, 8\]"),
            (lambda i, t, *s: (i[0], t, *s), r"image must be \[B, D\].* got \[8\]"),
            (lambda i, t, *s: (i, t.double(), *s), "text must be torch.float32"),
            (lambda i, t, *s: (i.long(), t.long(), *s), "image must be floating point"),
            (lambda i, t, *s: (i[:0], t[:0], *s), "no size of 0"),
            (lambda i, t, *s: (i, t, torch.ones(2), *s[1:]), "logit_scale must be a number"),
            (lambda i, t, *s: (i, t, "14", *s[1:]), "logit_scale must be a number"),
            (lambda i, t, *s: (i.tolist(), t, *s), "image must be a tensor"),
            (lambda i, t, *s: (i, t.to("meta"), *s), "text must be on cpu"),
        ],
    )
    def test_a_wrong_argument_is_named(self, change, says):
        with pytest.raises(ValueError, match=f"{self.name}: .*{says}"):
            self.function(*change(*self.inputs(4, 8)))

    def test_an_unknown_implementation_names_the_nearest(self):
        with pytest.raises(ValueError, match=r"'tritn' is not known\. Did you mean 'triton'"):
            self.function(*self.inputs(4, 8), impl="tritn")

    @pytest.mark.parametrize("impl", ["triton", "cuda"])
    def test_explicit_request_is_refused_not_replaced(self, impl):
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: .* impl='auto'"):
            self.function(*self.inputs(4, 8), impl=impl)

    @pytest.mark.gpu
    def test_a_cuda_graph_replays_it(self):
        self.device = "cuda"
        inputs = [t.requires_grad_() for t in self.inputs(129, 64)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            want = [t.clone() for t in loss_and_grads(self.function, inputs)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = self.function(*inputs)
            found = [value, *torch.autograd.grad(value, inputs)]
        for output in found:
            output.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a.detach(), b)
