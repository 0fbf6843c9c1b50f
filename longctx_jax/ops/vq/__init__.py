"""Softmax attention over vector-quantised keys (Transformer-VQ): exact, in linear time.

    k_hat_j = C[z_j], the nearest of S codewords;  out_i = softmax_{j<=i}(q_i . k_hat_j + B_ij) v_j

The S codes stand for all keys that left a window of recent tokens, with their mean values and
counts, so cost grows linearly with length and decoding needs constant memory. docs/vq.md tells
more; `codebook.py` has how codewords are learned.
"""

from longctx_jax.ops.vq.select import VQOutput, nearest_code, vq_attention
from longctx_jax.ops.vq.state import VQState, init_vq_state, renewed

__all__ = ["VQOutput", "VQState", "init_vq_state", "nearest_code", "renewed", "vq_attention"]
