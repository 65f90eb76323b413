"""Cross-entropy of a linear head without whole logits.

`linear_cross_entropy(hidden_TH, weight_VH, labels_T, weights_T)` is
`sum_t weights[t] * (logsumexp(hidden[t] @ weight.T) - (hidden[t] @ weight.T)[labels[t]])`, and with it the number of
positions of weight above 0 whose likeliest token is the label. Logits exist for `chunk` positions at a time, in
float32; positions of weight 0 are never multiplied at all.
"""

from ossia.kernels.linear_cross_entropy.reference import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
