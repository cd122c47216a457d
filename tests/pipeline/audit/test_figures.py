"""The figures of an audit."""

from __future__ import annotations

import pytest

from logitcask.pipeline.audit import figures as audit_figures


def test_the_approximate_p_values_are_near():
    import torch

    for freedom in (2, 5, 20):
        for ratio in (0.3, 1.0, 2.0, 4.0):
            exact = torch.special.gammaincc(
                torch.tensor(freedom / 2).double(), torch.tensor(freedom * ratio / 2).double()
            )
            assert audit_figures._chi_square_p(freedom * ratio, freedom) == pytest.approx(
                float(exact), rel=0.2, abs=2e-3
            )
