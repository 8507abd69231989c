"""The compact state format: 40 instead of 76 bytes per parameter, at 16 bits a number.

    hidden   int16    hidden / limit * 32767; `limit` bounds the hidden state
    ms       int16    log2(ms) in steps of 1/409 from 2^-80 to 2^80, beyond which it saturates; -32768: zero
    accum    float16  accum / sqrt(ms), with ms as it is stored

Mean squares from 2^-80 to 2^80 are those of gradients from 1e-12 to 1e12. With the weights that ship none is smaller,
for `ms_eps` is added to all. Where they are larger, a step still adds the square of its average, so the scaled average
stays bounded. Rounding is to nearest, so a run repeats bit for bit. A step computes in float32 with the stored numbers.
The log lr stays float32, since each of its steps is smaller than what 16 bits resolve.

csrc/hrnn_compact.h is the same for the kernels. Tests: tests/test_compact.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lopt.metaparams import MetaParams

DTYPES = {"hidden": torch.int16, "accum": torch.float16, "ms": torch.int16}  # of the kinds of state it changes
HIDDEN_STEPS = 32767
MS_STEPS = 409  # per octave
MS_STEPS_UNSAID = 256  # in files that do not say how many
MS_OCTAVES = 80  # that are held on either side of 1
MS_ZERO = -32768


def limit(meta: MetaParams) -> float:
    """Largest hidden state that the format holds: 1, or the power of two above the initial one.

    A GRU's state moves towards tanh of something, so it never leaves [-1, 1] once it is in there.
    """
    return 2.0 ** math.ceil(math.log2(max(1.0, meta["level0.init"].abs().max().item())))


def encode(state: Mapping[str, Tensor], limit: float) -> dict[str, Tensor]:
    """float32 `hidden`, `accum` and `ms` of the same memory order -> the same in this format."""
    hidden, accum, ms = (state[name].float() for name in DTYPES)
    code = torch.log2(ms).clamp(-MS_OCTAVES, MS_OCTAVES).mul(MS_STEPS).round()
    largest = torch.finfo(torch.float16).max
    ratio = torch.where(ms > 0, accum * torch.exp2(code * (-0.5 / MS_STEPS)), 0.0).clamp(-largest, largest)
    code = torch.where(ms > 0, code, MS_ZERO)
    steps = (hidden * (HIDDEN_STEPS / limit)).round().clamp(-HIDDEN_STEPS, HIDDEN_STEPS)
    return {"hidden": steps.to(torch.int16), "accum": ratio.half(), "ms": code.to(torch.int16)}


def decode(
    state: Mapping[str, Tensor], limit: float, dtype: torch.dtype = torch.float32, *, ms_steps: int = MS_STEPS
) -> dict[str, Tensor]:
    """The inverse of `encode`, of codes with `ms_steps` per octave."""
    code = state["ms"].to(dtype)
    return {
        "hidden": state["hidden"].to(dtype) * (limit / HIDDEN_STEPS),
        "accum": state["accum"].to(dtype) * torch.exp2(code * (0.5 / ms_steps)),
        "ms": torch.where(state["ms"] != MS_ZERO, torch.exp2(code * (1 / ms_steps)), 0.0),
    }


def saved_codes(state: Mapping[str, Tensor], limit: float, said: int | None) -> int | None:
    """Codes per octave of the mean squares in saved state of a parameter tensor, None for float32.

    Args:
        state: `hidden` and `ms`, or a part of them. limit: see `limit`.
        said: what the file says, None: nothing.

    Raises:
        ValueError: the numbers are of one format and their dtype is of the other's, since
            `torch.distributed.checkpoint` copies into the tensors that are there.
    """
    hidden, ms = state["hidden"], state["ms"]
    is_compact = hidden.dtype == torch.int16
    if hidden.numel() > 0:
        # No hidden state is beyond the limit, but for rounding, and no mean square below zero; of codes, some are.
        codes = bool(hidden.abs().amax() > 2 * limit) or bool(ms.amin() < 0)
        if codes != is_compact:
            found, wanted = ("compact", "float32") if codes else ("float32", "compact")
            raise ValueError(
                f"the state to load was saved in the format {found} and has been read into tensors of the format "
                f"{wanted}: read it for an optimizer with state_format={found!r}, and load that one's state_dict()"
            )
    return (said or MS_STEPS_UNSAID) if is_compact else None
