"""The conformance suite of weight formats: what every `QuantFormat` must promise, checked from outside.

A plug-in author derives a test class and names the formats; pytest collects the inherited checks, one per format:

    class TestInt4(FormatConformance):
        formats = (IntFormat(4, 64, torch.bfloat16),)
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, save

from compressor.formats.base import (
    PackedTensor,
    QuantFormat,
    ScaledFormat,
    SearchableFormat,
    bits_per_weight,
    group_setting,
    grouped,
)
from compressor.testing.grids import (
    assert_same_params,
    assert_usable,
    grid_values,
    group_width,
    mirrored,
    random_codes,
    random_weights,
    refusal_of,
    rows_per_scale,
    same_bits,
    valid_codes,
)

_SLACK = 2.0**-21
"""Relative error of float32 division and multiplication: it may decide between two codes equally near."""


def describe(fmt: QuantFormat) -> str:
    """Return a short test id: name, group and, where the format has one, the scale dtype."""
    size = group_setting(fmt) or "channel"
    parts = [fmt.name, f"g{size}" if isinstance(size, int) else size]
    dtype = getattr(fmt, "dtype", None)
    return "-".join([*parts, *([str(dtype).removeprefix("torch.")] if dtype else [])])


def failing_checks(fmt: QuantFormat) -> list[str]:
    """Run the whole suite on one format without pytest and return the names of the checks that fail, in order."""
    suite = FormatConformance()
    failed = []
    for name in dir(suite):
        if name.startswith("test_"):
            try:
                getattr(suite, name)(fmt)
            except AssertionError:
                failed.append(name)
    return failed


class FormatConformance:
    """Checks every weight format must pass; derive, set `formats`, and name the class `Test...`."""

    formats: ClassVar[tuple[QuantFormat, ...]] = ()
    fmt: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert cls.formats, f"{cls.__name__}.formats is empty: nothing would be tested"

        @pytest.fixture(params=cls.formats, ids=describe)
        def fmt(self: FormatConformance, request: pytest.FixtureRequest) -> Any:
            return request.param

        cls.fmt = fmt

    def test_all_codes_survive_packing_bit_for_bit(self, fmt: QuantFormat) -> None:
        """Random codes over the whole range, and their parameters, come back from a safetensors file as they were."""
        for rows, groups in ((1, 1), (3, 2), (64, 4)):
            q = fmt.fit(random_weights(fmt, rows, groups))
            shape = (rows, groups * group_width(fmt))
            codes = random_codes(fmt, shape, rows)
            packed = fmt.pack(codes, q)
            stored = load(save(packed.tensors))
            again, params = fmt.unpack(PackedTensor(packed.format, packed.shape, stored))
            assert again.dtype == torch.uint8, again.dtype
            assert torch.equal(again, codes), f"codes {shape} changed"
            assert_same_params(params, q)

    def test_every_code_survives_in_every_lane(self, fmt: QuantFormat) -> None:
        """Each single code, in each position of a row, reads back as itself."""
        every = valid_codes(fmt)
        codes = every.repeat(-(-group_width(fmt) // len(every)) + 1)
        codes = torch.stack([codes.roll(lane)[: group_width(fmt)] for lane in range(len(every))])  # [codes, in]
        q = fmt.fit(random_weights(fmt, len(every), 1))
        assert torch.equal(fmt.unpack(fmt.pack(codes, q))[0], codes)

    def test_zero_stays_zero(self, fmt: QuantFormat) -> None:
        """0 and -0 encode to one code, the same for every scale unless there are zero points, and it decodes to 0."""
        q = fmt.fit(random_weights(fmt, 8, 3))
        zeros = torch.zeros(8, 3 * group_width(fmt))
        codes = fmt.encode(zeros, q)
        assert torch.equal(codes, fmt.encode(-zeros, q)), "-0 has another code than 0"
        alike = codes if q.zero_point is None else grouped(codes, fmt.group_size)
        first = codes[0, 0] if q.zero_point is None else alike[..., :1]
        assert (alike == first).all(), "zero has several codes"
        decoded = fmt.decode(codes, q)
        assert not decoded.any(), f"zero decodes to {decoded.abs().max()}"
        assert not decoded.signbit().any(), "zero decodes to -0"

    def test_decoded_values_do_not_move(self, fmt: QuantFormat) -> None:
        """Encoding what was decoded gives the same value, for random codes over the whole range."""
        q = fmt.fit(random_weights(fmt, 16, 4))
        codes = random_codes(fmt, (16, 4 * group_width(fmt)), 1)
        values = fmt.decode(codes, q)
        assert values.dtype == torch.float32, values.dtype
        assert torch.equal(fmt.decode(fmt.encode(values, q), q), values)

    def test_parameters_are_in_stored_precision(self, fmt: QuantFormat) -> None:
        """What `fit` returns is what lies on disk: decoding before and after packing gives the same bits."""
        w = random_weights(fmt, 8, 3)
        q = fmt.fit(w)
        codes = fmt.encode(w, q)
        stored_codes, stored = fmt.unpack(fmt.pack(codes, q))
        assert_same_params(stored, q)
        assert torch.equal(fmt.decode(stored_codes, stored), fmt.decode(codes, q))
        assert torch.equal(fmt.encode(w, stored), codes), "codes were not computed against the stored parameters"

    def test_codes_are_the_nearest(self, fmt: QuantFormat) -> None:
        """No other code of the group's grid is nearer, by trying all of them."""
        for seed, spread in ((0, 1.0), (1, 1e-4), (2, 1e3)):
            w = random_weights(fmt, 6, 3, seed) * spread
            q = fmt.fit(w)
            chosen = (fmt.decode(fmt.encode(w, q), q).double() - w.double()).abs()
            grid = grid_values(fmt, q, w.shape)
            best = (grid - w.double()).abs().amin(0)
            # A zero point is added to a float32 quotient: the sum is exact to the grid's width, not to the weight's.
            size = w.double().abs() if q.zero_point is None else grid.amax(0) - grid.amin(0)
            worse = chosen > best + _SLACK * size
            assert not worse.any(), f"{int(worse.sum())} of {w.numel()} weights have a nearer code"

    def test_min_max_covers_the_weights(self, fmt: QuantFormat) -> None:
        """Min-max parameters clip nothing: no error above half the widest step, the scale's own rounding aside."""
        w = random_weights(fmt, 16, 4)
        q = fmt.fit(w)
        grid = grid_values(fmt, q, w.shape).sort(0).values  # [codes, out, in]
        error = (fmt.decode(fmt.encode(w, q), q).double() - w.double()).abs()
        widest = grid.diff(dim=0).amax(0)
        rounding = torch.finfo(q.scale.dtype).eps / 2 if q.scale.is_floating_point() else 0.0
        excess = (error - 0.5 * widest - rounding * w.double().abs()) / widest
        assert (excess <= _SLACK).all(), f"{excess.max():.3f} steps more than rounding"

    def test_shapes_it_cannot_store_are_refused(self, fmt: QuantFormat) -> None:
        """1-D, 3-D and empty shapes get a reason, fitting ones do not; indivisible ones get one or work."""
        width = group_width(fmt)
        bad: list[tuple[int, ...]] = [(width,), (2, 2, width), (0, width), (4, 0), ()]
        for shape in bad:
            assert fmt.refuse(shape), f"{shape} is not refused"
        if fmt.group_size is not None and fmt.group_size > 1:
            for columns in (width + 1, width - 1, width + fmt.group_size // 2):
                if not fmt.refuse((4, columns)):
                    w = 0.02 * torch.randn(4, columns, generator=torch.Generator().manual_seed(columns))
                    q = fmt.fit(w)
                    codes, stored = fmt.unpack(fmt.pack(fmt.encode(w, q), q))
                    error = fmt.decode(codes, stored) - w
                    assert error.norm() < 0.6 * w.norm(), f"{(4, columns)} is not refused, and comes back wrong"
        for good in ((1, width), (5, 3 * width)):
            assert fmt.refuse(good) is None, f"{good}: {fmt.refuse(good)}"

    def test_nan_and_infinity_are_refused(self, fmt: QuantFormat) -> None:
        """One bad weight is enough, wherever it is, and the error says so."""
        for value in (float("nan"), float("inf"), -float("inf")):
            for dtype in (torch.float32, torch.bfloat16):
                w = random_weights(fmt, 4, 2).to(dtype)
                w[2, -1] = value
                refusal = refusal_of(fmt, w)
                assert refusal is not None, f"{value} in {dtype} was fitted"
                assert refusal.message, "the error lacks a message"
                assert refusal.hint, "the error lacks a hint"

    def test_zero_groups_and_rows_have_usable_scales(self, fmt: QuantFormat) -> None:
        """All-zero groups, rows and matrices get finite, positive steps and decode to zero."""
        width = group_width(fmt)
        w = random_weights(fmt, 5, 3)
        w[0] = 0
        w[1, :width] = 0
        for weights in (w, torch.zeros(2, width)):
            q = fmt.fit(weights)
            assert_usable(fmt, q, weights.shape)
            decoded = fmt.decode(fmt.encode(weights, q), q)
            assert not decoded[weights == 0].any(), "a zero weight does not decode to zero"

    def test_one_row_and_one_group_equal_their_part_of_a_matrix(self, fmt: QuantFormat) -> None:
        """Rows (those under one scale, together) and groups are independent once the global scale is given."""
        rows = rows_per_scale(fmt)
        if rows is None:
            return  # one scale for the whole matrix
        w = random_weights(fmt, 3 * rows, 3)
        shared = fmt.fit_global([w])
        whole = fmt.decode(fmt.encode(w, fmt.fit(w, shared)), fmt.fit(w, shared))
        for part in ((slice(rows, 2 * rows), slice(None)), (slice(None), slice(group_width(fmt)))):
            if fmt.group_size is None and part[1] != slice(None):
                continue  # half a row has another scale when the row is the group
            q = fmt.fit(w[part], shared)
            assert torch.equal(fmt.decode(fmt.encode(w[part], q), q), whole[part])

    def test_extreme_magnitudes_stay_finite(self, fmt: QuantFormat) -> None:
        """Weights around 1e30 and 1e-30 decode to finite values no worse than rounding to zero, or are refused."""
        for magnitude in (1e30, 1e4, 1e-6, 1e-30):
            w = random_weights(fmt, 4, 2) * magnitude
            if refusal_of(fmt, w) is not None:
                assert magnitude > 1, f"weights around {magnitude} were refused"
                continue
            q = fmt.fit(w)
            assert_usable(fmt, q, w.shape)
            error = fmt.decode(fmt.encode(w, q), q).double() - w.double()
            assert error.norm() <= w.double().norm(), f"weights around {magnitude} are off by more than themselves"

    def test_layout_promises_what_pack_writes(self, fmt: QuantFormat) -> None:
        """Suffixes, dtypes, shapes and bytes are known from the shape alone."""
        for rows, groups in ((1, 1), (3, 2), (7, 5)):
            w = random_weights(fmt, rows, groups)
            q = fmt.fit(w)
            packed = fmt.pack(fmt.encode(w, q), q)
            shape = (rows, groups * group_width(fmt))
            layout = fmt.layout(shape)
            written = {suffix: (t.dtype, tuple(t.shape)) for suffix, t in packed.tensors.items()}
            assert written == {suffix: (slot.dtype, slot.shape) for suffix, slot in layout.items()}
            assert (packed.format, packed.shape) == (fmt.name, shape)
            assert all(t.is_contiguous() for t in packed.tensors.values())
            assert round(bits_per_weight(fmt, shape) * w.numel(), 6) == 8 * packed.nbytes
            assert packed.nbytes * 8 >= fmt.bits * w.numel(), "fewer bytes than bits were promised"

    def test_bfloat16_weights_are_read_exactly(self, fmt: QuantFormat) -> None:
        """bf16 weights give what the same numbers give in float32: nothing is computed in bf16."""
        w = random_weights(fmt, 8, 3).bfloat16()
        q, wide = fmt.fit(w), fmt.fit(w.float())
        assert_same_params(q, wide)
        assert torch.equal(fmt.encode(w, q), fmt.encode(w.float(), wide))

    def test_inputs_are_not_changed(self, fmt: QuantFormat) -> None:
        """No call writes into its arguments."""
        w = random_weights(fmt, 4, 2)
        before = w.clone()
        shared = fmt.fit_global([w])
        kept = None if shared is None else shared.clone()
        q = fmt.fit(w, shared)
        q_before = copy.deepcopy(q)
        codes = fmt.encode(w, q)
        codes_before = codes.clone()
        fmt.decode(codes, q)
        packed = fmt.pack(codes, q)
        stored = {suffix: t.clone() for suffix, t in packed.tensors.items()}
        fmt.unpack(packed)
        assert torch.equal(w, before), "the weights changed"
        assert torch.equal(codes, codes_before), "the codes changed"
        assert_same_params(q, q_before)
        if shared is not None and kept is not None:
            assert torch.equal(shared, kept), "the global scale changed"
        assert all(same_bits(packed.tensors[suffix], t) for suffix, t in stored.items()), "the packed tensors changed"

    def test_strided_weights_give_the_same_codes(self, fmt: QuantFormat) -> None:
        """A transposed view is as good as a copy of it."""
        w = random_weights(fmt, 6, 2)
        view = w.t().contiguous().t()
        assert_same_params(fmt.fit(view), fmt.fit(w))
        assert torch.equal(fmt.encode(view, fmt.fit(w)), fmt.encode(w, fmt.fit(w)))

    def test_two_runs_write_the_same_bytes(self, fmt: QuantFormat) -> None:
        """The same weights give the same file, bit for bit."""
        runs = []
        for _ in range(2):
            w = random_weights(fmt, 8, 3)
            q = fmt.fit(w)
            runs.append(save(fmt.pack(fmt.encode(w, q), q).tensors))
        assert runs[0] == runs[1]

    def test_a_shared_global_scale_is_kept(self, fmt: QuantFormat) -> None:
        """`fit` uses the global scale it is given; a format without one returns None."""
        small, large = random_weights(fmt, 4, 2), random_weights(fmt, 4, 2, seed=1) * 3
        shared = fmt.fit_global([small, large])
        assert (shared is not None) == fmt.has_global_scale
        if shared is None:
            return
        assert (shared.dtype, tuple(shared.shape)) == (torch.float32, (1,))
        both = torch.cat([small, large])
        joint = fmt.fit_global([both])
        assert joint is not None
        assert torch.equal(shared, joint), "it is not that of the matrices together"
        for w in (small, large):
            q = fmt.fit(w, shared)
            assert q.global_scale is not None
            assert torch.equal(q.global_scale, shared)
            assert_usable(fmt, q, w.shape)

    def test_candidates_start_at_the_given_and_are_storable(self, fmt: QuantFormat) -> None:
        """Every candidate has the same shape and dtype and a usable grid; the first is the given one."""
        if not isinstance(fmt, SearchableFormat):
            return
        w = random_weights(fmt, 4, 2)
        w[0] = 0  # the candidates of a zero group must be usable too
        shared = fmt.fit_global([w])
        starts = list(fmt.starts(w, shared))
        assert_same_params(starts[0], fmt.fit(w, shared))
        for q in starts:
            candidates = list(fmt.scale_candidates(q))
            assert_same_params(candidates[0], q)
            assert len(candidates) > 1, "nothing to search"
            for candidate in candidates:
                assert_usable(fmt, candidate, w.shape)
                codes = fmt.encode(w, candidate)
                assert_same_params(fmt.unpack(fmt.pack(codes, candidate))[1], candidate)

    def test_rounding_is_decoding_what_was_encoded(self, fmt: QuantFormat) -> None:
        """`round` gives the values of the codes that `encode` gives, ties included, for one scale or many at once."""
        if not isinstance(fmt, ScaledFormat):
            return
        w = random_weights(fmt, 8, 3)
        q = fmt.fit(w)
        values = grid_values(fmt, q, (8, 3 * group_width(fmt))).float().sort(0).values  # [codes, out, in]
        ties = (values[1:] + values[:-1]) / 2
        for z in (w, *values, *ties, values[0] * 3, values[-1] * 3):
            assert torch.equal(fmt.round(z, q), fmt.decode(fmt.encode(z, q), q))
        if not isinstance(fmt, SearchableFormat):
            return
        candidates = [replace(q, scale=scale) for scale in (q.scale, q.scale.flip(0))]
        scales = torch.stack([candidate.scale.view(torch.uint8) for candidate in candidates]).view(q.scale.dtype)
        together = fmt.round(w, replace(q, scale=scales))  # [candidates, out, in]
        for rounded, candidate in zip(together, candidates, strict=True):
            assert torch.equal(rounded, fmt.decode(fmt.encode(w, candidate), candidate))

    def test_the_grid_stretches_with_its_steps(self, fmt: QuantFormat) -> None:
        """Values are `steps * snap(w / steps)`; new steps are stored as near as possible; reach says what saturates."""
        if not isinstance(fmt, ScaledFormat):
            return
        w = random_weights(fmt, 8, 3)
        q = fmt.fit(w)
        steps = fmt.steps(q)  # [out, groups, 1]
        assert torch.equal(fmt.snap(grouped(w, fmt.group_size) / steps, q).mul_(steps).flatten(-2), fmt.round(w, q))
        assert_same_params(fmt.with_steps(q, steps), q)
        for factor in (0.5, 0.7, 0.9):  # larger ones may saturate
            moved = fmt.with_steps(q, steps * factor)
            assert_usable(fmt, moved, w.shape)
            ratio = fmt.steps(moved) / (steps * factor)
            assert float(ratio.min()) > 0.66
            assert float(ratio.max()) < 1.5  # a power of two is at most a factor of sqrt(2) away
        low, high = (torch.as_tensor(limit).expand_as(steps) for limit in fmt.reach(q))
        inside = torch.cat([low + 1e-3, high - 1e-3], -1) * steps  # [out, groups, 2]
        width = fmt.group_size or w.shape[1]
        z = inside.repeat(1, 1, width)[..., :width]  # [out, groups, group]
        gap = (fmt.round(z.flatten(-2), q) - z.flatten(-2)).abs().view_as(z) / steps
        further = (fmt.round((z * 1.5).flatten(-2), q) - (z * 1.5).flatten(-2)).abs().view_as(z) / steps
        assert torch.all(further > gap), "what lies outside the reach must move further than what lies inside"

    def test_mirrored_grids_are_mirrored_and_stored(self, fmt: QuantFormat) -> None:
        """Where negative scales are allowed, codes mean the opposite values, the nearest is chosen, all is stored."""
        if not isinstance(fmt, ScaledFormat) or not fmt.mirrors:
            return
        w = random_weights(fmt, 6, 4)
        q = fmt.fit(w)
        turned = mirrored(fmt, q)
        signs = fmt.steps(turned) / fmt.steps(q)  # [out, groups, 1]
        assert_same_params(fmt.with_steps(q, fmt.steps(q) * signs), turned)
        codes = random_codes(fmt, (6, w.shape[1]), 2)
        stored_codes, stored = fmt.unpack(fmt.pack(codes, turned))
        assert torch.equal(stored_codes, codes)
        assert_same_params(stored, turned)
        opposite = grouped(fmt.decode(codes, q), fmt.group_size) * signs
        assert torch.equal(grouped(fmt.decode(codes, turned), fmt.group_size), opposite)
        chosen = (fmt.decode(fmt.encode(w, turned), turned).double() - w.double()).abs()
        best = (grid_values(fmt, turned, (6, w.shape[1])) - w.double()).abs().amin(0)
        assert (chosen <= best + _SLACK * w.double().abs()).all(), "a weight has a nearer code"
        assert torch.equal(fmt.round(w, turned), fmt.decode(fmt.encode(w, turned), turned))
