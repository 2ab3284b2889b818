"""Building blocks: low-rank adapters and routers."""

from jaxskip.nn.lora import init_lora, merge_lora, train_labels
from jaxskip.nn.router import init_routers, keep_probability

__all__ = ["init_lora", "init_routers", "keep_probability", "merge_lora", "train_labels"]
