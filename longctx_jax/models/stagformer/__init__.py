"""StagFormer: stacks of layers one token behind each other, which decode in parallel.

    M^s[:, 0] = b^s,   M^s[:, j] = H^(s-1)[:, j - 1]     what stack s may see from token j on
    H^s = stack_s(X0, norm_s(M^s))                       cross-attention in every layer
    logits = norm(H^S) W,  or of a learned sum of all H^s

| equation | file |
| --- | --- |
| M, and the stacks one after another (training, prefill) | `stacks.py` |
| one token through all stacks at once, on one device or on several | `lanes.py` |
| cross-attention | `nn/cross_attention.py` |
| parameters, caches, b | `state.py` |
| the family's functions, `Body` | `body.py` |
| fields | `config.py` |

Source: Cutler et al. (2025), arXiv 2501.15665. Options beside it: handoff "add" is the shift of
Wu et al. (2025), arXiv 2510.24824, without its gated windows; stagger=False is the control that
sees the stack below at the token itself.
"""
