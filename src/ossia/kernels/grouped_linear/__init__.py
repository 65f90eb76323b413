"""One product per group of rows: rows `offsets[e-1]:offsets[e]` of `x_SI` times `weight_EIO[e]`.

`grouped_linear` takes a weight that trains or rests in floating point; `grouped_linear_mxfp4` a frozen one in MXFP4
blocks, which it dequantizes for the forward product and once more for the input's gradient, keeping nothing.
On a GPU (Ampere or newer, bfloat16, rows of whole 16 bytes) the product is torch's `grouped_mm`; elsewhere a loop over
the groups.
"""

from ossia.kernels.grouped_linear.reference import grouped_linear, grouped_linear_mxfp4

__all__ = ["grouped_linear", "grouped_linear_mxfp4"]
