"""Which family a config means: the only place that knows all of them."""

from longctx_jax.models import plain
from longctx_jax.models.body import Body
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.inattention import body as inattention
from longctx_jax.models.recurrent_memory import body as recurrent_memory
from longctx_jax.models.stagformer import body as stagformer

NAMES = (*plain.DEFAULTS, "recurrent_memory", "stagformer", "inattention")


def body_of(config: ModelConfig) -> Body:
    """Returns the body of the model's family; layers with a memory make any pattern recurrent."""
    if config.name == "stagformer":
        return stagformer.BODY
    if config.name == "inattention":
        return inattention.BODY
    return plain.BODY if config.recurrence == "none" else recurrent_memory.BODY
