"""The MLP of a mixture of experts: each token through its K experts, and the weighted sum of what they say.

For row s (token t, its k-th expert e): `gate_up = x W1[e] + b1[e]`, gate and up by turns in its columns;
`act = (up + 1) · gate · sigmoid(alpha · gate)` with gate at most `limit` and up within ±`limit`;
`y = act W2[e] + b2[e]`; out[t] is the sum of `weight[t, k] · y`. Weights and biases are frozen, in MXFP4 or floating
point (`Frozen`). An adapter adds `scale · (x A[e]) B[e]` to a projection. Gradients go to hidden, the experts' weights
and the adapters.

`reference` is that in PyTorch, on any device, with any function in the adapter's place. `fused` computes the same
on a GPU (Ampere or newer, bfloat16) with one adapter or none: B stands in the last columns of the expanded W and the
thin product `x A` in the last columns of x, so the adapter's sum costs nothing; passes over rows are Triton kernels
that compute the thin products on their way; backward needs no product of the second projection again.
"""

from ossia.kernels.expert_mlp.frozen import Adapter, Frozen
from ossia.kernels.expert_mlp.memory import Memory, recomputing
from ossia.kernels.expert_mlp.reference import expert_mlp as reference

__all__ = ["Adapter", "Frozen", "Memory", "recomputing", "reference"]
