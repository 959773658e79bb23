"""What every loss of patches and words promises, as tests that the classes of its op inherit."""

import collections
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from medfast.ops import matmul, packing
from medfast.ops.dispatch import why_not

# B, P, T, D: one of everything; one patch, one word; the grids of 224 px by 32 and 16, with and
# without a class token, and of 336 px; captions beyond a block of eight; no powers of two
SIZES = [
    (1, 1, 1, 1),
    (1, 49, 32, 64),
    (2, 1, 3, 8),
    (2, 196, 77, 128),
    (2, 361, 77, 512),
    (3, 197, 128, 256),
    (3, 49, 1, 768),
    (19, 7, 5, 12),
    (48, 49, 8, 64),
    (48, 1, 32, 64),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Batch(NamedTuple):
    patches: Tensor  # [M, P, D]
    tokens: Tensor  # [N, T, D]
    token_mask: Tensor  # [N, T]
    patch_mask: Tensor | None  # [M, P]


def batch(B, P, T, D, dtype=torch.float32, masked=False, seed=0, captions=None):
    """Return random features; valid words anywhere in a caption, from one to all of them."""
    generator = torch.Generator().manual_seed(seed)
    N = captions or B
    patches = torch.randn(B, P, D, generator=generator).to(dtype)
    tokens = torch.randn(N, T, D, generator=generator).to(dtype)
    token_mask = torch.rand(N, T, generator=generator) < torch.rand(N, 1, generator=generator)
    token_mask[:, T // 2] = True
    token_mask[-1] = True
    patch_mask = None
    if masked:
        patch_mask = torch.rand(B, P, generator=generator) < 0.7
        patch_mask[:, 0] = True
    return Batch(patches, tokens, token_mask, patch_mask)


class LocalLossChecks:
    """A subclass names its op: `name`, `function`, `reference`, `scalars` by name."""

    name = ""
    scalars: dict = {}  # noqa: RUF012
    known = collections.deque(maxlen=100)  # noqa: RUF012
    # The first scalar is an argument of its own, the others are keywords.
    is_positional = True
    device = "cpu"

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
        reason = why_not(self.name, impl)
        if reason is not None:
            pytest.skip(reason)
        self.rounds = impl == "triton"
        monkeypatch.setattr(matmul, "multiplies_bf16", lambda: False)
        return lambda *a, **k: self.function(*a, impl=impl, **k)

    # Hooks of the subclasses.

    def prepare(self, inputs):
        """Return a batch as the loss wants it, such as of unit features."""
        return inputs

    def is_clear(self, inputs):
        """Return whether rounding cannot change which of two branches the loss takes."""
        return True

    # Helpers.

    def inputs(self, *sizes, **options):
        for seed in itertools.count():
            found = self.prepare(batch(*sizes, seed=seed, **options))
            if self.is_clear(found):
                return Batch(*(t if t is None else t.to(self.device) for t in found))
        raise AssertionError

    def call(self, fn, inputs, scalars):
        patches, tokens, token_mask, patch_mask = inputs
        scalars = dict(zip(self.scalars, scalars, strict=True))
        first = [scalars.pop(next(iter(scalars)))] if self.is_positional else []
        return fn(patches, tokens, token_mask, *first, patch_mask=patch_mask, **scalars)

    def loss_and_grads(self, fn, inputs, dtype=None, scalars=None):
        features = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs[:2]]
        values = scalars or self.scalars.values()
        kind = dtype if dtype == torch.float64 else torch.float32
        scalars = [torch.tensor(v, dtype=kind, device=self.device).requires_grad_() for v in values]
        value = self.call(fn, (*features, *inputs[2:]), scalars)
        return [value.detach(), *torch.autograd.grad(value, features + scalars)]

    def expected(self, inputs, scalars):
        """Return the reference's results in fp64 and in the features' dtype, the last time's too.

        Implementations take turns at the same inputs.
        """
        key = [*(t if t is None else t.clone() for t in inputs), scalars, self.reference]
        for known, found in self.known:
            if all(_is_same(a, b) for a, b in zip(known, key, strict=True)):
                return found
        found = [
            self.loss_and_grads(self.reference, inputs, dtype, scalars)
            for dtype in (torch.float64, None)
        ]
        self.known.append((key, found))
        return found

    def assert_as_close_as_eager(self, fn, inputs, scalars=None, rounds=False):
        """The error against fp64, in norm, is at most twice that of eager in the same dtype.

        Beyond that, some roundings of the terms that are summed, which may be larger than their
        sum. `rounds` says that products take operands of the features' dtype: eager then is the
        formula in that dtype throughout.
        """
        truth, eager = self.expected(inputs, scalars)
        found = self.loss_and_grads(fn, inputs, None, scalars)
        names = ("loss", "d_patches", "d_tokens", *(f"d_{name}" for name in self.scalars))
        dtype = inputs.patches.dtype
        for name, want, low, got in zip(names, truth, eager, found, strict=True):
            assert got.dtype == low.dtype
            band = 2e-5 * max(want.norm().item(), 0.2)
            if rounds and dtype != torch.float32:
                band = 4 * torch.finfo(dtype).eps * max(want.norm().item(), 0.2)
            error, allowed = (got - want).norm(), 2 * (low - want).norm() + band
            assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"

    # Exact.

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("sizes", SIZES)
    def test_is_as_close_to_fp64_as_eager(self, loss, sizes, dtype, masked):
        inputs = self.inputs(*sizes, dtype=dtype, masked=masked)
        self.assert_as_close_as_eager(loss, inputs, rounds=self.rounds)

    @pytest.mark.parametrize("workspace", ["256", "0.02"])
    @pytest.mark.parametrize("sizes", [s for s in SIZES if s[0] * s[2] < 100 or s[3] < 16])
    def test_torch_equals_the_reference_in_fp64(self, sizes, workspace, monkeypatch):
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", workspace)
        inputs = self.inputs(*sizes, masked=True)
        fused = lambda *a, **k: self.function(*a, impl="torch", **k)  # noqa: E731
        for got, want in zip(
            self.loss_and_grads(fused, inputs, torch.float64),
            self.loss_and_grads(self.reference, inputs, torch.float64),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)

    def test_reference_gradient_is_that_of_its_value(self):
        patches, tokens, token_mask, patch_mask = self.inputs(3, 4, 3, 2, masked=True)
        leaves = [t.double().requires_grad_() for t in (patches, tokens)]
        scalars = [
            torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in self.scalars.values()
        ]

        def fn(patches, tokens, *scalars):
            return self.call(self.reference, (patches, tokens, token_mask, patch_mask), scalars)

        assert gradcheck(fn, [*leaves, *scalars])

    @pytest.mark.parametrize("workspace", ["1", "0.02"])
    @pytest.mark.parametrize("sizes", [(9, 36, 20, 16), (5, 7, 5, 12), (2, 50, 40, 8)])
    def test_tiles_change_nothing(self, loss, monkeypatch, sizes, workspace):
        monkeypatch.setenv("MEDFAST_WORKSPACE_MB", workspace)
        self.assert_as_close_as_eager(loss, self.inputs(*sizes, masked=True), rounds=self.rounds)

    @pytest.mark.parametrize(("entries", "columns"), [(9000, 20), (1500, 1), (30_000, 1000)])
    def test_tiles_of_any_shape(self, loss, monkeypatch, entries, columns):
        monkeypatch.setattr(packing, "CPU_ENTRIES", entries)
        monkeypatch.setattr(packing, "CPU_COLUMNS", columns)
        inputs = self.inputs(9, 18, 7, 16)
        self.assert_as_close_as_eager(loss, inputs, rounds=self.rounds)

    @pytest.mark.usefixtures("bf16_products")
    @pytest.mark.parametrize("impl", ["torch", "cpu"])
    @pytest.mark.parametrize(
        "sizes", [(1, 3, 1, 5), (5, 49, 9, 64), (3, 7, 20, 33), (5, 200, 90, 20), (9, 33, 170, 8)]
    )
    @pytest.mark.parametrize("masked", [False, True])
    def test_bf16_products_with_sums_in_fp32(self, impl, sizes, masked):
        """What a CPU with bf16 in hardware does; it can be had, slowly, on any."""
        if why_not(self.name, impl) is not None:
            pytest.skip(why_not(self.name, impl))
        inputs = self.inputs(*sizes, dtype=torch.bfloat16, masked=masked)
        loss = lambda *a, **k: self.function(*a, impl=impl, **k)  # noqa: E731
        self.assert_as_close_as_eager(loss, inputs, rounds=True)

    @pytest.mark.usefixtures("bf16_products", "kernels")
    @pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (5, 49, 9, 17), (3, 21, 20, 33)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiled_passes_in_every_instruction_set(self, sizes, dtype):
        if why_not(self.name, "cpu") is not None:
            pytest.skip(why_not(self.name, "cpu"))
        inputs = self.inputs(*sizes, dtype=dtype, masked=True)
        loss = lambda *a, **k: self.function(*a, impl="cpu", **k)  # noqa: E731
        self.assert_as_close_as_eager(loss, inputs, rounds=True)

    @pytest.mark.usefixtures("bf16_products")
    @pytest.mark.parametrize(
        ("dtype", "sizes"),
        [
            # No product here is large enough for the library to divide it.
            (torch.float32, (9, 7, 5, 4)),
            *(
                (torch.bfloat16, sizes)
                for sizes in [(1, 21, 40, 24), (3, 50, 90, 24), (9, 9, 7, 8)]
            ),
        ],
    )
    def test_threads_do_not_change_a_bit(self, dtype, sizes):
        if why_not(self.name, "cpu") is not None:
            pytest.skip(why_not(self.name, "cpu"))
        inputs = self.inputs(*sizes, dtype=dtype, masked=True)
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                loss = lambda *a, **k: self.function(*a, impl="cpu", **k)  # noqa: E731
                found.append(self.loss_and_grads(loss, inputs))
        finally:
            torch.set_num_threads(before)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    # Masks.

    @pytest.mark.parametrize("impl", ["torch", "cpu", "reference"])
    @pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
    def test_what_is_masked_never_counts(self, impl, garbage):
        if why_not(self.name, impl) is not None:
            pytest.skip(why_not(self.name, impl))
        patches, tokens, token_mask, patch_mask = self.inputs(4, 6, 5, 8, masked=True)
        results = []
        for value in (0.0, garbage):
            p = patches.masked_fill(~patch_mask[..., None], value)
            t = tokens.masked_fill(~token_mask[..., None], value)
            fn = lambda *a, **k: self.function(*a, impl=impl, **k)  # noqa: E731
            results.append(self.loss_and_grads(fn, Batch(p, t, token_mask, patch_mask)))
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty)
        assert (results[1][1][~patch_mask] == 0).all()
        assert (results[1][2][~token_mask] == 0).all()

    def test_masked_is_the_same_as_left_out(self, loss):
        patches, tokens, _, _ = self.inputs(3, 6, 5, 8)
        everything = torch.ones(3, 3, dtype=torch.bool, device=self.device)
        token_mask = (torch.arange(5, device=self.device) < 3).expand(3, 5)
        patch_mask = (torch.arange(6, device=self.device) < 4).expand(3, 6)
        scalars = list(self.scalars.values())
        long = self.call(loss, (patches, tokens, token_mask, patch_mask), scalars)
        short = self.call(loss, (patches[:, :4], tokens[:, :3], everything, None), scalars)
        torch.testing.assert_close(long, short)

    def test_captions_of_one_length_or_nearly(self, loss):
        """All are full, or all but one: words then need no packing, or only seem to need none."""
        for short in (None, 1, 8):
            patches, tokens, token_mask, _ = self.inputs(9, 6, 5, 8)
            token_mask.fill_(True)
            if short is not None:
                token_mask[short, 2:] = False
            inputs = Batch(patches, tokens, token_mask, None)
            self.assert_as_close_as_eager(loss, inputs, rounds=self.rounds)

    def test_the_order_of_the_pairs_does_not_matter(self, loss):
        inputs = self.inputs(19, 7, 5, 12, masked=True)
        order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
        value, d_patches, d_tokens, *_ = self.loss_and_grads(loss, inputs)
        shuffled = self.loss_and_grads(loss, Batch(*(t[order] for t in inputs)))
        for a, b in zip(shuffled, (value, d_patches[order], d_tokens[order]), strict=False):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    # Numbers.

    @pytest.mark.parametrize("length", [0.0, 1e-4, 30.0])
    def test_patches_of_any_length(self, loss, length):
        patches, *rest = self.inputs(5, 6, 5, 8)
        inputs = Batch(patches * length, *rest)
        self.assert_as_close_as_eager(loss, inputs, rounds=self.rounds)
        assert all(t.isfinite().all() for t in self.loss_and_grads(loss, inputs))

    def test_identical_patches_and_words(self, loss):
        patches, tokens, *masks = self.inputs(5, 6, 5, 8)
        inputs = Batch(patches[:, :1].expand(5, 6, 8), tokens[:, :1].expand(5, 5, 8), *masks)
        value, *grads = self.loss_and_grads(loss, inputs)
        want = self.loss_and_grads(self.reference, inputs, torch.float64)[0]
        torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-5)
        assert all(grad.isfinite().all() for grad in grads)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_huge_scalars_do_not_overflow(self, loss, dtype):
        inputs = self.inputs(4, 6, 5, 8, dtype=dtype)
        for name in self.scalars:
            scalars = [1e3 if n == name else v for n, v in self.scalars.items()]
            value, *grads = self.loss_and_grads(loss, inputs, scalars=scalars)
            want = self.loss_and_grads(self.reference, inputs, torch.float64, scalars)[0]
            torch.testing.assert_close(value.double(), want, rtol=2e-3, atol=1e-4)
            assert all(grad.isfinite().all() for grad in grads)

    def test_scalars_may_be_numbers_or_one_element(self, loss):
        inputs = self.inputs(4, 6, 5, 8)
        numbers = list(self.scalars.values())
        tensors = [torch.full((1,), v, device=self.device) for v in numbers]
        torch.testing.assert_close(
            self.call(loss, inputs, numbers), self.call(loss, inputs, tensors)
        )

    def test_runs_are_equal_bit_for_bit(self, loss):
        inputs = self.inputs(19, 36, 20, 32)
        first, second = (self.loss_and_grads(loss, inputs) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    def test_every_output_is_written(self, loss, uninitialised_is_nan):
        for sizes in ((1, 1, 1, 1), (3, 17, 5, 24), (9, 4, 7, 8)):
            found = self.loss_and_grads(loss, self.inputs(*sizes, masked=True))
            assert all(t.isfinite().all() for t in found)

    @pytest.mark.parametrize("side", [0, 1])
    def test_nan_features_make_the_loss_nan(self, loss, side):
        inputs = self.inputs(3, 4, 3, 8)
        inputs[side][1, 1, 3] = torch.nan
        assert inputs.token_mask[1, 1]
        assert self.call(loss, inputs, list(self.scalars.values())).isnan()

    # Autograd.

    def test_strides_do_not_matter(self, loss):
        patches, tokens, *masks = self.inputs(5, 6, 5, 8)
        strided = patches.mT.contiguous().mT, tokens.transpose(0, 1).contiguous().transpose(0, 1)
        for a, b in zip(
            self.loss_and_grads(loss, Batch(*strided, *masks)),
            self.loss_and_grads(loss, Batch(patches, tokens, *masks)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    def test_gradients_of_some_inputs_alone(self, loss):
        inputs = self.inputs(5, 6, 5, 8, masked=True)
        want = self.loss_and_grads(loss, inputs)[1:]
        scalars = [torch.tensor(v, device=self.device) for v in self.scalars.values()]
        given = [*inputs[:2], *scalars]
        for needs in itertools.product([False, True], repeat=len(given)):
            leaves = [t.clone().requires_grad_(n) for t, n in zip(given, needs, strict=True)]
            value = self.call(loss, (*leaves[:2], *inputs[2:]), leaves[2:])
            assert value.requires_grad == any(needs)
            if any(needs):
                value.backward()
            for leaf, need, grad in zip(leaves, needs, want, strict=True):
                if need:
                    torch.testing.assert_close(leaf.grad, grad)
                else:
                    assert leaf.grad is None

    def test_a_second_backward_through_a_kept_graph(self, loss):
        inputs = self.inputs(5, 6, 5, 8)
        leaves = [t.clone().requires_grad_() for t in inputs[:2]]
        value = self.call(loss, (*leaves, *inputs[2:]), list(self.scalars.values()))
        first = torch.autograd.grad(value, leaves, retain_graph=True)
        second = torch.autograd.grad(2 * value, leaves)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(2 * a, b)

    def test_two_graphs_at_once(self, loss):
        """What is kept for one backward must not be overwritten by another forward."""
        batches = [self.inputs(5, 6, 5, 8, masked=masked) for masked in (False, True)]
        want = [self.loss_and_grads(loss, inputs)[1:3] for inputs in batches]
        leaves = [[t.clone().requires_grad_() for t in inputs[:2]] for inputs in batches]
        values = [
            self.call(loss, (*features, *inputs[2:]), list(self.scalars.values()))
            for features, inputs in zip(leaves, batches, strict=True)
        ]
        for value, features, grads in zip(values, leaves, want, strict=True):
            for a, b in zip(torch.autograd.grad(value, features), grads, strict=True):
                torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_takes_its_dtype_and_sums_in_fp32(self, loss, dtype):
        inputs = self.inputs(5, 6, 5, 8)
        leaves = [t.clone().requires_grad_() for t in inputs[:2]]
        scalars = list(self.scalars.values())
        with torch.autocast(self.device, dtype):
            value = self.call(loss, (*leaves, *inputs[2:]), scalars)
        assert value.dtype == torch.float32
        low = (t.to(dtype) for t in inputs[:2])
        assert torch.equal(value, self.call(loss, (*low, *inputs[2:]), scalars))
        grads = torch.autograd.grad(value, leaves)
        assert all(grad.dtype == torch.float32 for grad in grads)

    @pytest.mark.parametrize(
        ("impl", "dynamic"), [("auto", False), ("torch", True), ("reference", False)]
    )
    def test_compiles_to_one_graph(self, impl, dynamic):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda *a, **k: self.function(*a, impl=impl, **k),
            fullgraph=True,
            dynamic=dynamic,
            backend="aot_eager",
        )
        for B in (5, 6):
            inputs = self.inputs(B, 6, 5, 8, masked=True)
            for got, want in zip(
                self.loss_and_grads(compiled, inputs),
                self.loss_and_grads(self.reference, inputs),
                strict=True,
            ):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_inductor_compiles_it(self, loss):
        torch.compiler.reset()
        inputs = self.inputs(5, 6, 5, 8)

        def step(patches, *args, **kwargs):
            return 2 * loss(F.normalize(patches, dim=-1), *args, **kwargs)

        compiled = torch.compile(step, fullgraph=True)
        for got, want in zip(
            self.loss_and_grads(compiled, inputs), self.loss_and_grads(step, inputs), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    # Bad input.

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda p, t, m, k: (p, t[:2], m[:2], k), r"\[3, 4, 8\] and \[2, 5, 8\]"),
            (lambda p, t, m, k: (p, t[..., :4], m, k), "with one D"),
            (lambda p, t, m, k: (p[0], t, m, k), r"patches must be \[B, P, D\]"),
            (lambda p, t, m, k: (p, t, None, k), "token_mask must be torch.bool"),
            (lambda p, t, m, k: (p, t, m.float(), k), "token_mask must be torch.bool"),
            (lambda p, t, m, k: (p, t, m[:, :3], k), r"token_mask must be torch.bool \[3, 5\]"),
            (lambda p, t, m, k: (p, t, m & _second(3), k), "caption 1 with no valid word"),
            (lambda p, t, m, k: (p, t, m, k.long()), "patch_mask must be torch.bool"),
            (lambda p, t, m, k: (p, t, m, k[:, 1:]), r"patch_mask must be torch.bool \[3, 4\]"),
            (lambda p, t, m, k: (p, t, m, k & _second(3)), "image 1 with no valid patch"),
            (lambda p, t, m, k: (p, t.half(), m, k), "tokens must be torch.float32"),
            (lambda p, t, m, k: (p.long(), t.long(), m, k), "patches must be floating point"),
            (lambda p, t, m, k: (p[:0], t[:0], m[:0], k[:0]), "no size of 0"),
            (lambda p, t, m, k: (p.numpy(), t, m, k), "patches must be a tensor"),
            (lambda p, t, m, k: (p, t, m.to("meta"), k), "token_mask must be on cpu"),
        ],
    )
    def test_a_wrong_argument_is_named(self, change, says):
        inputs = change(*self.inputs(3, 4, 5, 8, masked=True))
        with pytest.raises(ValueError, match=f"{self.name}: .*{says}"):
            self.call(self.function, inputs, list(self.scalars.values()))

    def test_a_wrong_scalar_is_named(self):
        inputs = self.inputs(3, 4, 5, 8)
        for name in self.scalars:
            for wrong in ("4", torch.ones(2), torch.tensor(3)):
                scalars = [wrong if n == name else v for n, v in self.scalars.items()]
                with pytest.raises(ValueError, match=f"{self.name}: {name} must be a number"):
                    self.call(self.function, inputs, scalars)

    @pytest.mark.parametrize("impl", ["torch", "cpu"])
    def test_a_caption_without_words_is_named_in_a_compiled_graph(self, impl):
        torch.compiler.reset()
        inputs = self.inputs(3, 4, 5, 8)
        inputs.token_mask[1] = False
        compiled = torch.compile(self.function, fullgraph=True, backend="aot_eager")
        with pytest.raises(ValueError, match=f"{self.name}: caption 1 has no valid word"):
            self.call(
                lambda *a, **k: compiled(*a, impl=impl, **k), inputs, list(self.scalars.values())
            )

    def test_an_unknown_implementation_names_the_nearest(self):
        inputs, scalars = self.inputs(3, 4, 5, 8), list(self.scalars.values())
        with pytest.raises(ValueError, match=r"'tritn' is not known\. Did you mean 'triton'"):
            self.call(lambda *a, **k: self.function(*a, impl="tritn", **k), inputs, scalars)

    @pytest.mark.parametrize("impl", ["triton", "cuda"])
    def test_explicit_request_is_refused_not_replaced(self, impl):
        inputs, scalars = self.inputs(3, 4, 5, 8), list(self.scalars.values())
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: .* impl='auto'"):
            self.call(lambda *a, **k: self.function(*a, impl=impl, **k), inputs, scalars)

    def test_fp64_is_not_rounded(self):
        patches, tokens, *masks = self.inputs(3, 4, 5, 8)
        inputs = (patches.double(), tokens.double(), *masks)
        scalars = list(self.scalars.values())
        with pytest.raises(RuntimeError, match="fp64"):
            self.call(lambda *a, **k: self.function(*a, impl="cpu", **k), inputs, scalars)

    # A GPU.

    @pytest.mark.gpu
    def test_a_cuda_graph_replays_it(self):
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        self.device = "cuda"
        inputs = self.inputs(9, 18, 7, 64)
        leaves = [t.clone().requires_grad_() for t in inputs[:2]]
        scalars = list(self.scalars.values())
        impl = lambda *a, **k: self.function(*a, impl="triton", **k)  # noqa: E731

        def step():
            value = self.call(impl, (*leaves, *inputs[2:]), scalars)
            return [value, *torch.autograd.grad(value, leaves)]

        stream = torch.cuda.Stream()
        # The clones above are made on the current one.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            want = [t.clone() for t in step()]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for output in found:
            output.detach().fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a.detach(), b)


def _is_same(a, b):
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a is b or a == b


def _second(rows):
    """Return a mask [rows, 1] that is false in row 1."""
    return torch.arange(rows)[:, None] != 1
